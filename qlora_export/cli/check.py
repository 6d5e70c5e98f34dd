"""`qlora-export check`: measure artifacts and judge them; those of a recipe, or a folder against a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_export.cli.options import Outcome, drift_from
from qlora_export.errors import UsageError

if TYPE_CHECKING:
    from qlora_export.pipeline.options import RunOptions
    from qlora_export.recipe.config import Recipe
    from qlora_export.report.run import Reported

# Flags that mean something where no recipe makes the artifact, and what they are of a recipe's drift.
AGAINST_FLAGS = ("--base", "--training-quantization", "--text", "--protocol", "--choices", "--prompts")


def check(recipe: Recipe, options: RunOptions) -> Outcome:
    """Measure the drift of every artifact from the model that was trained; exit 3 when one drifted too far.

    Artifacts of a recipe are built where they are missing. With --against, the folder ARTIFACT is measured that is
    given in place of a recipe: one of transformers, of ONNX Runtime GenAI, a PEFT adapter, one of ours, or a GGUF file.
    """
    from qlora_export.pipeline import release as pipeline

    return _reported(pipeline.check(recipe, options), options.out)


def check_against(
    artifact: Path, against: str, flags: dict[str, Any], settings: list[str], options: RunOptions
) -> Outcome:
    """Measure the drift of a folder from a model."""
    from qlora_export.pipeline.check_folder import CheckRequest
    from qlora_export.pipeline.check_folder import check_against as check_folder

    unknown = [name for name, value in flags.items() if value and name not in AGAINST_FLAGS]
    if unknown:
        raise UsageError(f"--against and {', '.join(unknown)}", f"beside it go {', '.join(AGAINST_FLAGS)} and --set")
    drift = drift_from(flags)
    if drift is None:
        raise UsageError("--against without a text to measure on", "add --text FILE: .jsonl, .parquet or .txt")
    request = CheckRequest(str(artifact), against, flags["--base"], flags["--training-quantization"])
    return _reported(check_folder(request, drift, settings, options), options.out)


def _reported(run: Reported, out: Path) -> Outcome:
    from qlora_export.report.data import exit_code, report, write_report
    from qlora_export.report.terminal import print_ledger

    write_report(run, out)
    return report(run), lambda: print_ledger(run), int(exit_code(run))
