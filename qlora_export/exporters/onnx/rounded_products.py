"""Matrix products of a dense ONNX graph, rounded by ONNX Runtime's own quantiser, a matrix at a time.

The quantiser is given some rows of a weight with all of their columns, and makes the node, the names and the bytes that
it makes of a whole model: MatMulNBits, with B uint8 [out, blocks, block * bits / 8], scales in the type of the weight
and zero points where it writes them. Blocks run along the columns of a row, so rows need nothing of each other. Its
three algorithms are `default` (MLAS), `rtn` and `k_quant` (Intel's neural compressor, the second after llama.cpp).
Cost: of memory the codes of one matrix and some blocks of rows; `k_quant` tries 20 scales for every block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from qlora_export.errors import Refused
from qlora_export.exporters.onnx.graph import (
    DOMAIN,
    FLOAT,
    FLOAT16,
    FLOATS,
    UINT8,
    BuiltGraph,
    Floats,
    NewTensor,
    Product,
    Raw,
    Replacement,
    node,
)

CHUNK_VALUES = 1 << 22
TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.float16): FLOAT16, np.dtype(np.uint8): UINT8}
# Rows of a weight, from one on, so many: [columns, rows].
ReadRows = Callable[[int, int], Floats]
Arrays = dict[str, Any]


@dataclass(frozen=True)
class BlockRounding:
    """How the quantiser rounds: bits of a code, values of a block, grid, and how scales are found.

    `accuracy_level` is what the product rounds its activations to: 4 int8, 1 float32, 0 unsaid.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    algorithm: str = "default"
    accuracy_level: int = 4


def round_products(
    graph: BuiltGraph, products: Iterable[Product], choose: Callable[[Product], BlockRounding | None]
) -> dict[str, Replacement]:
    """What stands in for these products of a graph, by their nodes; those that nothing is chosen for stay dense."""
    chosen = [(product, rounding) for product in products if (rounding := choose(product)) is not None]
    return {
        product.node: rounded_product(product, partial(graph.slice, product), rounding) for product, rounding in chosen
    }


def rounded_product(product: Product, read: ReadRows, rounding: BlockRounding) -> Replacement:
    """What stands in for a product; its weight is read and rounded when its tensors are written."""
    ramp: Floats = np.empty((product.columns, 2), FLOATS[product.type])
    ramp.flat[:] = np.linspace(-1, 1, ramp.size)
    try:
        made, arrays = _quantised(product, ramp, rounding)
    except ValueError:
        raise Refused(
            f"{product.node}: {product.columns} columns in blocks of {rounding.block_size} cannot be rounded by "
            f"{rounding.algorithm}",
            "choose another block_size or algorithm: default",
        ) from None
    for attribute in made.attribute:
        if attribute.name == "N":
            attribute.i = product.rows
    weight = _RoundedWeight(product, read, rounding)
    tensors = [
        NewTensor(name, TYPES[values.dtype], (product.rows, *values.shape[1:]), partial(weight.take, name))
        for name, values in arrays.items()
    ]
    return Replacement(_with_bias(made, product), tuple(tensors))


@dataclass
class _RoundedWeight:
    """The tensors of one product; made when the first of them is asked for, forgotten as they are taken."""

    product: Product
    read: ReadRows
    rounding: BlockRounding
    made: dict[str, list[Raw]] = field(default_factory=dict)

    def take(self, name: str) -> Iterator[Raw]:
        """The bytes of one tensor, some rows at a time."""
        if name not in self.made:
            self.made = self._make()
        yield from self.made.pop(name)

    def _make(self) -> dict[str, list[Raw]]:
        made: dict[str, list[Raw]] = {}
        height = max(1, CHUNK_VALUES // self.product.columns)
        for first in range(0, self.product.rows, height):
            values = self.read(first, min(height, self.product.rows - first))
            for name, part in _quantised(self.product, values, self.rounding)[1].items():
                made.setdefault(name, []).append(part.reshape(-1).view(np.uint8))
        return made


def _quantised(product: Product, values: Floats, rounding: BlockRounding) -> tuple[Any, Arrays]:
    """The quantiser's node for [columns, rows] of a weight, and its tensors by name in the quantiser's order."""
    from onnx import GraphProto, helper, numpy_helper

    old = helper.make_node("MatMul", [product.input, product.weight], [product.output], name=product.node)
    if rounding.algorithm == "default":
        graph = GraphProto(initializer=[numpy_helper.from_array(values, product.weight)])
        (made,) = _default_quantiser(rounding).quantize(old, [graph])
        tensors = graph.initializer[1:]
    else:
        made, tensors = _compressed(old, values, rounding)
    return made, {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


def _default_quantiser(rounding: BlockRounding) -> Any:
    module = _quantiser_module()
    settings = module.DefaultWeightOnlyQuantConfig(
        bits=rounding.bits,
        block_size=rounding.block_size,
        is_symmetric=rounding.symmetric,
        accuracy_level=rounding.accuracy_level,
    )
    return module.DefaultWeightOnlyQuantizer(settings)


def _quantiser_module() -> Any:
    # It sets up the root logger while it is imported, unless that has a handler.
    silent = logging.NullHandler()
    logging.getLogger().addHandler(silent)
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    finally:
        logging.getLogger().removeHandler(silent)
    return matmul_nbits_quantizer


def _compressed(old: Any, values: Floats, rounding: BlockRounding) -> tuple[Any, Any]:
    """What `rtn_quantize` of the neural compressor does for each product of a model."""
    _quantiser_module()
    from onnxruntime.quantization.neural_compressor import weight_only

    blocks = -(-len(values) // rounding.block_size)
    turned = weight_only.pad_tensor(values, rounding.block_size, blocks).T
    if searched := rounding.algorithm == "k_quant":
        codes, scales, zeros = weight_only.quant_tensor_k_quant_cuda(turned, rounding.bits, rounding.block_size)
    else:
        scheme = "sym" if rounding.symmetric else "asym"
        codes, scales, zeros = weight_only.quant_tensor(turned, rounding.bits, rounding.block_size, scheme, "uint")
    made: tuple[Any, Any] = weight_only.make_matmul_weight_only_node(
        old,
        values.shape,
        rounding.bits,
        rounding.block_size,
        blocks,
        codes.astype(np.uint8),
        scales.astype(values.dtype),
        zeros if searched or not rounding.symmetric else None,
        rounding.accuracy_level,
    )
    return made


def _with_bias(made: Any, product: Product) -> tuple[Any, ...]:
    made.domain = DOMAIN
    if not product.bias:
        return (made,)
    made.output[0] = f"{product.output}_product"
    return made, node("Add", [made.output[0], product.bias], product.output, f"{product.node}_bias")
