"""Copies of a graph in memory, changed: another accuracy of its integer products, an inner output to look at.

The data stays in its file; a session of a copy is told the folder to find it in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LEVEL = "accuracy_level"
# Operators whose output is a layer's, [batch, tokens, width].
LAYER_OPERATORS = frozenset(
    (
        "Add",
        "Gather",
        "GatherBlockQuantized",
        "Gemm",
        "GroupQueryAttention",
        "LayerNormalization",
        "MatMul",
        "MatMulNBits",
        "MoE",
        "MultiHeadAttention",
        "QMoE",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    )
)
LAYER_RANK = 3
# uint8, int8, uint4, int4
SMALL_INTEGERS = (2, 3, 21, 22)
LARGEST_TABLE = 1024
QUANTISED_WORDS = ("Quant", "NBits", "Bnb4", "QMoE", "Integer", "QLinear")


@dataclass(frozen=True)
class Layer:
    """A layer of a graph by the path in its nodes' names, and the value that it gives."""

    name: str
    output: str


def layers_of(model: Any) -> tuple[Layer, ...]:
    """The layers of a graph in the order that they run; of several nodes on one path the last gives the value."""
    found: dict[str, str] = {}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
    for node in model.graph.node:
        path = [part for part in node.name.split("/")[:-1] if part]
        inner = any(part.endswith("subgraph") or part == "constants" for part in path)
        inner = inner or ranks.get(node.output[0], LAYER_RANK) != LAYER_RANK
        if path and not inner and node.op_type in LAYER_OPERATORS and _gives_tokens(node):
            name = ".".join(path)
            found.pop(name, None)
            found[name] = node.output[0]
    return tuple(Layer(name, output) for name, output in found.items())


def _gives_tokens(node: Any) -> bool:
    """Whether its output has a row for each token: of what gathers rows those of token ids only."""
    return not node.op_type.startswith("Gather") or "input_ids" in node.input


def cache_grows(model: Any) -> bool:
    """Whether it appends to its caches and looks at the whole mask, as no GroupQueryAttention does."""
    return all(node.op_type != "GroupQueryAttention" for node in model.graph.node)


def accuracy_level(model: Any) -> int | None:
    """The lowest accuracy that a product with packed integers is allowed; None where there is none such."""
    levels = [attribute.i if attribute else 0 for _, attribute in _products(model)]
    return max(levels) if levels else None


def set_accuracy_level(model: Any, level: int) -> None:
    """Have every product with packed integers computed so, in place."""
    for node, attribute in _products(model):
        if attribute is None:
            attribute = node.attribute.add(name=LEVEL, type=2)
        attribute.i = level


def stored_as(model: Any) -> str:
    """What the weights are, in a word: `4-bit` or `4- and 8-bit` integers, `quantised` otherwise, or the float type."""
    bits = {attribute.i for node, _ in _products(model) for attribute in node.attribute if attribute.name == "bits"}
    if bits:
        return " and ".join(f"{count}-" for count in sorted(bits)) + "bit"
    named = any(word in node.op_type for node in model.graph.node for word in QUANTISED_WORDS)
    if named or any(_is_codes(tensor) for tensor in model.graph.initializer):
        return "quantised"
    return "float16" if any(tensor.data_type == 10 for tensor in model.graph.initializer) else "float32"


def _is_codes(tensor: Any) -> bool:
    """Whether a tensor is of small integers, and too large to be a table or a shape."""
    return tensor.data_type in SMALL_INTEGERS and math.prod(tensor.dims) > LARGEST_TABLE


def add_output(model: Any, name: str) -> None:
    """Have the graph give a value that it computes within, in place; its type is left to the runtime."""
    if all(value.name != name for value in model.graph.output):
        model.graph.output.add(name=name)


def _products(model: Any) -> Iterator[tuple[Any, Any | None]]:
    """The nodes that multiply with packed integers, and the attribute that says how exactly, if it is there."""
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            yield node, next((attribute for attribute in node.attribute if attribute.name == LEVEL), None)
