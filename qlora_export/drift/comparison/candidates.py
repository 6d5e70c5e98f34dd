"""What is compared: FORMAT[:ROUNDING][@ONTO], as in nf4, nf4:calibrated, nf4:nearest@original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

from qlora_export.catalog import ARTIFACTS, EXPORTERS, require_known
from qlora_export.errors import UsageError
from qlora_export.recipe.config import ArtifactRecipe, Limits, Recipe
from qlora_export.types import Onto, Rounding

# Of every width one, and of 4 bits every way there is to round; those after them need a text to calibrate on.
DATA_FREE = (
    "fp32", "bf16", "int8", "w8a16", "fp8",
    "nf4:nearest", "nf4:nearest@original", "nf4:dithered", "w4a16", "nf4-adapter",
)  # fmt: skip
CALIBRATED = ("nf4:calibrated", "w4a16:calibrated")


@dataclass(frozen=True)
class Candidate:
    """A format, how it is rounded, and the merge base; None is the format's usual one, or the recipe's."""

    format: str
    rounding: Rounding | None = None
    onto: Onto | None = None

    @property
    def name(self) -> str:
        """As a folder and a row are called."""
        return "-".join(part for part in (self.format, self.rounding, self.onto) if part)

    def artifact(self, recipe: Recipe) -> ArtifactRecipe:
        """The artifact to make; options and dense layers are those of the recipe where it makes the same format."""
        like = next((item for item in recipe.artifacts if self._is_like(item)), None)
        facts = {"options": like.options, "keep": like.keep, "seed": like.seed} if like else {}
        return ArtifactRecipe(
            format=self.format, name=self.name, rounding=self.rounding, onto=self.onto, limits=Limits(), **facts
        )

    def _is_like(self, item: ArtifactRecipe) -> bool:
        """Whether an artifact's options are this one's: an export of other integers has options of its own."""
        same = (item.rounding is None) == (self.rounding is None)
        return item.format == self.format and (same or self.format not in EXPORTERS)


def candidates(spelled: Sequence[str], recipe: Recipe) -> tuple[Candidate, ...]:
    """The candidates of a list, each once, or of the usual list where it is empty; raises UsageError."""
    usual = DATA_FREE + (CALIBRATED if recipe.calibration is not None else ())
    words = [word.strip() for text in spelled for word in text.split(",") if word.strip()]
    found = [candidate(word) for word in words or usual]
    if not recipe.adapters and not words:
        found = [item for item in found if item.format != "nf4-adapter" and item.rounding != "dithered"]
    return tuple(dict.fromkeys(found))


def candidate(text: str) -> Candidate:
    """One candidate from FORMAT[:ROUNDING][@ONTO]; raises UsageError that names the nearest format."""
    form, at, onto = text.partition("@")
    form, colon, rounding = form.partition(":")
    require_known(ARTIFACTS, "format", form)
    if colon and rounding not in get_args(Rounding):
        raise UsageError(f"{text}: {rounding!r} is no rounding", f"known: {', '.join(get_args(Rounding))}")
    if at and onto not in get_args(Onto):
        raise UsageError(f"{text}: {onto!r} is no merge base", f"known: {', '.join(get_args(Onto))}")
    return Candidate(form, cast("Rounding | None", rounding or None), cast("Onto | None", onto or None))
