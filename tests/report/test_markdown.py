from __future__ import annotations

from pathlib import Path

from qlora_export.pipeline import RunOptions
from qlora_export.pipeline import build as run_build
from qlora_export.pipeline import check as run_check
from qlora_export.report.markdown import markdown
from tests.helpers.pico import RecipeMaker


def test_the_table_has_a_row_for_every_model(pico_recipe: RecipeMaker, pico_text: Path, tmp_path: Path) -> None:
    drift = {"text": str(pico_text), "limits": {"gain_kept": None}}
    run = run_check(
        pico_recipe("bf16", {"format": "nf4", "name": "nf4", "rounding": "nearest", "expect": "fail"}, drift=drift),
        RunOptions(tmp_path),
    )
    text = markdown(run)
    rows = [line for line in text.split("## Layers")[0].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 + 2
    assert len({row.count("|") for row in rows}) == 1
    assert "| `nf4` |" in text
    assert "- `nf4`: " in text


def test_without_a_ledger_the_artifacts_are_listed(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    text = markdown(run_build(pico_recipe("bf16"), RunOptions(tmp_path)))
    assert "- `bf16` (bf16), " in text
