"""`onnx-nf4-adapter`: the NF4 base of training in MatMulBnb4, the adapter beside it as two small matrix products.

    y = MatMulBnb4(x, B, absmax) + (x A) (s B'),   A [in, rank], B' [rank, out], float32

    B        uint8 [out * in / 2]: bitsandbytes' own bytes, the first code of a pair in the high nibble
    absmax   float32 [blocks]: decoded from double quantisation, blocks of the flat weight

The scale s of the adapter (alpha / r, or alpha / sqrt(r), by module) is multiplied into B'. With `adapter: inputs`
both factors are the defaults of inputs (`beside.py`), and lie in an `.onnx_adapter` file as well.

MatMulBnb4 multiplies with codebook[code] * absmax in float32; training rounded that product to its compute dtype first.
With `decode: as-trained` operators of ONNX itself decode the same bytes and round them so, before a plain product:

    w = Cast(Cast(Gather(pairs, codes) * absmax, bfloat16), float32),   pairs [256, 2] the values of a byte's codes

which ONNX Runtime computes once, while it loads, and holds in float32. Source: ONNX Runtime
`docs/ContribOperators.md`, MatMulBnb4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qlora_export.errors import Refused
from qlora_export.exporters.onnx.adapted import AdaptedLayer, adapted_base
from qlora_export.exporters.onnx.adapter_file import FILE_NAME, own_factors, write_factors
from qlora_export.exporters.onnx.beside import Beside, as_constants, as_inputs
from qlora_export.exporters.onnx.exporter import OnnxExporter
from qlora_export.exporters.onnx.graph import (
    BFLOAT16,
    FLOAT,
    FLOAT16,
    INT32,
    UINT8,
    NewTensor,
    Product,
    Raw,
    Replacement,
    array,
    node,
    numbers,
)
from qlora_export.exporters.onnx.options import BLOCK_SIZES, Nf4Options
from qlora_export.exporters.onnx.skeleton import MixedRows, Run
from qlora_export.exporters.onnx.surgery import Model, make_exact
from qlora_export.merge.companion_files import ADAPTER_FOLDER
from qlora_export.quant import four_bit
from qlora_export.sources.adapter import Adapter, open_adapter
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint
from qlora_export.sources.weights import FourBitWeight
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import FROM_TORCH_NAMES, Float32

CHUNK_VALUES = 1 << 22
NF4 = 1
CASTS = {"F32": FLOAT, "F16": FLOAT16, "BF16": BFLOAT16}
# Nodes that compute an output from codes and absmax, and the constants that they need.
Nodes = tuple[tuple[Any, ...], tuple[NewTensor, ...]]
# An operator, its inputs, its attributes.
Step = tuple[str, list[str], dict[str, int | list[int]]]
Multiply = Callable[[Product, int, NewTensor, NewTensor, str], Nodes]


@dataclass(frozen=True, kw_only=True)
class Nf4AdapterExporter(OnnxExporter):
    """Takes an `nf4-adapter` folder and the builder's graph of its base, and brings them together."""

    options: Nf4Options
    name: str = "onnx-nf4-adapter"
    takes: str = "nf4-adapter"
    bytes_per_weight: float = 0.8

    def export(self, source: Path, destination: Path) -> None:
        """Fill `destination` from a folder of codes with its adapter."""
        checkpoint = open_checkpoint(source)
        adapter = open_adapter(source / ADAPTER_FOLDER)
        roundings = _roundings(adapter, checkpoint)
        base = adapted_base(checkpoint, adapter)
        specs = tuple(layer.weight.spec for layer in base.layers.values())
        model = Model(source, checkpoint.config, base.dense, specs)
        replaceable = self.options.adapter == "inputs"
        with SourceFiles() as files:
            multiply = _decoded if self.options.decode == "as-trained" else _kernel
            parts = Parts(partial(multiply, roundings), as_inputs if replaceable else as_constants)
            make_exact(self.name, model, False, partial(_replacement, base.layers, files, parts), destination)
            if replaceable:
                write_factors(own_factors(base, files), destination / FILE_NAME)


@dataclass(frozen=True)
class Parts:
    """How the product with 4-bit weights is made, and the adapter's beside it."""

    multiply: Multiply
    beside: Beside


