"""A folder with an ONNX graph, looked at before a runtime opens anything of it.

`genai_config.json` names the graph and promises its inputs and outputs: token ids and attention mask, a key and a value
of the past for each layer that has a cache, logits, and a present for each past. A sequence classifier's has token ids,
attention mask and logits. The graph's own data files must lie beside it, whole (`tensors/external_data.py`). Cost:
parsing the graph, without its data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qlora_export.errors import InputError, Refused
from qlora_export.runtimes.onnx.cached_graph import LOGITS, PAST, POSITIONS, PRESENT, TOKENS_AND_MASK
from qlora_export.runtimes.onnx.described import ADAPTER_FILE, classifier_of
from qlora_export.runtimes.onnx.described import GENAI_CONFIG as CONFIG_NAME
from qlora_export.sources.checkpoint import read_json
from qlora_export.tensors.external_data import EXPORT_AGAIN, is_hostile, outside_tensors, place_of, read_graph

NUMBERS = ("num_key_value_heads", "head_size")
FLOATS = {1: "float32", 10: "float16"}
INT64 = 7


@dataclass(frozen=True)
class GraphFolder:
    """A folder whose graph, `model`, is as its configuration says; `adapter` is a file of its inputs."""

    folder: Path
    graph: Path
    model: Any
    is_classifier: bool
    adapter: Path | None


def open_graph(folder: Path) -> GraphFolder:
    """Look a folder over.

    Raises Refused for what leads out of the folder, and InputError for what is missing, cut short, or no graph of ours.
    """
    classifier = classifier_of(folder)
    decoder = {} if classifier else _decoder(folder)
    graph = _contained(folder, folder / classifier.graph) if classifier else _graph_path(folder, decoder)
    model = read_graph(graph)
    _require_data(folder, graph, model)
    found = _classifier_problems(model.graph) if classifier else _signature_problems(model.graph, decoder)
    if problem := next(found, None):
        raise InputError(f"{graph}: {problem}", "give a folder that the GenAI model builder made, or export it again")
    adapter = folder / ADAPTER_FILE
    adapter_file = _contained(folder, adapter) if os.path.lexists(adapter) else None
    return GraphFolder(folder, graph, model, classifier is not None, adapter_file)


def _decoder(folder: Path) -> Mapping[str, Any]:
    model = read_json(folder / CONFIG_NAME).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    numbers = [decoder.get(name) for name in NUMBERS] if isinstance(decoder, dict) else [None]
    if not isinstance(decoder, dict) or not all(isinstance(number, int) and number > 0 for number in numbers):
        raise InputError(f"{folder / CONFIG_NAME}: has no model.decoder with {' and '.join(NUMBERS)}", EXPORT_AGAIN)
    return decoder


def _graph_path(folder: Path, decoder: Mapping[str, Any]) -> Path:
    """The graph that the configuration names; raises Refused for one outside of the folder."""
    name = decoder.get("filename")
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder / CONFIG_NAME}: names no graph", EXPORT_AGAIN)
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise Refused(f"{folder / CONFIG_NAME}: names {name!a}, which leads out of the folder", EXPORT_AGAIN)
    return _contained(folder, folder / name)


def _contained(folder: Path, path: Path) -> Path:
    """The path; raises Refused for a link out of the folder, but for a Hub cache's own `blobs`."""
    if not path.exists():
        raise InputError(f"{path}: missing", EXPORT_AGAIN)
    root, target = folder.resolve(), path.resolve()
    if not target.is_relative_to(root) and target.parent != root.parent.parent / "blobs":
        raise Refused(f"{path}: leads out of the folder, to {target}", "copy the real file into the folder")
    if not target.is_file():
        raise InputError(f"{path}: is no file", EXPORT_AGAIN)
    return path


def _require_data(folder: Path, graph: Path, model: Any) -> None:
    """Raise for the first tensor outside of the graph whose bytes are not where they should be."""

    def size_of(location: str) -> int | None:
        path = graph.parent / location
        return _contained(folder, path).stat().st_size if path.exists() else None

    for tensor in outside_tensors(model):
        place = place_of(tensor, size_of)
        if isinstance(place, str):
            kind = Refused if is_hostile(tensor) else InputError
            raise kind(f"{graph}: tensor {tensor.name!a} {place}", EXPORT_AGAIN)


def _classifier_problems(graph: Any) -> Iterator[str]:
    """What of a classifier's inputs and outputs is not as they are."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: _type(value) for value in graph.input if value.name not in weights}
    if inputs != dict.fromkeys(TOKENS_AND_MASK, INT64):
        found = ", ".join(map(ascii, sorted(inputs)))
        yield f"has the inputs {found}, a classifier has {' and '.join(TOKENS_AND_MASK)}"
    if [value.name for value in graph.output] != [LOGITS]:
        yield f"has other outputs than {LOGITS}"


def _signature_problems(graph: Any, decoder: Mapping[str, Any]) -> Iterator[str]:
    """What of a graph's inputs and outputs is not as promised."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in weights}
    outputs = {value.name: value for value in graph.output}
    pasts = [name for name in inputs if name.startswith(PAST)]
    for name in inputs:
        if name not in (*TOKENS_AND_MASK, POSITIONS, *pasts):
            yield f"has the input {name!a}, which no decoder with a cache has"
    for name in TOKENS_AND_MASK:
        if name not in inputs:
            yield f"has no input {name}"
        elif _type(inputs[name]) != INT64:
            yield f"takes {name} in another type than int64"
    if not pasts:
        yield "has no cache: no input begins with past_key_values"
    if LOGITS not in outputs:
        yield "has no output logits"
    shape = {1: decoder["num_key_value_heads"], 3: decoder["head_size"]}
    for past in pasts:
        present = PRESENT + past.removeprefix(PAST)
        if present not in outputs:
            yield f"has no output {present} for its input {past}"
        if _type(inputs[past]) not in FLOATS or not _fits(inputs[past], shape):
            stated = f"{shape[1]} heads of {shape[3]} values"
            yield f"has another {past} than floating-point [batch, heads, tokens, size] with {stated}"


def _type(value: Any) -> int:
    return int(value.type.tensor_type.elem_type)


def _fits(value: Any, shape: Mapping[int, int]) -> bool:
    """Whether a value has four dimensions, of which those that are fixed have these lengths."""
    found = value.type.tensor_type.shape.dim
    fixed = {place: found[place].dim_value for place in shape if place < len(found)}
    return len(found) == 4 and all(not length or length == shape[place] for place, length in fixed.items())
