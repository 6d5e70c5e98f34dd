"""The embedded model, adapter and text, made by `tools/make_demo.py`."""

from __future__ import annotations

from pathlib import Path


def recipe_path() -> Path:
    """The recipe of the demo, beside the data it names."""
    return Path(__file__).parent / "recipe.yaml"
