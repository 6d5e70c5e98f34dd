"""Checking a folder that no recipe of ours made, against the model that it should be.

    qlora-export check ARTIFACT --against MODEL[+ADAPTER] --text FILE

The reference is MODEL as transformers loads it, or the live adapter on MODEL as it was quantised in training. What is
checked is opened as its consumers would: a folder of transformers, of ONNX Runtime GenAI, a PEFT adapter on its base,
or an artifact of ours. Tokens are the reference's, and the candidate's tokenizer must be the same. There is no
survival, since nothing is known of how the weights came about, and nothing is published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_export.artifact import Artifact
from qlora_export.drift.label_answers import compare_labels
from qlora_export.drift.ledger import Measured, References, make_ledger
from qlora_export.drift.measure import measure
from qlora_export.drift.onnx.artifacts import look_over, validated
from qlora_export.drift.probes import Probes, ProbeTexts, ask
from qlora_export.drift.protocols import token_set
from qlora_export.drift.reference import require_reference
from qlora_export.drift.reference_store import Reference, open_reference
from qlora_export.drift.tokenizers import require_same_tokenizer
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.trace_run import Models, traced_entries
from qlora_export.drift.window_sizes import SizedProtocol, protocol_for
from qlora_export.drift.worst_tokens import worst_of
from qlora_export.errors import InputError, UsageError
from qlora_export.pipeline.measure import (
    drift_text,
    judged,
    measure_folder,
    measure_references,
    model_key,
    open_trained,
    probe_texts,
    reference_key,
    reference_store,
    require_measurable,
    require_row,
)
from qlora_export.pipeline.options import RunOptions
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import DriftRecipe, Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.report.run import Checked, Run, RunFacts
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.detect import CONFIG, recognised
from qlora_export.sources.adapter import adapter_config
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint, read_json
from qlora_export.sources.locate import fetch_small_files, fetch_weights, hub_id, local_folder
from qlora_export.sources.model_config import context_tokens, is_classifier, label_names
from qlora_export.sources.text import DriftText

if TYPE_CHECKING:
    from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.runtimes.registry import load_runtime

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
BASE_HINT = "name the base that the adapter was trained on: --base FOLDER"


@dataclass(frozen=True)
class Question:
    """What is checked against what: folders or Hub ids.

    `base` is that of a candidate which is an adapter, `training` how a base was quantised where no sidecar tells.
    """

    artifact: str
    against: str
    base: str | None = None
    training: str | None = None


@dataclass(frozen=True)
class _Model:
    """The model that the candidate should be: as it lies in a folder, or as trained by a plan."""

    checkpoint: Checkpoint
    plan: Plan | None

    @property
    def tokenizer_folder(self) -> Path:
        """That of the adapter where it has a tokenizer, else that of the model."""
        adapter = self.plan.adapter.folder if self.plan and self.plan.adapter else None
        return adapter if adapter and _has_tokenizer(adapter) else self.checkpoint.folder

    @property
    def dense_folder(self) -> Path | None:
        """Where the very weights lie that the candidate should have; None where they are quantised, or an adapter's."""
        config = self.checkpoint.config
        return None if self.plan is not None or config.get("quantization_config") else self.checkpoint.folder

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json as the finished model has it."""
        return self.plan.config if self.plan else self.checkpoint.config

    def protocol(self, drift: DriftRecipe) -> SizedProtocol:
        """The protocol that was asked for."""
        return protocol_for(drift, self.config, context_tokens(self.checkpoint.text_config))

    def tokens(self, text: DriftText, tokenizer: FolderTokenizer, drift: DriftRecipe) -> TokenSet:
        """The tokens of the text by the protocol that was asked for."""
        found = token_set(text, tokenizer, self.protocol(drift), drift.tokens)
        self._require_row(found.highest_token)
        return found

    def probes(self, texts: ProbeTexts, tokenizer: FolderTokenizer) -> Probes:
        """The questions and prompts that were asked for."""
        found = texts.tokens(tokenizer, context_tokens(self.checkpoint.text_config))
        self._require_row(found.highest_token)
        return found

    def _require_row(self, highest: int) -> None:
        rows = self.checkpoint.text_config.get("vocab_size")
        if self.plan is not None:
            rows = self.plan.model.settings.get("vocab_size", rows)
        require_row(highest, rows, self.checkpoint.folder)

    def key(self, options: RunOptions) -> dict[str, Any]:
        """What decides its numbers."""
        if self.plan is not None:
            return reference_key(self.plan, options.workers, options.device)
        return model_key(self.checkpoint, options.workers, options.device)

    def measure(self, kept: Reference, probes: Probes, options: RunOptions) -> References:
        """Run it, unless that was done before."""
        if self.plan is not None:
            return measure_references(self.plan, kept, options.track, probes, options.device)
        return measure_folder(self.checkpoint.folder, kept, options.track, probes, options.device)

    def open(self, device: str) -> AbstractContextManager[Session]:
        """Load it."""
        if self.plan is not None:
            return open_trained(self.plan, device)
        return load_runtime("transformers").open(self.checkpoint.folder, device)

    def facts(self, drift: DriftRecipe | None, notes: Sequence[str]) -> RunFacts:
        """What the report says of it."""
        if self.plan is None:
            return RunFacts(None, "the model itself", "the model", None, drift, tuple(notes))
        assumptions = (*self.plan.assumptions, *notes)
        facts = Run(self.plan).facts
        return replace(facts, recipe_digest=None, drift=drift, assumptions=assumptions, rounded=frozenset())


def check_against(
    question: Question, drift: Mapping[str, Any], settings: Sequence[str], options: RunOptions
) -> Checked:
    """Measure one folder and judge it; `drift` is a recipe's section of that name, `settings` are KEY=VALUE of it.

    Raises InputError for a folder that does not load, or whose tokenizer is another one.
    """
    from qlora_export.runtimes.tokenizer import FolderTokenizer

    candidate = recognised(_folder(question.artifact))
    look_over(candidate)
    base, adapter = _parts(question.against)
    recipe = _recipe(_folder(base), adapter, question.training, candidate.name, drift, settings)
    model = _model(recipe, options.out)
    text, asked = drift_text(recipe), probe_texts(recipe)
    tokenizer = FolderTokenizer(model.tokenizer_folder)
    notes = _require_same_tokenizer(candidate, tokenizer, text)
    stated = recipe.drift or DriftRecipe(text="")
    protocol = model.protocol(stated)
    require_measurable(protocol, text, asked)
    notes += _require_same_labels(candidate, protocol.labels)
    tokens = model.tokens(text, tokenizer, stated)
    probes = model.probes(asked, tokenizer)
    _require_rows(candidate, tokens, probes)
    opening = partial(_opening, candidate, model, question, options)
    key = {**model.key(options), **probes.key}
    with open_reference(reference_store(recipe, options.out), key, tokens) as kept:
        references = model.measure(kept, probes, options)
        with opening() as session:
            with options.track(f"measure {candidate.name}") as progress:
                measured = measure(candidate.name, str(candidate.manifest["runtime"]), session, kept.rows, progress)
            answers = ask(session, probes, kept.columns, tokenizer.decode, options.track)
    compared = (measured, references.tuned, tokens, tokenizer.decode)
    worst, labels = worst_of(*compared), compare_labels(*compared)
    onnx = validated(candidate, tokens, options.track, model.dense_folder)
    found = Measured(candidate, recipe.artifacts[0], measured, (), worst, answers, labels, onnx)
    models = Models(partial(model.open, options.device), lambda entry: opening())
    entries = judged(recipe, [found], references, tokens)
    entries = traced_entries(entries, tokens, stated.trace, models, options.out, options.track)
    ledger = make_ledger(tokens, references, entries, options.device)
    return Checked(model.facts(recipe.drift, notes), (candidate,), ledger)


def _folder(text: str) -> Path:
    """A folder, or the snapshot of a Hub id, downloaded whole."""
    remote = hub_id(text, Path())
    if remote is None:
        return local_folder(text, Path())
    return fetch_weights(remote[0], fetch_small_files(*remote).name)


def _parts(against: str) -> tuple[str, str | None]:
    """MODEL, or MODEL and ADAPTER; raises UsageError where a part is empty."""
    if Path(against).exists():
        return against, None
    model, plus, adapter = against.partition("+")
    while plus and not Path(model).exists() and "+" in adapter:
        more, _, adapter = adapter.partition("+")
        model = f"{model}+{more}"
    if not model or (plus and not adapter):
        raise UsageError(f"--against {against!r} names no model", "as in --against MODEL or --against BASE+ADAPTER")
    return model, adapter or None


def _recipe(
    base: Path, adapter: str | None, training: str | None, name: str, drift: Mapping[str, Any], settings: Sequence[str]
) -> Recipe:
    """The check as a recipe, which is never built."""
    data: dict[str, Any] = {"base": str(base.absolute()), "drift": dict(drift)}
    # An artifact that needs no room: what is checked is there already.
    data["artifacts"] = [{"format": "adapter" if adapter else "bf16", "name": name}]
    if adapter is not None:
        data["adapter"] = adapter
    if training is not None:
        data["training_quantization"] = training
    return make_recipe(data, Path(), "flags", settings)


def _model(recipe: Recipe, out: Path) -> _Model:
    if not recipe.adapters:
        return _Model(open_checkpoint(Path(recipe.base)), None)
    plan = make_plan(recipe, out)
    require_reference(plan)
    return _Model(plan.checkpoint, plan)


def _require_same_tokenizer(candidate: Artifact, reference: FolderTokenizer, text: DriftText) -> list[str]:
    """What is to be said of a candidate's tokenizer; raises InputError for one that is not the reference's."""
    from qlora_export.runtimes.tokenizer import FolderTokenizer

    if not _has_tokenizer(candidate.path):
        inside = "has its tokenizer inside, which is not compared" if candidate.path.is_file() else "ships no tokenizer"
        return [f"{candidate.name} {inside}: tokens are those of the reference"]
    require_same_tokenizer(str(candidate.path), FolderTokenizer(candidate.path), reference, text)
    return []


def _require_same_labels(candidate: Artifact, labels: tuple[str, ...]) -> list[str]:
    """What is to be said of a candidate's labels; raises InputError for another kind of model, or number of labels."""
    place = candidate.path / CONFIG
    if not place.is_file():
        return []
    config = read_json(place)
    if is_classifier(config) != bool(labels):
        ours, theirs = ("classifier", "language model") if labels else ("language model", "classifier")
        raise InputError(f"{candidate.path}: a {theirs}, and the reference is a {ours}", "both must be of one kind")
    named = label_names(config) if labels else ()
    if len(named) != len(labels):
        raise InputError(f"{place}: {len(named)} labels, the reference has {len(labels)}", "both must share them")
    return [] if named == labels else [f"{candidate.name} names its labels otherwise: {', '.join(named)}"]


