"""The ledger: every model measured on the same tokens, compared with the one that was trained.

Rows: the model without the adapter, the merged model in 16 bits, and each artifact in its own runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from qlora_export.artifact import Artifact
from qlora_export.drift.distribution import Distribution, distribution_of
from qlora_export.drift.gate import failed_by, judge, verify
from qlora_export.drift.generation import Generation
from qlora_export.drift.layers import KeptLayer, summarised
from qlora_export.drift.multiple_choice import Choices
from qlora_export.drift.onnx.variants import GraphFindings
from qlora_export.drift.probes import NO_ANSWERS, Answers
from qlora_export.drift.results import Drift, Measurement, Sample, Verdict, Verified
from qlora_export.drift.statistics import Beside, beside, compare, sample_of
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.trace import Trace
from qlora_export.drift.worst_tokens import Worst
from qlora_export.recipe.config import ArtifactRecipe, Limits

NO_YARDSTICKS: Mapping[str, Measurement] = MappingProxyType({})


@dataclass(frozen=True)
class Findings:
    """What an artifact showed beside its means; None for what was not looked for.

    `beside` compares it with the artifact that its limits name, `steps` with what it was made from.
    """

    distribution: Distribution
    beside: Beside | None = None
    steps: tuple[Beside, ...] = ()
    worst: Worst | None = None
    choices: Choices | None = None
    labels: Choices | None = None
    generation: Generation | None = None
    trace: Trace | None = None
    onnx: GraphFindings | None = None


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
    findings: Findings

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
    noise: Noise | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class References:
    """What every artifact is compared with: the tuned model, and where there is an adapter, the model without it.

    `noise` is the tuned model in the dtype of 16-bit serving, on the first windows.
    """

    tuned: Measurement
    base: Measurement | None = None
    merged: Measurement | None = None
    noise: Measurement | None = None


@dataclass(frozen=True)
class Noise:
    """The reference against itself in another dtype: drift below it is that of any 16-bit server, not of weights."""

    dtype: str
    tokens: int
    mean_kl: float
    same_top1: float


@dataclass(frozen=True)
class Measured:
    """An artifact, what it measured, and its layers; those are none when its weights cannot be read back.

    An export also names the artifact that it was made from.
    """

    artifact: Artifact
    recipe: ArtifactRecipe
    measurement: Measurement
    layers: Sequence[KeptLayer]
    worst: Worst | None = None
    answers: Answers = NO_ANSWERS
    labels: Choices | None = None
    onnx: GraphFindings | None = None
    source: str | None = None


def enter(
    found: Measured,
    references: References,
    limits: Limits,
    tokens: TokenSet,
    yardsticks: Mapping[str, Measurement] = NO_YARDSTICKS,
) -> Entry:
    """Judge one measured artifact; `yardsticks` are measurements of the artifacts by name."""
    measured, limits = found.measurement, _applicable(limits, found, references)
    drift = compare(measured, references.tuned, references.base or references.tuned, tokens)
    drift = summarised(drift, found.layers)
    findings = _findings(found, references, limits, tokens, yardsticks)
    verdict = judge(drift, limits, tokens.count, measured.nonfinite, findings.beside, tokens.unit)
    if found.onnx is not None:
        verdict = failed_by(verdict, found.onnx.breaches)
    # A folder without a manifest of ours is measured, and never published.
    passes = verdict.outcome == "pass" and found.artifact.manifest_sha256
    return Entry(
        artifact=found.artifact,
        recipe=found.recipe,
        runtime=measured.runtime,
        drift=drift,
        layers=tuple(found.layers),
        limits=limits,
        verdict=verdict,
        verified=verify(found.artifact, verdict, drift) if passes else None,
        sample=sample_of(measured, references.tuned, tokens),
        findings=findings,
    )


def _applicable(limits: Limits, found: Measured, references: References) -> Limits:
    """The limits without those on what cannot be known: of layers, unless stated, and of a model without a base."""
    if not found.layers and found.recipe.limits.survival_min is None:
        limits = limits.model_copy(update={"survival_min": None})
    return limits if references.base is not None else limits.model_copy(update={"gain_kept": None})


def _findings(
    found: Measured,
    references: References,
    limits: Limits,
    tokens: TokenSet,
    yardsticks: Mapping[str, Measurement],
) -> Findings:
    wanted = limits.no_worse_than.artifact if limits.no_worse_than else found.artifact.name
    yardstick = yardsticks.get(wanted) if wanted != found.artifact.name else None
    return Findings(
        distribution_of(found.measurement, references.tuned, tokens),
        beside=beside(found.measurement, yardstick, tokens) if yardstick is not None else None,
        steps=_steps(found, references, tokens, yardsticks),
        worst=found.worst,
        choices=found.answers.choices,
        labels=found.labels,
        generation=found.answers.generation,
        onnx=found.onnx,
    )


def _steps(
    found: Measured, references: References, tokens: TokenSet, yardsticks: Mapping[str, Measurement]
) -> tuple[Beside, ...]:
    """What came after merging in 16 bits, and of an export what came after its source."""
    before = (references.merged, yardsticks.get(found.source) if found.source else None)
    return tuple(beside(found.measurement, item, tokens) for item in before if item is not None)


def make_ledger(tokens: TokenSet, references: References, entries: tuple[Entry, ...], device: str = "cpu") -> Ledger:
    """The whole ledger."""
    tuned, base = references.tuned, references.base

    def drift(measured: Measurement | None) -> Drift | None:
        return compare(measured, tuned, base or tuned, tokens) if measured else None

    reference = compare(tuned, tuned, base or tuned, tokens)
    return Ledger(tokens, reference, drift(base), drift(references.merged), entries, _noise(references), device)


def _noise(references: References) -> Noise | None:
    found = references.noise
    if found is None:
        return None
    count = len(found.kl)
    same = float((found.top1 == references.tuned.top1[:count]).mean())
    return Noise(found.name, count, float(found.kl.mean()), same)
