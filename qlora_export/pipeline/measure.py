"""Measuring: one text for every model, one order of steps for every candidate, one ledger.

    texts        what the recipe measures on and asks, read once
    Evaluation   the same in tokens, by the tokenizer of the reference
    Candidate    what is measured: an artifact, and what opens it as its consumers would
    ledger_of    the reference, then every candidate alone in memory, then the verdicts, then traces

Release and check of a folder differ in their candidates only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qlora_export.artifact import Artifact
from qlora_export.drift.classification import require_labels
from qlora_export.drift.gate import DEFAULT_LIMITS
from qlora_export.drift.label_answers import compare_labels
from qlora_export.drift.layers import KeptLayer
from qlora_export.drift.ledger import Entry, Ledger, Measured, References, enter, make_ledger
from qlora_export.drift.measure import measure
from qlora_export.drift.onnx.artifacts import validated
from qlora_export.drift.probes import NO_TEXTS, Probes, ProbeTexts, ask, read_probes
from qlora_export.drift.protocols import require_kind
from qlora_export.drift.reference_store import Reference, ReferenceProbabilities, ReferenceStore, open_reference
from qlora_export.drift.results import Measurement
from qlora_export.drift.survival import kept_layers
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.trace_run import Models, traced_entries
from qlora_export.drift.window_sizes import SizedProtocol
from qlora_export.drift.worst_tokens import Decode, worst_of
from qlora_export.errors import UsageError
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.reference_model import ReferenceModel
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import ArtifactRecipe, DriftRecipe, Limits, Recipe
from qlora_export.recipe.protocols import USUAL
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.open import open_artifact
from qlora_export.sources.text import DriftText, read_text
from qlora_export.types import Track


@dataclass(frozen=True)
class Texts:
    """What a recipe measures on, and what it asks beside that."""

    drift: DriftText
    asked: ProbeTexts

    def require_measurable(self, protocol: SizedProtocol) -> None:
        """Raise for a classifier whose text has no labels, or that is asked to choose or to go on with a text."""
        if not protocol.labels:
            return
        require_labels(self.drift, protocol.labels)
        for name, found in (("choices", self.asked.questions), ("prompts", self.asked.prompts)):
            if found:
                raise UsageError(f"drift.{name} is for language models, and this is a classifier", f"leave {name} out")


@dataclass(frozen=True)
class Evaluation:
    """What every model is asked: the tokens of the text, questions and prompts, and what makes text of tokens."""

    tokens: TokenSet
    probes: Probes
    decode: Decode


@dataclass(frozen=True)
class Candidate:
    """An artifact, what the recipe says of it, and what opens it as its consumers would.

    `layers` reads back what survived in them; an export names the artifact that it was made from.
    """

    artifact: Artifact
    recipe: ArtifactRecipe
    open: Callable[[], AbstractContextManager[Session]]
    layers: Callable[[], Sequence[KeptLayer]] = tuple
    source: str | None = None

    def measured(self, session: Session, rows: ReferenceProbabilities, track: Track) -> Measured:
        """What it measures, while it is open, and its layers."""
        with track(f"measure {self.artifact.name}") as progress:
            found = measure(self.artifact.name, self.artifact.runtime, session, rows, progress)
        return Measured(self.artifact, self.recipe, found, self.layers(), source=self.source)


def texts_of(recipe: Recipe, probes: bool = True) -> Texts:
    """What the recipe measures on, without what it asks beside that where `probes` are not wanted.

    Raises UsageError where it names no text, InputError naming file and line.
    """
    if recipe.drift is None:
        raise UsageError("the recipe has no drift.text to measure on", "add `drift: {text: FILE}` or give --text")
    text = read_text(recipe.drift.text, recipe.folder)
    require_kind(text, recipe.drift.protocol or USUAL)
    return Texts(text, read_probes(recipe.drift, recipe.folder) if probes else NO_TEXTS)


def planned_candidate(plan: Plan, artifact: Artifact, recipe: ArtifactRecipe, device: str) -> Candidate:
    """A finished artifact of a plan."""
    planned = next((item for item in plan.artifacts if item.name == artifact.name), None)
    return Candidate(
        artifact,
        recipe,
        open=partial(open_artifact, artifact, plan, device),
        layers=partial(kept_layers, plan, planned, artifact) if planned is not None else tuple,
        source=next((item.source_name for item in plan.exports if item.name == artifact.name), None),
    )


def ledger_of(
    model: ReferenceModel, candidates: Sequence[Candidate], asked: Evaluation, recipe: Recipe, options: RunOptions
) -> Ledger:
    """Measure the reference and every candidate, judge them by the recipe, and trace those that it asks for."""
    tokens = asked.tokens
    key = {**model.key(options), **asked.probes.key}
    with open_reference(reference_store(recipe, options), key, tokens) as kept:
        references = model.measure(kept, asked.probes, options)
        given = (references.tuned, kept, asked, options.track, model.dense_folder)
        measured = [_measured(item, *given) for item in candidates]
    entries = judged(recipe, measured, references, tokens)
    opens = {item.artifact.name: item.open for item in candidates}
    models = Models(partial(model.open, options.device), lambda entry: opens[entry.artifact.name]())
    when = recipe.drift.trace if recipe.drift else "never"
    entries = traced_entries(entries, tokens, when, models, options.out, options.track)
    return make_ledger(tokens, references, entries, options.device)


def _measured(
    item: Candidate, tuned: Measurement, kept: Reference, asked: Evaluation, track: Track, dense: Path | None
) -> Measured:
    """One candidate: its drift and answers while it is open, then where it is worst, its labels and its graph."""
    with item.open() as session:
        found = item.measured(session, kept.rows, track)
        answers = ask(session, asked.probes, kept.columns, asked.decode, track)
    compared = (found.measurement, tuned, asked.tokens, asked.decode)
    onnx = validated(item.artifact, asked.tokens, track, dense)
    return replace(found, worst=worst_of(*compared), answers=answers, labels=compare_labels(*compared), onnx=onnx)


def reference_store(recipe: Recipe, options: RunOptions) -> ReferenceStore:
    """Where references of this run folder are kept."""
    return ReferenceStore(options.out, (recipe.drift or DriftRecipe(text="")).reference_bytes)


def judged(recipe: Recipe, found: Sequence[Measured], references: References, tokens: TokenSet) -> tuple[Entry, ...]:
    """The entries of a ledger, once everything is measured that limits may speak of."""
    yardsticks = {item.artifact.name: item.measurement for item in found}
    usual = limits_of(recipe)
    return tuple(enter(item, references, item.recipe.limits.over(usual), tokens, yardsticks) for item in found)


def limits_of(recipe: Recipe) -> Limits:
    """The limits for every artifact that has none of its own."""
    return recipe.drift.limits.over(DEFAULT_LIMITS) if recipe.drift else DEFAULT_LIMITS
