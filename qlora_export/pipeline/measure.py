"""Measuring a run: one text for every model, the models that artifacts are compared with, and the artifacts.

The reference is measured once and its distributions kept; every other model is opened alone, so memory holds one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_export.artifact import Artifact
from qlora_export.drift.batches import BATCH_TOKENS
from qlora_export.drift.classification import require_labels
from qlora_export.drift.gate import DEFAULT_LIMITS
from qlora_export.drift.ledger import Entry, Measured, References, enter
from qlora_export.drift.measure import keep_reference, measure, measure_reference
from qlora_export.drift.probes import NO_PROBES, Probes, ProbeTexts, ask_reference, read_probes
from qlora_export.drift.protocols import require_kind, token_set
from qlora_export.drift.reference_store import (
    Columns,
    Reference,
    ReferenceProbabilities,
    ReferenceStore,
    columns_of,
    measurement_in,
)
from qlora_export.drift.results import Measurement
from qlora_export.drift.survival import kept_layers
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.window_sizes import SizedProtocol, protocol_of
from qlora_export.engine.source_digests import SourceDigests
from qlora_export.errors import InputError, UsageError
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import ArtifactRecipe, DriftRecipe, Limits, Recipe
from qlora_export.recipe.protocols import USUAL
from qlora_export.runtimes.base import NarrowableSession, Session
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.sources.model_config import context_tokens
from qlora_export.sources.text import DriftText, read_text
from qlora_export.types import Track

if TYPE_CHECKING:
    from qlora_export.runtimes.as_trained import AsTrained
    from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.runtimes.registry import load_runtime

# What the noise floor is measured in, on about so many tokens.
NOISE_DTYPE = "bfloat16"
NOISE_TOKENS = 512
RESIZED_HINT = "the adapter's tokenizer has more tokens than the base: was the vocabulary resized in training?"


def drift_text(recipe: Recipe) -> DriftText:
    """The text that the recipe measures on; raises UsageError where it names none."""
    if recipe.drift is None:
        raise UsageError("the recipe has no drift.text to measure on", "add `drift: {text: FILE}` or give --text")
    text = read_text(recipe.drift.text, recipe.folder)
    require_kind(text, recipe.drift.protocol or USUAL)
    return text


def require_measurable(protocol: SizedProtocol, text: DriftText, asked: ProbeTexts) -> None:
    """Raise for a classifier whose text has no labels, or that is asked to choose or to go on with a text."""
    if not protocol.labels:
        return
    require_labels(text, protocol.labels)
    for name, found in (("choices", asked.questions), ("prompts", asked.prompts)):
        if found:
            raise UsageError(f"drift.{name} is for language models, and this is a classifier", f"leave {name} out")


def drift_tokens(plan: Plan, artifacts: Sequence[Artifact], text: DriftText) -> TokenSet:
    """The tokens that every model of the run is measured on, by the tokenizer that the artifacts ship."""
    limit = plan.recipe.drift.tokens if plan.recipe.drift else None
    tokens = token_set(text, tokenizer_of(plan, artifacts), protocol_of(plan), limit)
    require_in_vocabulary([tokens.highest_token], plan)
    return tokens


def probe_texts(recipe: Recipe) -> ProbeTexts:
    """What the recipe asks beside its text; raises InputError naming file and line."""
    return read_probes(recipe.drift, recipe.folder) if recipe.drift else ProbeTexts()


def probes_of(plan: Plan, texts: ProbeTexts, tokenizer: FolderTokenizer) -> Probes:
    """The same in tokens; raises InputError for what the model's context does not hold."""
    probes = texts.tokens(tokenizer, context_tokens(plan.checkpoint.text_config))
    require_in_vocabulary([probes.highest_token], plan)
    return probes


def tokenizer_of(plan: Plan, artifacts: Sequence[Artifact]) -> FolderTokenizer:
    """That of the first artifact that ships one, else that of the base."""
    from qlora_export.runtimes.tokenizer import FolderTokenizer

    shipped = (artifact.path for artifact in artifacts if (artifact.path / "tokenizer_config.json").is_file())
    return FolderTokenizer(next(shipped, plan.checkpoint.folder))


def require_in_vocabulary(highest_of_windows: Sequence[int], plan: Plan) -> None:
    """Raise InputError when the tokenizer knows tokens that the embedding has no row for."""
    rows = plan.model.settings.get("vocab_size", plan.checkpoint.text_config.get("vocab_size"))
    require_row(max(highest_of_windows), rows, plan.checkpoint.folder)


def require_row(highest: int, rows: Any, folder: Path, hint: str = RESIZED_HINT) -> None:
    """Raise InputError when an embedding with so many rows has none for a token of the text."""
    if isinstance(rows, int) and highest >= rows:
        raise InputError(f"{folder}: token {highest} of the text has no row in an embedding of {rows}", hint)


def reference_store(recipe: Recipe, out: Path) -> ReferenceStore:
    """Where references of this run folder are kept."""
    return ReferenceStore(out, (recipe.drift or DriftRecipe(text="")).reference_bytes)


def reference_key(plan: Plan, workers: int, device: str = "cpu") -> dict[str, Any]:
    """Everything that decides the numbers of a plan's references, but for the tokens. Cost: reading the base once."""
    found = model_key(plan.checkpoint, workers, device)
    if plan.adapter is None:
        return found
    return {
        **found,
        "adapter": plan.adapter.sha256,
        "training": hashlib.sha256(repr(plan.live_training).encode()).hexdigest(),
        "vocabulary": plan.model.settings.get("vocab_size"),
    }


