"""config.json against the tensors: quantisation, dtype, vocabulary, tying.

What is compared is what a loader does with both: it makes modules from config.json and fills them from the file. The
number of tokens a tokenizer knows is no rule: some models have tokens beyond their embedding (Gemma 3), most have rows
beyond their tokens. Cost: headers, the 4-bit states, and both sides of a tied pair where both are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_export.errors import InputError, Problem, Refused
from qlora_export.merge.module_names import EMBEDDING, HEAD
from qlora_export.publish.lint.contents import Contents
from qlora_export.publish.lint.quantisation import BUILD_AGAIN, quantisation_problems
from qlora_export.publish.lint.rules import finding
from qlora_export.publish.lint.weights import WeightFolder
from qlora_export.sources.weight_parts import weights_of
from qlora_export.sources.weights import FourBitWeight, PlainWeight, Weight
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import FROM_TORCH_NAMES, TORCH_NAMES

OTHER_SENSES = ("vision", "visual", "audio", "image", "encoder")
BLOCK_BYTES = 1 << 21


@dataclass(frozen=True)
class Described:
    """A model's configuration, where it lies, and the weights that it describes."""

    path: str
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]
    tensors: Mapping[str, StoredTensor]

    def stated(self, key: str) -> Any:
        """A setting of the language model; multimodal wrappers hold it in `text_config`."""
        nested = self.config.get("text_config")
        inner = nested.get(key) if isinstance(nested, dict) else None
        return self.config.get(key) if inner is None else inner


def setting_problems(contents: Contents, folder: WeightFolder) -> Iterator[Problem]:
    """Where the config.json of a directory does not describe its tensors."""
    path = f"{folder.directory}config.json"
    config = contents.table(path)
    if config is None or not folder.complete:
        return
    if config.get("auto_map"):
        yield finding("code", path, "names code to load (auto_map)", "remove auto_map; the code is not published")
    try:
        weights = weights_of(folder.tensors, config)
    except (InputError, Refused) as error:
        yield contents.finding("config", path, error)
        return
    model = Described(path, config, weights, folder.tensors)
    yield from quantisation_problems(path, config, weights, folder.tensors)
    yield from _dtype(model)
    yield from _vocabulary(model)
    yield from _tying(model)


def _dtype(model: Described) -> Iterator[Problem]:
    """The stated dtype is that of most dense values, and of every 4-bit weight once it is decoded."""
    named = model.stated("dtype") or model.stated("torch_dtype")
    if not isinstance(named, str) or named not in FROM_TORCH_NAMES:
        return
    dense: Counter[str] = Counter()
    for weight in model.weights.values():
        if isinstance(weight, PlainWeight) and weight.spec.dtype in FLOATS:
            dense[weight.spec.dtype] += weight.spec.size
        elif isinstance(weight, FourBitWeight) and TORCH_NAMES[weight.spec.dtype] != named:
            what = f"says {named}, the 4-bit weight {weight.spec.name} is of {TORCH_NAMES[weight.spec.dtype]}"
            yield finding("config", model.path, what, BUILD_AGAIN)
            return
    if dense and TORCH_NAMES[dense.most_common(1)[0][0]] != named:
        what = f"says {named}, most dense values are {TORCH_NAMES[dense.most_common(1)[0][0]]}"
        yield finding("config", model.path, what, BUILD_AGAIN)


def _vocabulary(model: Described) -> Iterator[Problem]:
    stated = model.stated("vocab_size")
    for pattern in (EMBEDDING, HEAD):
        found = _named(model, pattern)
        if found is not None and stated is not None and found.spec.rows != stated:
            what = f"says vocab_size {stated}, {found.spec.name} has {found.spec.rows} rows"
            yield finding("vocabulary", model.path, what, BUILD_AGAIN)


def _tying(model: Described) -> Iterator[Problem]:
    stated = model.config.get("tie_word_embeddings", model.stated("tie_word_embeddings"))
    embedding, head = _named(model, EMBEDDING), _named(model, HEAD)
    if stated and embedding and head and not _same_bytes(embedding, head):
        what = f"ties the output head to the embedding, the bytes of {head.spec.name} and {embedding.spec.name} differ"
        yield finding("tied-weights", model.path, what, "write tie_word_embeddings: false, or leave the head out")
    alone = embedding and not any(_may_be_head(weight, embedding) for weight in model.weights.values())
    if stated is False and alone and _is_language_model(model.config):
        what = "says that the output head has a weight of its own, and none is stored"
        yield finding("tied-weights", model.path, what, "write tie_word_embeddings: true, or build again")


def _is_language_model(config: Mapping[str, Any]) -> bool:
    stated = config.get("architectures")
    first = stated[0] if isinstance(stated, list) and stated else ""
    return isinstance(first, str) and first.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def _may_be_head(weight: Weight, embedding: Weight) -> bool:
    """Whether a weight is an output head by its name, or could be one of another name by its shape."""
    return bool(HEAD.search(weight.spec.module)) or (weight != embedding and weight.spec.shape == embedding.spec.shape)


def _named(model: Described, pattern: Any) -> Weight | None:
    """The one weight of the language model whose module has such a name; None where there are several."""
    found = [
        weight
        for weight in model.weights.values()
        if weight.spec.name.endswith(".weight")
        and pattern.search(weight.spec.module)
        and not any(word in weight.spec.name for word in OTHER_SENSES)
    ]
    return found[0] if len(found) == 1 else None


def _same_bytes(first: Weight, second: Weight) -> bool:
    """Whether two weights are stored alike, byte for byte."""
    if len(first.stored) != len(second.stored):
        return False
    with SourceFiles() as files:
        return all(_equal(files, one, other) for one, other in zip(first.stored, second.stored, strict=True))


def _equal(files: SourceFiles, first: StoredTensor, second: StoredTensor) -> bool:
    if (first.spec.dtype, first.spec.shape) != (second.spec.dtype, second.spec.shape):
        return False
    counts = ((start, min(BLOCK_BYTES, first.bytes - start)) for start in range(0, first.bytes, BLOCK_BYTES))
    return all(
        files.read_bytes(first, start, count).tobytes() == files.read_bytes(second, start, count).tobytes()
        for start, count in counts
    )
