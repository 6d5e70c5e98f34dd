"""The first layer that computes something else: a binary search over the inner values of a graph.

What follows a wrong layer is wrong too, so that some dozens of layers take some runs, each of a copy of the graph that
gives one more value. Compared is one way of running with another, or with the layers of the source's model in torch,
which are recorded before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from qlora_export.drift.layer_difference import Difference
from qlora_export.runtimes.base import TracedLayer
from qlora_export.runtimes.onnx.graph_copy import Layer
from qlora_export.types import Float32

# The relative error from which a layer's output is another one, by the type of the weights.
DEPARTS = {"float32": 1e-3}
DEPARTS_ROUNDED = 1e-2
BLOCK = re.compile(r"\.(\d+)\.")
OutputsOf = Callable[[str], Sequence[Float32]]


def first_differing(layers: Sequence[Layer], ours: OutputsOf, theirs: OutputsOf, weights: str) -> str | None:
    """The name of the first layer whose values differ; None where that of the last one does not."""
    limit = DEPARTS.get(weights, DEPARTS_ROUNDED)

    def differs(place: int) -> bool:
        name = layers[place].output
        return _error(ours(name), theirs(name)) > limit

    if not layers or not differs(len(layers) - 1):
        return None
    agrees, departs = -1, len(layers) - 1
    while departs - agrees > 1:
        middle = (agrees + departs) // 2
        if differs(middle):
            departs = middle
        else:
            agrees = middle
    return layers[departs].name


def in_torch(layers: Sequence[Layer], traced: Sequence[TracedLayer]) -> Mapping[str, str]:
    """The name in torch of each layer's output that has one: the same block, and the same last name."""
    known = {_key(layer.name): layer.name for layer in traced}
    found = {layer.output: known.get(_key(layer.name)) for layer in layers}
    return {output: name for output, name in found.items() if name is not None}


def _key(name: str) -> tuple[str | None, str]:
    last = name.rpartition(".")[2]
    if last in ("final_norm_layernorm", "norm", "final_layernorm"):
        return None, "norm"
    block = BLOCK.search(name)
    return (block.group(1) if block else None), last


def _error(ours: Sequence[Float32], theirs: Sequence[Float32]) -> float:
    found = Difference()
    for one, other in zip(ours, theirs, strict=True):
        found.add(one, other)
    return found.error
