"""What the headers show to be wrong, before anything is written: every problem, not the first one."""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from qlora_export import catalog
from qlora_export.errors import ExitCode, ExportError, Problem, UsageError
from qlora_export.formats.base import Format
from qlora_export.formats.registry import load_format
from qlora_export.merge.matching import Match
from qlora_export.merge.merged_model import MergedModel
from qlora_export.merge.module_names import EMBEDDING, LAYER, PLAIN_FAMILIES
from qlora_export.merge.trained_quantization import TrainingFacts
from qlora_export.mixing import mixed, override_problems
from qlora_export.quant.floats import all_finite
from qlora_export.recipe.config import ArtifactRecipe, Merge, Recipe
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint, read_json
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.reading import SourceFiles

SECTOR_BYTES = 512
DECODED_METHODS = ("bitsandbytes", "fp8")
NORMED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
FACTOR_NAME = re.compile(r"\.lora_(embedding_)?[AB](\.default)?(\.weight)?$")
LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")
Source = TypeVar("Source")
Opened = TypeVar("Opened")


def opened(opener: Callable[[Source], Opened], source: Source) -> Opened | Problem:
    """What the opener makes of a source, or the problem that keeps it from that."""
    try:
        return opener(source)
    except ExportError as error:
        return Problem.of(error)


def base_problems(checkpoint: Checkpoint) -> list[Problem]:
    """A base that cannot be merged onto."""
    sections = {"config.json": checkpoint.config, **checkpoint.config}
    problems = []
    for name, section in sections.items():
        stored = section.get("quantization_config") if isinstance(section, dict) else None
        if not stored:
            continue
        how = str(stored.get("quant_method", "an unnamed method") if isinstance(stored, dict) else stored)
        if how not in DECODED_METHODS:
            message = f"{checkpoint.folder}: the base is stored in {how} ({name}), which cannot be merged onto"
            hint = f"give the 16-bit base, or one stored by {' or '.join(DECODED_METHODS)}"
            problems.append(Problem(ExitCode.REFUSED, message, hint))
    return problems + [
        Problem(
            ExitCode.REFUSED,
            f"{weight.stored[0].path}: tensor {weight.spec.name} has dtype {weight.spec.dtype} and no scales",
            "16 and 32-bit floats can be merged, and FP8 with weight_scale_inv",
        )
        for weight in checkpoint.weights.values()
        if weight.spec.dtype[0] == "F" and weight.spec.dtype not in FLOATS
    ]


def shape_problems(checkpoint: Checkpoint, model: MergedModel) -> list[Problem]:
    """Tensors that config.json promises and the base has not, and an embedding of another size than it says."""
    problems = []
    layers: dict[int, set[str]] = {}
    for name in checkpoint.weights:
        if (found := LAYER.match(name)) is not None:
            layers.setdefault(int(found["number"]), set()).add(name[found.end("number") :])
    stated = checkpoint.text_config.get("num_hidden_layers") or checkpoint.config.get("n_layer")
    if layers and isinstance(stated, int):
        problems += [f"layers.{number} has no tensor at all" for number in range(stated) if number not in layers]
        if checkpoint.config.get("model_type") in PLAIN_FAMILIES and not problems:
            every = set.union(*(layers[number] for number in range(stated)))
            problems += [f"layers.{n} has no {part[1:]}" for n in range(stated) for part in sorted(every - layers[n])]
    if checkpoint.config.get("model_type") in NORMED_FAMILIES and "model.norm.weight" not in checkpoint.weights:
        problems.append("there is no model.norm.weight")
    rows = model.settings.get("vocab_size", checkpoint.text_config.get("vocab_size"))
    embeddings = [output.spec for output in model.outputs.values() if EMBEDDING.search(output.spec.module)]
    if isinstance(rows, int) and len(embeddings) == 1 and embeddings[0].shape[0] != rows:
        problems.append(f"{embeddings[0].name} has {embeddings[0].shape[0]} rows, vocab_size is {rows}")
    hint = "the base is incomplete, or config.json is that of another model: fetch it again"
    return [Problem(ExitCode.BAD_INPUT, f"{checkpoint.folder}: {problem}", hint) for problem in problems]


def training_problems(adapter: Adapter, checkpoint: Checkpoint, facts: TrainingFacts) -> list[Problem]:
    """A base that is not the one of the sidecar, or a training that cannot be reproduced."""
    training = facts.live
    problems = []
    if training.provenance != "base" and training.quant_type not in ("nf4", "none"):
        message = f"{adapter.folder}: the base was trained on as {training.quant_type}, which cannot be reproduced"
        problems.append(Problem(ExitCode.REFUSED, message, "nf4 can, and any base that is itself stored that way"))
    if training.base_sha256 not in (None, checkpoint.headers_sha256):
        problems.append(
            Problem(
                ExitCode.BAD_INPUT,
                f"{checkpoint.folder}: names, shapes and dtypes have sha256 {checkpoint.headers_sha256[:12]}, "
                f"the adapter was trained on {str(training.base_sha256)[:12]}",
                "give the base that the adapter was trained on",
            )
        )
    for name in facts.unmatched_skips:
        message = f"--training-quantization: skip={name} matches no linear layer of the base"
        problems.append(Problem(ExitCode.USAGE, message, "see `qlora-export inspect`, or leave it out"))
    missing = [name for name in facts.stored.quantization.modules if f"{name}.weight" not in checkpoint.weights]
    if missing:
        problems.append(
            Problem(
                ExitCode.BAD_INPUT,
                f"{checkpoint.folder}: {len(missing)} modules quantised in training are not in the base, "
                f"the first is {missing[0]}",
                "give the base that the adapter was trained on",
            )
        )
    return problems


