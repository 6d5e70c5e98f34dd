"""Which rounding an artifact may have, and which it has where the recipe names none.

    nearest      every format that quantises; also what dithering becomes where the delta is large
    dithered     nf4 onto the base of a training in nf4: its usual rounding there
    search       formats that say so
    calibrated   formats with a grid, where the recipe has a text to calibrate on; usual for what has a correction
    tuned        the same formats, without a correction

What cannot be is told before anything is built.
"""

from __future__ import annotations

from qlora_export import catalog
from qlora_export.errors import ExitCode, Problem, UsageError
from qlora_export.exporters.registry import load_exporter
from qlora_export.formats.base import CorrectedFormat, Format, GridFormat, RoundingFormat
from qlora_export.formats.registry import load_format
from qlora_export.merge.merged_model import MergedModel
from qlora_export.merge.trained_quantization import TrainingFacts
from qlora_export.recipe.config import ArtifactRecipe, Recipe
from qlora_export.sources.weights import FourBitWeight
from qlora_export.types import Rounding

CALIBRATED: tuple[Rounding, ...] = ("calibrated", "tuned")
SEE = "see docs/rounding.md for what rounds which format, or leave `rounding` out"
ADD_TEXT = "add `calibration: {text: FILE}`: what the model will be used for, none of it in drift.text"


def usual_rounding(recipe: Recipe, item: ArtifactRecipe, facts: TrainingFacts, model: MergedModel) -> Rounding:
    """The rounding that is stated; else dithering where it is possible, and nearest."""
    if item.rounding is not None:
        return item.rounding
    form = load_format(item.format, facts.live, item.options)
    if isinstance(form, CorrectedFormat):
        return "calibrated"
    knows = isinstance(form, RoundingFormat) and "dithered" in form.roundings
    return "dithered" if knows and undithered(recipe, item, facts, model) is None else "nearest"


def rounding_problems(recipe: Recipe, facts: TrainingFacts, model: MergedModel) -> list[Problem]:
    """Roundings that a format does not have, or not here."""
    problems = []
    for item in recipe.artifacts:
        if (found := _obstacle(recipe, item, facts, model)) is not None:
            message, hint = found
            problems.append(Problem(ExitCode.USAGE, f"artifact {item.name}: {message}", hint))
    return problems


def _obstacle(recipe: Recipe, item: ArtifactRecipe, facts: TrainingFacts, model: MergedModel) -> tuple[str, str] | None:
    if item.format in catalog.EXPORTERS:
        return _unexported(item)
    try:
        form = load_format(item.format, facts.live, item.options)
    except UsageError:
        form = None  # the options are told elsewhere
    if isinstance(form, CorrectedFormat):
        return _uncorrected(recipe, item)
    if form is None or item.rounding is None:
        return None
    if not form.quantises or form.consumes == "base":
        return f"{item.format} rounds no merged weight to a grid, so there is nothing to be {item.rounding}", SEE
    if item.rounding in CALIBRATED:
        return _uncalibrated(recipe, item, form)
    if item.rounding == "nearest":
        return None
    if not isinstance(form, RoundingFormat) or item.rounding not in form.roundings:
        hint = SEE
        if item.rounding == "dithered":
            hint = "dithering is for a base that sits on the grid already: `format: nf4`; other grids need none"
        return f"{item.format} is not rounded {item.rounding}", hint
    return undithered(recipe, item, facts, model) if item.rounding == "dithered" else None


def _unexported(item: ArtifactRecipe) -> tuple[str, str] | None:
    """What keeps an exporter from this rounding or these options, and a hint."""
    try:
        load_exporter(item.format, item.options, item.rounding)
    except UsageError as error:
        return error.message, error.hint
    return None


def undithered(
    recipe: Recipe, item: ArtifactRecipe, facts: TrainingFacts, model: MergedModel
) -> tuple[str, str] | None:
    """What keeps a format that can dither from it, and a hint."""
    training = facts.live
    if not recipe.adapters:
        return "without an adapter there is no delta to dither", "leave `rounding` out: nearest is exact enough"
    if training.quant_type != "nf4":
        hint = "dithering keeps a delta on the grid that the base was trained on; leave `rounding` out"
        return f"dithering is onto a base trained in nf4, training had {training.quant_type}", hint
    if recipe.onto(item) == "original":
        hint = "merged onto the original, nearest has no dead zone: leave `rounding` out, or `onto: as-trained`"
        return "dithering is merged onto the base as it was trained, this is merged onto the original", hint
    found = facts.stored.quantization
    for output in model.outputs.values():
        source = output.source
        if output.spec.module in facts.encodable and isinstance(source, FourBitWeight):
            have = (source.storage, source.block, source.offset is not None)
            if have != ("nf4", found.block_size, found.double_quant):
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


def _uncalibrated(recipe: Recipe, item: ArtifactRecipe, form: Format) -> tuple[str, str] | None:
    """What keeps a format from being calibrated, and a hint."""
    if not isinstance(form, GridFormat):
        return f"{item.format} cannot be {item.rounding}: it tells no grid", SEE
    if recipe.calibration is None:
        return f"{item.rounding} needs a text to calibrate on", ADD_TEXT
    return None
