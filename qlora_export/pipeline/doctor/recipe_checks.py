"""What a recipe asks of this machine: sources, text, extras, space, and the repositories that it goes to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_export.catalog import ARTIFACTS
from qlora_export.errors import ExportError, PlanRefused
from qlora_export.pipeline.auto_format import resolve_auto_formats
from qlora_export.pipeline.doctor.checks import Check
from qlora_export.pipeline.doctor.machine import Needs
from qlora_export.planning.make import make_plan
from qlora_export.planning.memory import peak_memory_bytes
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import Recipe
from qlora_export.sources.locate import hub_id
from qlora_export.sources.text_tables import HUB_PREFIX, is_table


def recipe_checks(recipe: Recipe, out: Path, workers: int) -> tuple[list[Check], Needs]:
    """Whether the recipe can be planned and measured, and what it takes; on the Hub's sources nothing is fetched."""
    found = [_drift_text(recipe), *_calibration_texts(recipe)]
    remote = [text for text in recipe.sources if hub_id(text, recipe.folder) is not None]
    if remote:
        found.append(Check("sources", "ok", f"{', '.join(remote)} on the Hub: `qlora-export plan` looks at them"))
        return found, Needs()
    try:
        plan = make_plan(resolve_auto_formats(recipe, out), out)
    except PlanRefused as error:
        message = "; ".join(problem.message for problem in error.problems)
        return [*found, Check("sources", "fail", message, error.hint.replace("\n", " "))], Needs()
    except ExportError as error:
        return [*found, Check("sources", "fail", error.message, error.hint)], Needs()
    found.append(Check("sources", "ok", f"the plan holds: {', '.join(_names(plan))}"))
    return found, Needs(plan.bytes, peak_memory_bytes(plan, workers))


def with_resolved_formats(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with a format for every `auto`; as it is where only the Hub, or nothing, can tell."""
    if any(hub_id(text, recipe.folder) is not None for text in recipe.sources):
        return recipe
    try:
        return resolve_auto_formats(recipe, out)
    except ExportError:
        return recipe  # the plan says what is wrong


def extras_of(recipe: Recipe) -> set[str]:
    """The extras that the recipe cannot do without."""
    needed = {"onnx"} if any(_is_onnx(item.format) for item in recipe.artifacts) else set()
    needed |= {"data"} if any(is_table(text) for text in _texts(recipe)) else set()
    return needed | ({"sign"} if recipe.publish is not None and recipe.publish.sign else set())


def _is_onnx(name: str) -> bool:
    return name in ARTIFACTS and ARTIFACTS[name].library == "onnx"


def repositories_of(recipe: Recipe) -> list[str]:
    """The repositories on the Hub that the recipe publishes to, in the order of its artifacts."""
    kind, _, place = recipe.publish.to.partition(":") if recipe.publish is not None else ("", "", "")
    if kind != "hub":
        return []
    names = [place.replace("{name}", item.name).replace("{format}", item.format) for item in recipe.artifacts]
    return list(dict.fromkeys(name.partition("@")[0] for name in names))


def _texts(recipe: Recipe) -> list[str]:
    drift = [recipe.drift.text] if recipe.drift else []
    return drift + [part.text for part in (recipe.calibration.parts if recipe.calibration else ())]


def _drift_text(recipe: Recipe) -> Check:
    if recipe.drift is None:
        fix = "add `drift: {text: FILE}`: release and check need it"
        return Check("drift.text", "warn", "the recipe names no text to measure on", fix)
    fix = "name a .jsonl, .parquet or .txt file that training never saw"
    return _text(recipe, "drift.text", recipe.drift.text, fix)


def _calibration_texts(recipe: Recipe) -> list[Check]:
    parts = recipe.calibration.parts if recipe.calibration else ()
    fix = "name a .jsonl, .parquet or .txt file of the task"
    return [_text(recipe, "calibration.text", part.text, fix) for part in parts]


def _text(recipe: Recipe, check: str, name: str, fix: str) -> Check:
    if name.startswith(HUB_PREFIX):
        return Check(check, "ok", name)
    path = recipe.path(name)
    return Check(check, "ok", str(path)) if path.is_file() else Check(check, "fail", f"{path} is not there", fix)


def _names(plan: Plan) -> Sequence[str]:
    return [item.name for item in plan.artifacts] + [item.name for item in plan.exports]
