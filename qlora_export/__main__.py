"""`python -m qlora_export` is `qlora-export`."""

from qlora_export.cli.main import run

run()
