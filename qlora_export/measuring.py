"""Measuring a run: one text for every model, the models that artifacts are compared with, and the artifacts.

The reference is measured once and its distributions kept; every other model is opened alone, so memory holds one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_export import catalog
from qlora_export.contracts import Artifact, Session, Track
from qlora_export.drift.gate import DEFAULT_LIMITS
from qlora_export.drift.ledger import Entry, References, enter
from qlora_export.drift.measure import ReferenceProbabilities, keep_reference, measure, measure_reference
from qlora_export.drift.survival import kept_layers
from qlora_export.drift.tokens import TokenSet, token_set
from qlora_export.errors import InputError, UsageError
from qlora_export.planning import Plan
from qlora_export.recipe import ArtifactRecipe, DriftRecipe, Limits, Recipe
from qlora_export.sources.text import DriftText, read_text


def drift_text(recipe: Recipe) -> DriftText:
    """The text that the recipe measures on; raises UsageError where it names none."""
    if recipe.drift is None:
        raise UsageError("the recipe has no drift.text to measure on", "add `drift: {text: FILE}` or give --text")
    return read_text(recipe.drift.text, recipe.folder)


def drift_tokens(plan: Plan, artifacts: Sequence[Artifact], text: DriftText) -> TokenSet:
    """The tokens that every model of the run is measured on, by the tokenizer that the artifacts ship."""
    from qlora_export.runtimes.loading import FolderTokenizer

    drift = plan.recipe.drift or DriftRecipe(text="")
    tokenizer = FolderTokenizer(_tokenizer_folder(plan, artifacts))
    tokens = token_set(text, tokenizer, drift.window_tokens, drift.tokens)
    require_in_vocabulary([max(window.tokens) for window in tokens.windows], plan)
    return tokens


def _tokenizer_folder(plan: Plan, artifacts: Sequence[Artifact]) -> Path:
    """The first artifact that ships a tokenizer, else the base."""
    shipped = (artifact.path for artifact in artifacts if (artifact.path / "tokenizer_config.json").is_file())
    return next(shipped, plan.checkpoint.folder)


def require_in_vocabulary(highest_of_windows: Sequence[int], plan: Plan) -> None:
    """Raise InputError when the tokenizer knows tokens that the embedding has no row for."""
    rows = plan.model.settings.get("vocab_size", plan.checkpoint.text_config.get("vocab_size"))
    highest = max(highest_of_windows)
    if isinstance(rows, int) and highest >= rows:
        raise InputError(
            f"{plan.checkpoint.folder}: token {highest} of the text has no row in an embedding of {rows}",
            "the adapter's tokenizer has more tokens than the base: was the vocabulary resized in training?",
        )


def measure_references(plan: Plan, store: ReferenceProbabilities, track: Track) -> References:
    """Measure the live model of training with the adapter, without it, and merged."""
    if plan.adapter is None:
        opening = catalog.load_runtime("transformers").open(plan.checkpoint.folder)
        with opening as session, track("measure the model") as progress:
            keep_reference(session, store, progress)
        return References(measure_reference("the model", store))

    from qlora_export.runtimes.as_trained import open_as_trained

    live = open_as_trained(plan.checkpoint, plan.adapter, plan.live_training, plan.model.settings.get("vocab_size"))
    with track("measure as trained") as progress:
        keep_reference(live.tuned(), store, progress)
    with live.base() as session, track("measure the base") as progress:
        base = measure("base", "transformers", session, store, progress)
    with live.merged() as session, track("measure merged") as progress:
        merged = measure("merged", "transformers", session, store, progress)
    return References(measure_reference("as trained", store), base, merged)


def measure_artifact(
    plan: Plan,
    artifact: Artifact,
    recipe: ArtifactRecipe,
    session: Session,
    references: References,
    store: ReferenceProbabilities,
    track: Track,
) -> Entry:
    """Measure and judge an artifact that is open in its runtime."""
    planned = {item.name: item for item in plan.artifacts}
    with track(f"measure {artifact.name}") as progress:
        measured = measure(artifact.name, str(artifact.manifest["runtime"]), session, store, progress)
    kept = kept_layers(plan, planned[artifact.name], artifact) if artifact.name in planned else ()
    limits = recipe.limits.over(limits_of(plan.recipe))
    return enter(artifact, recipe, measured, kept, references, limits, store.tokens)


def limits_of(recipe: Recipe) -> Limits:
    """The limits for every artifact that has none of its own."""
    return recipe.drift.limits.over(DEFAULT_LIMITS) if recipe.drift else DEFAULT_LIMITS
