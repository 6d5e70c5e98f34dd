"""Checking a folder that no recipe of ours made, against the model that it should be.

    qlora-export check ARTIFACT --against MODEL[+ADAPTER] --text FILE

The reference is MODEL as transformers loads it, or the live adapter on MODEL as it was quantised in training. What is
checked is opened as its consumers would: a folder of transformers, of ONNX Runtime GenAI, a PEFT adapter on its base,
or an artifact of ours. Tokens are the reference's, and the candidate's tokenizer must be the same. There is no
survival, since nothing is known of how the weights came about, and nothing is published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_export.artifact import Artifact
from qlora_export.drift.onnx.artifacts import look_over
from qlora_export.drift.reference import require_reference
from qlora_export.drift.tokenizers import require_same_tokenizer
from qlora_export.errors import InputError, UsageError
from qlora_export.pipeline.measure import Candidate, Evaluation, ledger_of, texts_of
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.reference_model import ReferenceModel, require_row, trained_model
from qlora_export.planning.make import make_plan
from qlora_export.recipe.config import DriftRecipe, Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.report.run import Checked, Run, RunFacts
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.detect import CONFIG, detect_artifact
from qlora_export.runtimes.registry import load_runtime
from qlora_export.sources.adapter import adapter_config
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint, read_json
from qlora_export.sources.locate import fetch_small_files, fetch_weights, hub_id, local_folder
from qlora_export.sources.model_config import is_classifier, label_names
from qlora_export.sources.text import DriftText

if TYPE_CHECKING:
    from qlora_export.runtimes.tokenizer import FolderTokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
BASE_HINT = "name the base that the adapter was trained on: --base FOLDER"


@dataclass(frozen=True)
class CheckRequest:
    """What is checked against what: folders or Hub ids.

    `base` is that of a candidate which is an adapter, `training` how a base was quantised where no sidecar tells.
    """

    artifact: str
    against: str
    base: str | None = None
    training: str | None = None


def check_against(
    request: CheckRequest, drift: Mapping[str, Any], settings: Sequence[str], options: RunOptions
) -> Checked:
    """Measure one folder and judge it; `drift` is a recipe's section of that name, `settings` are KEY=VALUE of it.

    Raises InputError for a folder that does not load, or whose tokenizer is another one.
    """
    artifact = detect_artifact(_folder(request.artifact))
    look_over(artifact)
    base, adapter = _parts(request.against)
    recipe = _recipe(_folder(base), adapter, request.training, artifact.name, drift, settings)
    model = _model(recipe, options.out)
    texts, tokenizer = texts_of(recipe), model.tokenizer()
    notes = _require_same_tokenizer(artifact, tokenizer, texts.drift)
    protocol = model.protocol(recipe.drift)
    texts.require_measurable(protocol)
    notes += _require_same_labels(artifact, protocol.labels)
    tokens = model.tokens(texts.drift, tokenizer, recipe.drift)
    asked = Evaluation(tokens, model.probes(texts.asked, tokenizer), tokenizer.decode)
    _require_rows(artifact, asked)
    candidate = Candidate(artifact, recipe.artifacts[0], partial(_opening, artifact, model, request, options))
    ledger = ledger_of(model, [candidate], asked, recipe, options)
    return Checked(_facts(model, recipe.drift, notes), (artifact,), ledger)


def _facts(model: ReferenceModel, drift: DriftRecipe | None, notes: Sequence[str]) -> RunFacts:
    """What the report says of the reference."""
    if model.plan is None:
        return RunFacts(None, "the model itself", "the model", None, drift, tuple(notes))
    assumptions = (*model.plan.assumptions, *notes)
    facts = Run(model.plan).facts
    return replace(facts, recipe_digest=None, drift=drift, assumptions=assumptions, rounded=frozenset())


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


def _model(recipe: Recipe, out: Path) -> ReferenceModel:
    if not recipe.adapters:
        return ReferenceModel(open_checkpoint(Path(recipe.base)))
    plan = make_plan(recipe, out)
    require_reference(plan)
    return trained_model(plan)


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


def _require_rows(candidate: Artifact, asked: Evaluation) -> None:
    """Raise InputError for a candidate of transformers whose embedding lacks rows for tokens of the reference."""
    if candidate.runtime != "transformers":
        return
    config = Checkpoint(candidate.path, read_json(candidate.path / "config.json"), {}, ()).text_config
    highest = max(asked.probes.highest_token, asked.tokens.highest_token)
    require_row(highest, config.get("vocab_size"), candidate.path, "both must share one vocabulary")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


@contextmanager
def _opening(
    candidate: Artifact, model: ReferenceModel, request: CheckRequest, options: RunOptions
) -> Iterator[Session]:
    """The candidate in its runtime."""
    if candidate.runtime != "as-trained":
        with load_runtime(candidate.runtime).open(candidate.path, options.device) as session:
            yield session
        return
    base = _base_of(candidate, model, request)
    recipe = _recipe(base, str(candidate.path), request.training, candidate.name, {"text": ""}, ())
    plan = make_plan(recipe, options.out)
    if plan.adapter is None:
        raise UsageError(f"{candidate.path}: no adapter", BASE_HINT)
    with trained_model(plan).open(options.device) as session:
        yield session


def _base_of(candidate: Artifact, model: ReferenceModel, request: CheckRequest) -> Path:
    """The base that an adapter is opened on: as stated, else that of the reference's adapter, else as it names it."""
    if request.base is not None:
        return _folder(request.base)
    if model.plan is not None:
        return model.checkpoint.folder
    stated = adapter_config(candidate.path).get("base_model_name_or_path")
    if not isinstance(stated, str) or not stated:
        raise UsageError(f"{candidate.path}: an adapter that names no base", BASE_HINT)
    if hub_id(stated, Path()) is None and not Path(stated).is_dir():
        raise UsageError(f"{candidate.path}: trained on {stated!r}, which is not there", BASE_HINT)
    return _folder(stated)
