"""The ledger: every model measured on the same tokens, compared with the one that was trained.

Rows: the model without the adapter, the merged model in 16 bits, and each artifact in its own runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_export.contracts import Artifact, Drift, Measurement, Sample, Verdict, Verified
from qlora_export.drift.gate import judge, verify
from qlora_export.drift.layers import KeptLayer, summarised
from qlora_export.drift.statistics import compare, sample_of
from qlora_export.drift.tokens import TokenSet
from qlora_export.recipe import ArtifactRecipe, Limits


@dataclass(frozen=True)
class Entry:
    """One artifact's line: how it drifted, layer by layer what survived, and what the gate says."""

    artifact: Artifact
    recipe: ArtifactRecipe
    runtime: str
    drift: Drift
    layers: tuple[KeptLayer, ...]
    limits: Limits
    verdict: Verdict
    verified: Verified | None
    sample: Sample

    @property
    def survival(self) -> Mapping[str, float]:
        """Of the delta, by adapted matrix."""
        return {layer.tensor: layer.survival for layer in self.layers}

    @property
    def as_expected(self) -> bool:
        """Whether the verdict is the one that the recipe expects."""
        return self.verdict.outcome == self.recipe.expect

    @property
    def withheld(self) -> bool:
        """Whether it is not as expected and the recipe says that the others go on without it."""
        return not self.as_expected and self.recipe.on_failure == "withhold"


@dataclass(frozen=True)
class Ledger:
    """All rows on one set of tokens."""

    tokens: TokenSet
    reference: Drift
    base: Drift | None
    merged: Drift | None
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class References:
    """What every artifact is compared with: the tuned model, and where there is an adapter, the model without it."""

    tuned: Measurement
    base: Measurement | None = None
    merged: Measurement | None = None


def enter(
    artifact: Artifact,
    recipe: ArtifactRecipe,
    measured: Measurement,
    layers: Sequence[KeptLayer],
    references: References,
    limits: Limits,
    tokens: TokenSet,
) -> Entry:
    """Judge one measured artifact; `layers` is empty when its weights cannot be read back."""
    drift = compare(measured, references.tuned, references.base or references.tuned, tokens)
    drift = summarised(drift, layers)
    if not layers and recipe.limits.survival_min is None:
        limits = limits.model_copy(update={"survival_min": None})
    if references.base is None:
        limits = limits.model_copy(update={"gain_kept": None})
    verdict = judge(drift, limits, tokens.count, measured.nonfinite)
    verified = verify(artifact, verdict, drift) if verdict.outcome == "pass" else None
    sample = sample_of(measured, references.tuned, tokens)
    return Entry(artifact, recipe, measured.runtime, drift, tuple(layers), limits, verdict, verified, sample)


def make_ledger(tokens: TokenSet, references: References, entries: tuple[Entry, ...]) -> Ledger:
    """The whole ledger."""
    tuned, base = references.tuned, references.base

    def drift(measured: Measurement | None) -> Drift | None:
        return compare(measured, tuned, base or tuned, tokens) if measured else None

    return Ledger(tokens, compare(tuned, tuned, base or tuned, tokens), drift(base), drift(references.merged), entries)
