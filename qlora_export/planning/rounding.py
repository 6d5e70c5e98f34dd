"""How each artifact is rounded: as the recipe says, but for dithering, which a large delta does not need.

One decision for a whole artifact: where rounding to nearest would keep the delta in the median layer, all layers are
rounded to nearest, else all are dithered (`docs/decisions/023-rounding-without-data.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from qlora_export.errors import UsageError
from qlora_export.formats.base import CorrectedFormat, Format
from qlora_export.merge.merged_model import Output
from qlora_export.planning.inputs import Inputs
from qlora_export.planning.overrides import mixed
from qlora_export.planning.resolve import ResolvedFormat
from qlora_export.planning.rounding_checks import CALIBRATED, usual_rounding
from qlora_export.planning.survival_estimate import Predicted, SurvivalQuery, predict
from qlora_export.sources.weights import FourBitWeight
from qlora_export.types import MergeBase, Rounding

# Nearest on the grid of training is as good as dithering from here on.
SURVIVES = 0.98
# Below this the plan warns, as the gate's usual limit on the lowest layer does.
WARNED = 0.9


@dataclass(frozen=True)
class RoundingChoice:
    """The form that encodes, how it rounds, and what is predicted of it; None where nothing is rounded to a grid.

    `nearest` is what rounding to nearest would keep, where dithering was in question.
    """

    form: Format
    stated: Rounding | None
    chosen: Rounding | None
    seed: int | None = None
    predicted: Predicted | None = None
    nearest: Predicted | None = None

    @property
    def facts(self) -> dict[str, Any] | None:
        """As manifest and report tell it."""
        if self.chosen is None:
            return None
        return {"stated": self.stated, "chosen": self.chosen, "seed": self.seed}

    def base_of(self, output: Output, encoded: bool, onto: MergeBase) -> MergeBase:
        """What a tensor's changes are added to."""
        if self.form.consumes == "base":
            return "stored"
        if self.chosen != "dithered" or not encoded:
            return onto
        return "codes" if isinstance(output.source, FourBitWeight) else "stored"

    def keeps(self, output: Output, encoded: bool) -> bool:
        """Whether a tensor is stored as it will be shipped."""
        stored = output.source.storage in ("nf4", "fp4")
        if self.form.consumes == "base":
            return stored
        return self.chosen == "dithered" and encoded and stored and not output.changes

    def note(self, name: str) -> str | None:
        """What nobody stated."""
        if self.nearest is None:
            return None
        kept = f"rounding to nearest would keep {self.nearest.median:.1%} of the delta in the median layer"
        if self.chosen == "dithered" and self.stated is None:
            return f"{name} is dithered: {kept}"
        if self.chosen == "nearest":
            return f"{name} is rounded to nearest, not dithered: {kept.replace('would keep', 'keeps')}"
        return None

    def warning(self, name: str) -> str | None:
        """That much of the adapter will not survive, and what keeps more of it."""
        found = self.predicted
        if found is None:
            return None
        lowest = found.survival[found.lowest]
        if found.median >= WARNED and lowest + 3 * found.stderr[found.lowest] >= WARNED:
            return None
        dithers = "dithered" in self.form.roundings
        better = "nf4 dithered or calibrated, " if dithers and self.chosen != "dithered" else ""
        return (
            f"{name}: of the adapter's delta about {found.median:.0%} will survive in the median layer and "
            f"{lowest:.0%} in {found.lowest}; {better}nf4-adapter and int8 keep it"
        )


def choose_roundings(inputs: Inputs) -> dict[str, RoundingChoice]:
    """The choice for every artifact that a format makes, by name."""
    asked = [(item, _asked(inputs, item)) for item in inputs.formats]
    questions: dict[str, SurvivalQuery] = {}
    for item, choice in asked:
        questions |= _questions(inputs, item, choice)
    outputs = [output for output in inputs.model.changed.values() if not _from_adapter(inputs, output)]
    answers = predict(questions, outputs, inputs.facts.stored) if questions else {}
    return {item.recipe.name: _chosen(inputs, item, choice, answers) for item, choice in asked}


def _asked(inputs: Inputs, item: ResolvedFormat) -> RoundingChoice:
    form, stated = item.form, item.recipe.rounding
    if not form.quantises or form.consumes == "base":
        return RoundingChoice(form, stated, None)
    rounding = usual_rounding(inputs, item)
    if isinstance(form, CorrectedFormat):
        return RoundingChoice(_corrected(inputs, item, form), stated, rounding)
    modules = inputs.encoded(item) if item.overrides else frozenset()
    names = {module: tuple(sorted(inputs.names.both_names({module}))) for module in sorted(modules)}
    return RoundingChoice(mixed(item, item.rounded(form, rounding), names, rounding), stated, rounding)


def _corrected(inputs: Inputs, item: ResolvedFormat, form: CorrectedFormat) -> Format:
    """The format with a correction for every layer that it encodes and the live model has."""
    found = inputs.names.live_modules(inputs.encoded(item))
    layers = {live: inputs.model.outputs[f"{module}.weight"].layer_spec for live, module in found.items()}
    try:
        return form.corrected(layers)
    except UsageError as error:
        raise UsageError(f"artifact {item.recipe.name}: {error.message}", error.hint) from None


def _questions(inputs: Inputs, item: ResolvedFormat, choice: RoundingChoice) -> dict[str, SurvivalQuery]:
    """About the artifact itself by its name; about nearest in its place, where it may be dithered."""
    if inputs.adapter is None or choice.chosen is None or choice.chosen in CALIBRATED:
        return {}
    name, modules = item.recipe.name, inputs.encoded(item)
    if choice.chosen != "dithered":
        return {name: SurvivalQuery(choice.form, inputs.onto(item.recipe), modules)}
    questions = {_beside(name): SurvivalQuery(item.form, "as-trained", modules)}
    if not _stored_codes(inputs, modules):
        questions[name] = SurvivalQuery(choice.form, "stored", modules)
    return questions


def _chosen(
    inputs: Inputs, item: ResolvedFormat, choice: RoundingChoice, answers: Mapping[str, Predicted]
) -> RoundingChoice:
    name = item.recipe.name
    nearest, predicted = answers.get(_beside(name)), answers.get(name)
    if nearest is not None and nearest.median >= SURVIVES:
        return RoundingChoice(item.form, choice.stated, "nearest", None, nearest, nearest)
    by_chance = choice.chosen == "dithered" and _stored_codes(inputs, inputs.encoded(item))
    return replace(choice, seed=item.recipe.seed if by_chance else None, predicted=predicted, nearest=nearest)


def _beside(name: str) -> str:
    return f"{name} to nearest"


def _stored_codes(inputs: Inputs, modules: AbstractSet[str]) -> bool:
    """Whether a layer that is encoded is stored in 4 bits."""
    outputs = inputs.model.outputs.values()
    return any(output.spec.module in modules and isinstance(output.source, FourBitWeight) for output in outputs)


def _from_adapter(inputs: Inputs, output: Output) -> bool:
    return inputs.checkpoint.weights.get(output.source.spec.name) is not output.source
