"""The layout that transformers.js loads, made of a folder in that of ONNX Runtime GenAI, which goes on loading it.

On disk: `onnx/model{suffix}.onnx` and `onnx/model{suffix}.onnx_data`, the folder's one graph and one data file, and
`config.json` with `transformers.js_config`; `genai_config.json`, which a sequence classifier has not, names the graph
where it lies now. The suffix says how weights are stored: none, `_fp16`, `_int8`, `_q4`, `_q4f16` or `_bnb4`. The name
of the data is written into the graph, so that the graph is rewritten and the data moved. The builder leaves the size
of a head open in the cache's inputs, of which transformers.js would make 0; here it is baked in. The chat template
also goes into tokenizer_config.json, since transformers.js reads no other file for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_export.errors import EnvironmentProblem
from qlora_export.sources.checkpoint import read_json
from qlora_export.tensors.external_data import outside_tensors, read_graph

LAYOUTS = ("genai", "transformers.js")
SUBFOLDER = "onnx"
GENAI_CONFIG = "genai_config.json"
SUFFIXES = {
    "fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4", "q4f16": "_q4f16", "bnb4": "_bnb4",
}  # fmt: skip
FLOAT16 = 10
# What of the source's configuration is not true of a graph.
NOT_OF_GRAPHS = ("quantization_config",)


def lay_out(layout: str, source: Path, folder: Path) -> None:
    """Turn a folder that is complete into the layout asked for; `source` is the one that it was made from.

    A classifier has its `config.json` in any, since nothing else names its labels.
    """
    stated = {key: value for key, value in read_json(source / "config.json").items() if key not in NOT_OF_GRAPHS}
    is_decoder = (folder / GENAI_CONFIG).is_file()
    if layout == "genai":
        if not is_decoder:
            _write_json(folder / "config.json", stated)
        return
    _tell_chat_template(folder)
    model = read_graph(folder / "model.onnx")
    dtype = dtype_of(model.graph)
    name = f"model{SUFFIXES[dtype]}.onnx"
    if is_decoder:
        _bake_head_size(model.graph, int(read_json(folder / GENAI_CONFIG)["model"]["decoder"]["head_size"]))
    (folder / SUBFOLDER).mkdir()
    _move_data(model, folder, f"{name}_data")
    (folder / SUBFOLDER / name).write_bytes(model.SerializeToString())
    (folder / "model.onnx").unlink()
    if is_decoder:
        _name_graph(folder / GENAI_CONFIG, f"{SUBFOLDER}/{name}")
    _write_json(folder / "config.json", {**stated, "transformers.js_config": _settings(dtype, name, model.graph)})


def _name_graph(path: Path, graph: str) -> None:
    settings = read_json(path)
    settings["model"]["decoder"]["filename"] = graph
    _write_json(path, settings)


def dtype_of(graph: Any) -> str:
    """The name that transformers.js has for how the weights of a graph are stored."""
    operators = {node.op_type for node in graph.node}
    bits = {
        attribute.i
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    }
    half = _is_half(graph)
    if "MatMulBnb4" in operators:
        return "bnb4"
    if bits and min(bits) <= 4:
        return "q4f16" if half else "q4"
    if bits:
        return "int8"
    return "fp16" if half else "fp32"


def _is_half(graph: Any) -> bool:
    """Whether its cache is float16."""
    return any(value.type.tensor_type.elem_type == FLOAT16 for value in _caches(graph))


def _caches(graph: Any) -> list[Any]:
    return [value for value in (*graph.input, *graph.output) if value.name.startswith(("past_key_values.", "present."))]


def _bake_head_size(graph: Any, head_size: int) -> None:
    for value in _caches(graph):
        value.type.tensor_type.shape.dim[3].dim_value = head_size


def _move_data(model: Any, folder: Path, name: str) -> None:
    """Have the graph's one data file lie in the subfolder under a name of that layout."""
    entries = [entry for tensor in outside_tensors(model) for entry in tensor.external_data if entry.key == "location"]
    found = sorted({entry.value for entry in entries})
    if len(found) > 1:
        raise EnvironmentProblem(
            f"the model builder left the data files {', '.join(found)}, expected one",
            "leave `layout` out: the folder loads in ONNX Runtime GenAI as it is",
        )
    for entry in entries:
        entry.value = name
    for location in found:
        (folder / location).rename(folder / SUBFOLDER / name)


def _settings(dtype: str, name: str, graph: Any) -> Mapping[str, Any]:
    """What a client need not be told: the dtype, where data lies beside the graph, and the cache's type if not float32.

    The last is for transformers.js 3, which does not ask the graph.
    """
    found: dict[str, Any] = {"dtype": dtype, "use_external_data_format": {name: 1}}
    return {**found, "kv_cache_dtype": {dtype: "float16"}} if _is_half(graph) else found


def _tell_chat_template(folder: Path) -> None:
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not template.is_file() or not config.is_file():
        return
    stated = read_json(config)
    if "chat_template" not in stated:
        _write_json(config, {**stated, "chat_template": template.read_text(encoding="utf-8")})


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