@dataclass(frozen=True)
class AdapterValues:
    """What an adapter's file shows: how many values are NaN or infinite by tensor, and factors of zeros."""

    nonfinite: Mapping[str, int]
    zeros: tuple[str, ...]


def read_values(adapter: Adapter) -> AdapterValues:
    """Read every tensor of an adapter."""
    nonfinite: dict[str, int] = {}
    zeros = []
    with SourceFiles() as files:
        for name, tensor in adapter.tensors.items():
            if tensor.spec.dtype not in FLOATS:
                continue
            count, used = 0, False
            for values in files.blocks(tensor):
                finite = all_finite(values.view(np.uint32))
                count += 0 if finite else int((~np.isfinite(values)).sum())
                used = used or bool(values.any())
            if count:
                nonfinite[name] = count
            elif FACTOR_NAME.search(name) and not used:
                zeros.append(name)
    return AdapterValues(nonfinite, tuple(zeros))


def value_problems(adapter: Adapter, values: AdapterValues, merge: Merge) -> list[Problem]:
    """Tensors of the adapter that are NaN or infinite, and factors of zeros, unless those may be kept."""
    hint = "training diverged or the file is damaged; take an earlier checkpoint"
    problems = [
        Problem(
            ExitCode.BAD_INPUT,
            f"{adapter.tensors[name].path}: tensor {name} has {count} values that are NaN or infinite",
            hint,
        )
        for name, count in values.nonfinite.items()
    ]
    if merge.zero_delta == "keep":
        return problems
    hint = "train longer, drop the module, or state merge.zero_delta=keep where training never reached it"
    return problems + [
        Problem(
            ExitCode.REFUSED,
            f"{adapter.tensors[name].path}: tensor {name} is all zero, so nothing was learned there",
            hint,
        )
        for name in values.zeros
    ]


def merge_problems(
    adapter: Adapter, checkpoint: Checkpoint, match: Match, values: AdapterValues, merge: Merge
) -> list[Problem]:
    """Everything that keeps an adapter from being merged onto a base, but for how the base was quantised."""
    problems = [*base_problems(checkpoint), *match.problems, *value_problems(adapter, values, merge)]
    if not match.problems:
        problems += [*vocabulary_problems(adapter, match.model), *shape_problems(checkpoint, match.model)]
    return problems


def place_problems(out: Path, sources: list[Path]) -> list[Problem]:
    """Sources are never written to, so the run folder may not be or lie in one."""
    place = out.absolute().resolve()
    return [
        Problem(ExitCode.USAGE, f"{out}: lies in the source {source}", "choose another --out")
        for source in sources
        if source.resolve() in (place, *place.parents)
    ]


def vocabulary_problems(adapter: Adapter, model: MergedModel) -> list[Problem]:
    """A tokenizer that came with the adapter and knows tokens which the embedding has no row for."""
    path = adapter.folder / "tokenizer.json"
    embeddings = [output.spec for output in model.outputs.values() if EMBEDDING.search(output.spec.module)]
    if not path.is_file() or len(embeddings) != 1:
        return []
    highest, rows = _highest_token(path), embeddings[0].shape[0]
    if highest < rows:
        return []
    message = f"{path}: token {highest} has no row in {embeddings[0].name} of {rows} rows"
    hint = "the vocabulary was resized in training: save the adapter with save_embedding_layers=True"
    return [Problem(ExitCode.BAD_INPUT, message, hint)]


def _highest_token(path: Path) -> int:
    """The highest token id of a tokenizer.json; -1 when it has none that can be read."""
    data = read_json(path)
    model = data.get("model") or {}
    vocabulary = model.get("vocab") or {} if isinstance(model, dict) else {}
    added = data.get("added_tokens") or []
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    return max((number for number in ids if isinstance(number, int)), default=-1)


