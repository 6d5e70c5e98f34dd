"""The matrix products by a stored weight of any ONNX graph: MatMul and Gemm, turned weights among them."""

from __future__ import annotations

from typing import Any

from qlora_export.exporters.onnx.graph import FLOAT, FLOAT16, BuiltGraph, Product


def constant_products(graph: BuiltGraph) -> list[Product]:
    """Those whose weight is a float32 or float16 matrix of the graph, in its order."""
    weights = {
        tensor.name: tensor
        for tensor in graph.model.graph.initializer
        if tensor.data_type in (FLOAT, FLOAT16) and len(tensor.dims) == 2
    }
    turned = {
        item.output[0]: item.input[0]
        for item in graph.model.graph.node
        if item.op_type == "Transpose" and _attributes(item).get("perm", [1, 0]) == [1, 0]
    }
    found = []
    for item in graph.model.graph.node:
        if not item.name or not _is_plain(item):
            continue
        stored = weights.get(turned.get(item.input[1], item.input[1]))
        if stored is not None:
            is_turned = (item.input[1] in turned) != bool(_attributes(item).get("transB", 0))
            columns, rows = reversed(stored.dims) if is_turned else stored.dims
            bias = item.input[2] if len(item.input) > 2 else ""
            ends = (item.input[0], item.output[0])
            found.append(Product(item.name, stored.name, columns, rows, *ends, is_turned, bias, stored.data_type))
    return found


def _is_plain(item: Any) -> bool:
    """Whether a node is x W, or x W + b."""
    facts = _attributes(item)
    scaled = facts.get("alpha", 1.0) != 1.0 or facts.get("beta", 1.0) != 1.0
    return item.op_type == "MatMul" or (item.op_type == "Gemm" and not scaled and not facts.get("transA", 0))


def _attributes(item: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in item.attribute}