def _replacement(
    layers: Mapping[str, AdaptedLayer], files: SourceFiles, parts: Parts, product: Product, runs: tuple[Run, ...]
) -> Replacement:
    if len(runs) > 1:
        raise MixedRows(f"{product.weight}: rows of {len(runs)} layers in one product", "choose a merged format")
    (run,) = runs
    layer = layers[run.weight]
    weight, block, first = layer.weight, layer.weight.block, run.first_row * product.columns
    size = product.rows * product.columns
    if weight.storage != "nf4" or block not in BLOCK_SIZES or first % (2 * block):
        raise Refused(f"{run.weight}: its blocks of {block} are none that MatMulBnb4 has", "choose a merged format")
    codes = NewTensor(f"{product.weight}_NF4", UINT8, (-(-size // 2),), partial(_codes, weight, files, run))
    absmax = NewTensor(f"{product.weight}_absmax", FLOAT, (-(-size // block),), partial(_absmax, weight, files, run))
    base = product.output if layer.change is None else f"{product.output}/base"
    made, constants = parts.multiply(product, block, codes, absmax, base)
    if layer.change is None:
        return Replacement(made, (codes, absmax, *constants))
    beside = parts.beside(files, product, run, layer, base)
    return Replacement((*made, *beside.nodes), (codes, absmax, *constants, *beside.tensors), beside.inputs)


def _kernel(
    roundings: tuple[str, ...], product: Product, block: int, codes: NewTensor, absmax: NewTensor, output: str
) -> Nodes:
    """The product with 4-bit weights, which are not rounded."""
    cut = {"K": product.columns, "N": product.rows, "block_size": block, "quant_type": NF4}
    inputs = [product.input, codes.name, absmax.name]
    return (node("MatMulBnb4", inputs, output, f"{product.node}_NF4", **cut),), ()


def _decoded(
    roundings: tuple[str, ...], product: Product, block: int, codes: NewTensor, absmax: NewTensor, output: str
) -> Nodes:
    """The product with weights that are decoded and rounded in the graph."""
    if product.rows * product.columns % (2 * block):
        what = f"{product.weight}: {product.rows} x {product.columns} values end inside of a block of {block}"
        raise Refused(what, "leave `decode` out")
    weight, pairs = product.weight, array("nf4_pairs", _pairs())
    made = [
        numbers(f"{weight}_blocks", [-1, block]),
        numbers(f"{weight}_column", [-1, 1]),
        numbers(f"{weight}_shape", [product.rows, product.columns]),
        node("Reshape", [absmax.name, f"{weight}_column"], f"{weight}_scales", f"{product.node}/scales"),
    ]
    last = ""
    for number, (op, inputs, attributes) in enumerate(_steps(weight, codes.name, pairs.name, roundings)):
        name = f"{weight}/decode_{number}"
        made.append(node(op, [item or last for item in inputs], name, f"{product.node}/decode_{number}", **attributes))
        last = name
    made.append(node("MatMul", [product.input, last], output, f"{product.node}_decoded"))
    return tuple(made), (pairs,)


def _steps(weight: str, codes: str, pairs: str, roundings: tuple[str, ...]) -> list[Step]:
    """From codes to the weight [in, out], where "" is the output of the step before."""
    steps: list[Step] = [
        ("Cast", [codes], {"to": INT32}),
        ("Gather", [pairs, ""], {"axis": 0}),
        ("Reshape", ["", f"{weight}_blocks"], {}),
        ("Mul", ["", f"{weight}_scales"], {}),
        ("Reshape", ["", f"{weight}_shape"], {}),
    ]
    for dtype in roundings:
        steps += [("Cast", [""], {"to": CASTS[dtype]}), ("Cast", [""], {"to": FLOAT})]
    return [*steps, ("Transpose", [""], {"perm": [1, 0]})]


def _pairs() -> Float32:
    """The values of the two codes of every byte, [256, 2]."""
    bytes_of = np.arange(256)
    return four_bit.NF4.codebook[np.stack([bytes_of >> 4, bytes_of & 15], axis=1)]


def _roundings(adapter: Adapter, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The dtypes that training rounded a decoded weight to: by the sidecar, else its compute dtype alone."""
    if adapter.training.recorded:
        return adapter.training.weight_roundings
    stated = checkpoint.config["quantization_config"]["bnb_4bit_compute_dtype"]
    return (FROM_TORCH_NAMES[stated],)


def _codes(weight: FourBitWeight, files: SourceFiles, run: Run) -> Iterator[Raw]:
    """The bytes of some rows at a time, whole blocks of them."""
    least = weight.row_multiple * (2 if weight.row_multiple * weight.spec.columns % 2 else 1)
    height = max(1, CHUNK_VALUES // weight.spec.columns // least) * least
    for first in range(run.first_row, run.first_row + run.rows, height):
        yield weight.packed(files, first, min(height, run.first_row + run.rows - first))


def _absmax(weight: FourBitWeight, files: SourceFiles, run: Run) -> Iterator[Raw]:
    first = run.first_row * weight.spec.columns // weight.block
    count = -(-run.rows * weight.spec.columns // weight.block)
    yield weight.scales(files).scales[first : first + count].view(np.uint8)