def artifact_problems(recipe: Recipe, facts: TrainingFacts) -> list[Problem]:
    """What an artifact is told that its format cannot do."""
    problems = []
    training = facts.live
    for artifact in recipe.artifacts:
        if artifact.format in catalog.EXPORTERS:
            if artifact.keep or artifact.overrides:
                problems.append((artifact, f"{artifact.format} is exported whole, nothing can be kept dense"))
            continue
        form = _format(artifact, facts)
        if isinstance(form, UsageError):
            problems.append((artifact, form.message))
            form = load_format(artifact.format, training)
        problems += [(artifact, what) for what in _override_problems(artifact, facts)]
        unmatched = [pattern for pattern in artifact.keep if not fnmatch.filter(facts.encodable, pattern)]
        problems += [(artifact, f"keep {pattern!r} matches no quantised module") for pattern in unmatched]
        if artifact.keep and not form.quantises:
            problems.append((artifact, f"{artifact.format} quantises nothing, so there is nothing to keep"))
        if form.keeps_adapter and not recipe.adapters:
            problems.append((artifact, f"{artifact.format} ships an adapter, the recipe has none"))
        if form.keeps_adapter and training.quant_type != "nf4":
            problems.append((artifact, f"{artifact.format} ships an NF4 base, training had {training.quant_type}"))
        if not recipe.adapters and artifact.onto == "as-trained":
            problems.append((artifact, "there is no training without an adapter"))
        if form.keeps_adapter and (artifact.keep or artifact.onto == "original"):
            problems.append((artifact, f"{artifact.format} ships the base of training as it was"))
    return [
        Problem(
            ExitCode.USAGE, f"artifact {artifact.name}: {message}", "see `keep`, `onto` and `options` of this artifact"
        )
        for artifact, message in problems
    ]


def _format(artifact: ArtifactRecipe, facts: TrainingFacts) -> Format | UsageError:
    """The artifact's format, or what is wrong with its options."""
    try:
        return load_format(artifact.format, facts.live, artifact.options)
    except UsageError as error:
        return error


def _override_problems(artifact: ArtifactRecipe, facts: TrainingFacts) -> list[str]:
    return override_problems(artifact, sorted(encoded_modules(artifact, facts)), facts.live)


def encoded_modules(artifact: ArtifactRecipe, facts: TrainingFacts) -> AbstractSet[str]:
    """The stored linear layers that a quantising format encodes: all that it can but those to keep."""
    kept = {name for pattern in artifact.keep for name in fnmatch.filter(facts.encodable, pattern)}
    return facts.encodable - kept


def layer_problems(recipe: Recipe, facts: TrainingFacts, model: MergedModel) -> list[Problem]:
    """Layers whose shape a format cannot encode and that are not kept dense; layers of all numbers are told at once."""
    problems = []
    for artifact in recipe.artifacts:
        form = _format(artifact, facts) if artifact.format in catalog.FORMATS else None
        if form is None or isinstance(form, UsageError) or not form.quantises:
            continue
        try:
            names = {module: (module,) for module in encoded_modules(artifact, facts)}
            form = mixed(artifact, form, facts.live, names)
        except UsageError:
            continue  # told elsewhere
        if facts.experts and not form.beside_experts:
            message = f"artifact {artifact.name}: transformers does not load {artifact.format} beside dense experts"
            problems.append(Problem(ExitCode.USAGE, message, "fp8, int8, nf4 and bf16 serve a mixture of experts"))
        counts: Counter[tuple[str, str]] = Counter()
        for module in sorted(encoded_modules(artifact, facts)):
            output = model.outputs.get(f"{module}.weight")
            reason = form.obstacle(output.layer_spec, output.transposed) if output is not None else None
            if reason is not None:
                counts[LAYER_NUMBER.sub(".*", module), reason] += 1
        for (name, reason), count in counts.items():
            message = f"artifact {artifact.name}: {artifact.format} cannot hold {name} ({count} layers): {reason}"
            hint = f'keep: ["{name}"] leaves it dense; other formats and options have other limits'
            problems.append(Problem(ExitCode.USAGE, message, hint))
    return problems


def kept_adapter_problems(recipe: Recipe, facts: TrainingFacts, model: MergedModel) -> list[Problem]:
    """An adapter that does not load onto the base as it was: peft does not resize the vocabulary by itself."""
    if "vocab_size" not in model.settings:
        return []
    rows = model.settings["vocab_size"]
    return [
        Problem(
            ExitCode.USAGE,
            f"artifact {item.name}: vocabulary resized to {rows} rows in training, the base to ship has its own",
            "choose a merged format",
        )
        for item in recipe.artifacts
        if item.format in catalog.FORMATS and load_format(item.format, facts.live).keeps_adapter
    ]


def allocated_bytes(folder: Path) -> int:
    """Disk space that the files below a folder hold; 0 when there is none."""
    return sum(path.lstat().st_blocks * SECTOR_BYTES for path in folder.rglob("*"))


def disk_problems(out: Path, sizes: Mapping[str, int], working: int = 0) -> list[Problem]:
    """A problem when the artifacts that are not finished yet, by name and bytes, do not fit the disk.

    `working` bytes come and go while one of them is made.
    """
    needed = working
    for name, size in sizes.items():
        if not (out / name).exists():
            needed += max(0, size - allocated_bytes(out / f"{name}.partial"))
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed <= free:
        return []
    while_working = f", {working} of them while they are made" if working else ""
    message = f"{out}: the artifacts need {needed} bytes{while_working}, the disk has {free} free"
    return [Problem(ExitCode.ENVIRONMENT, message, "free some disk space or choose another --out")]
