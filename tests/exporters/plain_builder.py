"""Stands where the model builder stands and is as fast as a test wants: matrix products alone, q, k and v stacked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors.torch import load_file


def main() -> None:
    """Write a graph of every matrix of `-i` into `-o`."""
    words = sys.argv
    source, out = Path(words[words.index("-i") + 1]), Path(words[words.index("-o") + 1])
    weights = {
        name.removesuffix(".weight"): tensor.float().numpy()
        for name, tensor in load_file(source / "model.safetensors").items()
        if tensor.ndim == 2 and "embed_tokens" not in name
    }
    if "fuse_qkv=false" not in words:
        for name in [name for name in weights if name.endswith("q_proj")]:
            layer = name.removesuffix("q_proj")
            weights[f"{layer}qkv_proj"] = np.concatenate([weights.pop(f"{layer}{part}_proj") for part in "qkv"])
    nodes = [helper.make_node("MatMul", [f"{n}.in", f"{n}.weight"], [f"{n}.out"], name=n) for n in weights]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(w.T), f"{n}.weight") for n, w in weights.items()]
    inputs = [helper.make_tensor_value_info(f"{n}.in", 1, [None, w.shape[1]]) for n, w in weights.items()]
    outputs = [helper.make_tensor_value_info(f"{n}.out", 1, [None, w.shape[0]]) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "plain", inputs, outputs, tensors)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    (out / "genai_config.json").write_text(json.dumps({"model": {}}))


main()
