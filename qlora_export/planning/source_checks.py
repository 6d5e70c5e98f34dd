"""What the headers show to be wrong, before anything is written: every problem, not the first one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from qlora_export.errors import ExitCode, ExportError, Problem
from qlora_export.merge.matching import Match
from qlora_export.merge.merged_model import MergedModel
from qlora_export.merge.module_names import EMBEDDING, LAYER, PLAIN_FAMILIES
from qlora_export.merge.trained_quantization import TrainingFacts
from qlora_export.quant.floats import all_finite
from qlora_export.recipe.config import Merge
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint, read_json
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.reading import SourceFiles

DECODED_METHODS = ("bitsandbytes", "fp8")
NORMED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
FACTOR_NAME = re.compile(r"\.lora_(embedding_)?[AB](\.default)?(\.weight)?$")
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