def _require_rows(candidate: Artifact, tokens: TokenSet, probes: Probes) -> None:
    """Raise InputError for a candidate of transformers whose embedding lacks rows for tokens of the reference."""
    if candidate.manifest["runtime"] != "transformers":
        return
    config = Checkpoint(candidate.path, read_json(candidate.path / "config.json"), {}, ()).text_config
    highest = max(probes.highest_token, tokens.highest_token)
    require_row(highest, config.get("vocab_size"), candidate.path, "both must share one vocabulary")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


@contextmanager
def _opening(candidate: Artifact, model: _Model, question: Question, options: RunOptions) -> Iterator[Session]:
    """The candidate in its runtime."""
    runtime = str(candidate.manifest["runtime"])
    if runtime != "as-trained":
        with load_runtime(runtime).open(candidate.path, options.device) as session:
            yield session
        return
    from qlora_export.runtimes.as_trained import open_as_trained

    base = _base_of(candidate, model, question)
    recipe = _recipe(base, str(candidate.path), question.training, candidate.name, {"text": ""}, ())
    plan = make_plan(recipe, options.out)
    if plan.adapter is None:
        raise UsageError(f"{candidate.path}: no adapter", BASE_HINT)
    rows = plan.model.settings.get("vocab_size")
    yield open_as_trained(plan.checkpoint, plan.adapter, plan.live_training, rows, options.device).tuned()


def _base_of(candidate: Artifact, model: _Model, question: Question) -> Path:
    """The base that an adapter is opened on: as stated, else that of the reference's adapter, else as it names it."""
    if question.base is not None:
        return _folder(question.base)
    if model.plan is not None:
        return model.checkpoint.folder
    stated = adapter_config(candidate.path).get("base_model_name_or_path")
    if not isinstance(stated, str) or not stated:
        raise UsageError(f"{candidate.path}: an adapter that names no base", BASE_HINT)
    if hub_id(stated, Path()) is None and not Path(stated).is_dir():
        raise UsageError(f"{candidate.path}: trained on {stated!r}, which is not there", BASE_HINT)
    return _folder(stated)
