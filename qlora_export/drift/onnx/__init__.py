"""Drift of graphs: run in every execution variant, compared with the folder they were made of, operator by operator."""
