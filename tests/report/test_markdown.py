from __future__ import annotations

from pathlib import Path

from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import build as run_build
from qlora_export.report.markdown import markdown
from qlora_export.report.run import Run
from tests.helpers.pico import RecipeMaker


def test_the_table_has_a_row_for_every_model(checked: Run) -> None:
    text = markdown(checked)
    rows = [line for line in text.split("## Layers")[0].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 + 2
    assert len({row.count("|") for row in rows}) == 1
    assert "| `nf4` |" in text
    assert "- `nf4`: " in text


def test_without_a_ledger_the_artifacts_are_listed(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    text = markdown(run_build(pico_recipe("bf16"), RunOptions(tmp_path)))
    assert "- `bf16` (bf16), " in text