def model_key(checkpoint: Checkpoint, workers: int, device: str = "cpu") -> dict[str, Any]:
    """Everything that decides the numbers of a model on its own, but for the tokens."""
    digests = SourceDigests(checkpoint.files)
    digests.hash_all([path.name for path in digests.paths], workers)
    # The second says which tokens end what the model writes.
    configs = [checkpoint.folder / name for name in ("config.json", "generation_config.json")]
    return {
        "base": {name: facts["sha256"] for name, facts in digests.sorted().items()},
        "config": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in configs if path.is_file()},
        **computing(device),
    }


def computing(device: str) -> dict[str, Any]:
    """What a number depends on beside models and tokens: dtype, device, threads, batches, versions."""
    import torch

    versions = {name: version(name) for name in ("qlora-export", "torch", "transformers", "peft", "bitsandbytes")}
    return {
        "dtype": "float32",
        "device": device if device == "cpu" else f"{device}: {torch.cuda.get_device_name(device)}",
        "threads": torch.get_num_threads(),
        "batch_tokens": BATCH_TOKENS,
        "versions": versions,
    }


def measure_references(
    plan: Plan, reference: Reference, track: Track, probes: Probes = NO_PROBES, device: str = "cpu"
) -> References:
    """Measure the live model of training with the adapter, without it, and merged; nothing that was kept before."""
    if plan.adapter is None:
        return measure_folder(plan.checkpoint.folder, reference, track, probes, device)
    if not reference.known:
        reference.keep(_with_adapter(_live(plan, device), reference.rows, track, probes))
    return _references(reference)


def measure_folder(
    folder: Path, reference: Reference, track: Track, probes: Probes = NO_PROBES, device: str = "cpu"
) -> References:
    """Measure a model as transformers loads it; nothing that was kept before."""
    if not reference.known:
        with load_runtime("transformers").open(folder, device) as session:
            found = columns_of(measure_model("the model", session, reference.rows, track))
            reference.keep({**found, **ask_reference(session, probes, track)})
    return _references(reference)


def _references(reference: Reference) -> References:
    found = {key: measurement_in(reference.columns, key) for key in ("tuned", "base", "merged", "noise")}
    tuned = found.pop("tuned")
    if tuned is None:
        raise InputError(f"{reference.rows.name}: holds no reference", "remove its folder, and run again")
    return References(tuned, **found)


@contextmanager
def open_trained(plan: Plan, device: str = "cpu") -> Iterator[Session]:
    """The model that every artifact of a plan is compared with, on a device."""
    if plan.adapter is None:
        with load_runtime("transformers").open(plan.checkpoint.folder, device) as session:
            yield session
    else:
        yield _live(plan, device).tuned()


def _live(plan: Plan, device: str) -> AsTrained:
    from qlora_export.runtimes.as_trained import open_as_trained

    if plan.adapter is None:
        raise ValueError("no adapter")
    rows = plan.model.settings.get("vocab_size")
    return open_as_trained(plan.checkpoint, plan.adapter, plan.live_training, rows, device)


def _with_adapter(live: AsTrained, rows: ReferenceProbabilities, track: Track, probes: Probes) -> Columns:
    found = measure_model("as trained", live.tuned(), rows, track)
    asked = ask_reference(live.tuned(), probes, track)
    # A classifier's head is new: without training there is nothing that it says.
    if not rows.tokens.labels:
        with live.base() as session, track("measure the base") as progress:
            found["base"] = measure("base", "transformers", session, rows, progress)
    with live.merged() as session, track("measure merged") as progress:
        found["merged"] = measure("merged", "transformers", session, rows, progress)
    return {**columns_of(found), **asked}


def measure_model(name: str, session: Session, rows: ReferenceProbabilities, track: Track) -> dict[str, Measurement]:
    """Fill the rows with a model of transformers, and measure it against itself in the dtype of 16-bit serving."""
    with track(f"measure {name}") as progress:
        keep_reference(session, rows, progress)
    found = {"tuned": measure_reference(name, "transformers", rows)}
    if isinstance(session, NarrowableSession):
        with track("measure noise") as progress:
            narrowed = session.narrowed(NOISE_DTYPE)
            found["noise"] = measure(NOISE_DTYPE, "transformers", narrowed, rows, progress, NOISE_TOKENS)
    return found


def measure_artifact(
    plan: Plan,
    artifact: Artifact,
    recipe: ArtifactRecipe,
    session: Session,
    rows: ReferenceProbabilities,
    track: Track,
) -> Measured:
    """Measure an artifact that is open in its runtime."""
    planned = {item.name: item for item in plan.artifacts}
    with track(f"measure {artifact.name}") as progress:
        measured = measure(artifact.name, str(artifact.manifest["runtime"]), session, rows, progress)
    kept = kept_layers(plan, planned[artifact.name], artifact) if artifact.name in planned else ()
    source = next((item.source_name for item in plan.exports if item.name == artifact.name), None)
    return Measured(artifact, recipe, measured, kept, source=source)


def judged(recipe: Recipe, found: Sequence[Measured], references: References, tokens: TokenSet) -> tuple[Entry, ...]:
    """The entries of a ledger, once everything is measured that limits may speak of."""
    yardsticks = {item.artifact.name: item.measurement for item in found}
    usual = limits_of(recipe)
    return tuple(enter(item, references, item.recipe.limits.over(usual), tokens, yardsticks) for item in found)


def limits_of(recipe: Recipe) -> Limits:
    """The limits for every artifact that has none of its own."""
    return recipe.drift.limits.over(DEFAULT_LIMITS) if recipe.drift else DEFAULT_LIMITS
