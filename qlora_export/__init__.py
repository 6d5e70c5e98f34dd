"""Release tool for QLoRA fine-tunes: merge, re-quantise, measure, publish.

    from qlora_export import RunOptions, load_recipe, release

    run = release(load_recipe(Path("recipe.yaml")), RunOptions(out=Path("out/run")))

`plan`, `build`, `check` and `release` are what the command calls. Each takes a `Recipe` and `RunOptions` and returns a
`Run`: the plan, the artifacts, the ledger of their drift, the receipts. `compare` takes the same, and a list of formats
where it is not the usual one, and returns a `Comparison`. `write_onnx_adapter` makes the file of one more adapter for
an ONNX graph that takes several. Errors are `qlora_export.errors.ExportError`.
Nothing is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qlora_export._version import __version__

if TYPE_CHECKING:
    from qlora_export.drift.comparison.rows import Comparison
    from qlora_export.exporters.onnx.adapter_file import write_onnx_adapter
    from qlora_export.pipeline.compare import compare
    from qlora_export.pipeline.options import RunOptions
    from qlora_export.pipeline.release import build, check, plan, release
    from qlora_export.recipe.config import Recipe
    from qlora_export.recipe.load import load_recipe, make_recipe
    from qlora_export.report.run import Run

__all__ = [
    "Comparison",
    "Recipe",
    "Run",
    "RunOptions",
    "__version__",
    "build",
    "check",
    "compare",
    "load_recipe",
    "make_recipe",
    "plan",
    "release",
    "write_onnx_adapter",
]

_PUBLIC_NAMES = {
    "Comparison": "drift.comparison.rows",
    "compare": "pipeline.compare",
    "Recipe": "recipe.config",
    "load_recipe": "recipe.load",
    "make_recipe": "recipe.load",
    "Run": "report.run",
    "RunOptions": "pipeline.options",
    "build": "pipeline.release",
    "check": "pipeline.release",
    "plan": "pipeline.release",
    "release": "pipeline.release",
    "write_onnx_adapter": "exporters.onnx.adapter_file",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module when it is first asked for."""
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC_NAMES[name]}"), name)
