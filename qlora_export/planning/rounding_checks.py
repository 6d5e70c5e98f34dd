"""Which rounding an artifact may have, and which it has where the recipe names none.

    nearest      every format that quantises; also what dithering becomes where the delta is large
    dithered     nf4 onto the base of a training in nf4: its usual rounding there
    search       formats that say so
    calibrated   formats with a grid, where the recipe has a text to calibrate on; usual for what has a correction
    tuned        the same formats, without a correction

What cannot be is told before anything is built.
"""

from __future__ import annotations

from qlora_export.errors import ExitCode, Problem, UsageError
from qlora_export.formats.base import CorrectedFormat, GridFormat
from qlora_export.planning.inputs import Inputs
from qlora_export.planning.resolve import ResolvedArtifact, ResolvedExport, ResolvedFormat
from qlora_export.recipe.config import ArtifactRecipe, Recipe
from qlora_export.sources.weights import FourBitWeight
from qlora_export.types import Rounding

CALIBRATED: tuple[Rounding, ...] = ("calibrated", "tuned")
SEE = "see docs/rounding.md for what rounds which format, or leave `rounding` out"
ADD_TEXT = "add `calibration: {text: FILE}`: what the model will be used for, none of it in drift.text"


def usual_rounding(inputs: Inputs, item: ResolvedFormat) -> Rounding:
    """The rounding that is stated; else dithering where it is possible, and nearest."""
    if item.recipe.rounding is not None:
        return item.recipe.rounding
    if isinstance(item.form, CorrectedFormat):
        return "calibrated"
    return "dithered" if "dithered" in item.form.roundings and undithered(inputs, item.recipe) is None else "nearest"


def rounding_problems(inputs: Inputs) -> list[Problem]:
    """Roundings that a format does not have, or not here."""
    problems = []
    for item in inputs.artifacts:
        if (found := _obstacle(inputs, item)) is not None:
            message, hint = found
            problems.append(Problem(ExitCode.USAGE, f"artifact {item.recipe.name}: {message}", hint))
    return problems


def _obstacle(inputs: Inputs, found: ResolvedArtifact) -> tuple[str, str] | None:
    """What keeps an artifact from its rounding, and a hint; wrong options of a format are told elsewhere."""
    item = found.recipe
    if isinstance(found, ResolvedExport):
        return (found.made.message, found.made.hint) if isinstance(found.made, UsageError) else None
    form = found.form
    if found.error is None and isinstance(form, CorrectedFormat):
        return _uncorrected(inputs.recipe, item)
    if found.error is not None or item.rounding is None:
        return None
    if not form.quantises or form.consumes == "base":
        return f"{item.format} rounds no merged weight to a grid, so there is nothing to be {item.rounding}", SEE
    if item.rounding in CALIBRATED:
        return _uncalibrated(inputs.recipe, found)
    if item.rounding == "nearest":
        return None
    if item.rounding not in form.roundings:
        hint = SEE
        if item.rounding == "dithered":
            hint = "dithering is for a base that sits on the grid already: `format: nf4`; other grids need none"
        return f"{item.format} is not rounded {item.rounding}", hint
    return undithered(inputs, item) if item.rounding == "dithered" else None


def undithered(inputs: Inputs, item: ArtifactRecipe) -> tuple[str, str] | None:
    """What keeps a format that can dither from it, and a hint."""
    training = inputs.training
    if not inputs.recipe.adapters:
        return "without an adapter there is no delta to dither", "leave `rounding` out: nearest is exact enough"
    if training.quant_type != "nf4":
        hint = "dithering keeps a delta on the grid that the base was trained on; leave `rounding` out"
        return f"dithering is onto a base trained in nf4, training had {training.quant_type}", hint
    if inputs.recipe.onto(item) == "original":
        hint = "merged onto the original, nearest has no dead zone: leave `rounding` out, or `onto: as-trained`"
        return "dithering is merged onto the base as it was trained, this is merged onto the original", hint
    for output in inputs.model.outputs.values():
        source = output.source
        if output.spec.module in inputs.facts.encodable and isinstance(source, FourBitWeight):
            have = (source.storage, source.block, source.offset is not None)
            if have != ("nf4", training.block_size, training.double_quant):
                hint = "`rounding: nearest` takes blocks of any size"
                return f"{output.name} is stored in {have[0]} in blocks of {have[1]}, unlike training", hint
    return None


def _uncorrected(recipe: Recipe, item: ArtifactRecipe) -> tuple[str, str] | None:
    """What keeps a format with a correction from being made, and a hint."""
    if item.rounding not in (None, "calibrated"):
        hint = "leave `rounding` out: its correction is calibrated, and so are its weights"
        return f"{item.format} is not rounded {item.rounding}", hint
    if recipe.calibration is None:
        return f"the correction of {item.format} needs a text to calibrate on", ADD_TEXT
    return None


def _uncalibrated(recipe: Recipe, item: ResolvedFormat) -> tuple[str, str] | None:
    """What keeps a format from being calibrated, and a hint."""
    if not isinstance(item.form, GridFormat):
        return f"{item.recipe.format} cannot be {item.recipe.rounding}: it tells no grid", SEE
    if recipe.calibration is None:
        return f"{item.recipe.rounding} needs a text to calibrate on", ADD_TEXT
    return None
