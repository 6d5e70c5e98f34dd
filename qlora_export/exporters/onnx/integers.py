"""`onnx-int4` and `onnx-int8` with a rounding: the integers of another of our artifacts, unchanged, in MatMulNBits.

    source         `w4a16` and `w8a16`, whose layers are described here; `gptq` and `awq`: see `interleaved_layers`
    packed layer   `x.weight_packed` int32 words of a row, code + 2^(bits-1), low bits first; `x.weight_scale`
                   [out, groups]; with zero points `x.weight_zero_point`, eight rows a word
    MatMulNBits    B uint8 [out, blocks, block * bits / 8], the lower half of a byte first, w = (code - zero) * scale;
                   scales float32 [out, blocks]; zero points uint8, as B packed along the blocks of a row; without
                   them zero is 2^(bits-1)

A word of eight codes in little-endian bytes is four bytes of B, so a layer's codes are copied. A scale of bf16 or
float16 is a float32; one that is for a whole row is repeated for its blocks. So the product multiplies with the decode
of the packed layer to the last bit, before its rounding to the model's dtype. Layers that the source keeps dense stay
float32, and so does the output head unless `last_matrix` says otherwise.
Source: ONNX Runtime `docs/ContribOperators.md`, MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qlora_export.errors import InputError, Refused
from qlora_export.exporters.onnx.exporter import OnnxExporter
from qlora_export.exporters.onnx.graph import FLOAT, UINT8, NewTensor, Product, Raw, Replacement, node
from qlora_export.exporters.onnx.interleaved_layers import interleaved_layer
from qlora_export.exporters.onnx.layers import Blocks, Layer, RoundedLayer, block_of, packed_layer
from qlora_export.exporters.onnx.options import BITS, BLOCK_SIZES, SameIntegerOptions
from qlora_export.exporters.onnx.skeleton import MixedRows, Run, renamed, untied
from qlora_export.exporters.onnx.surgery import Model, make_exact
from qlora_export.quant import packing
from qlora_export.sources.checkpoint import read_json, read_tensors
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Options, Rounding

CHUNK_VALUES = 1 << 22
HEAD = "lm_head.weight"
EMBEDDING_SUFFIX = "embed_tokens.weight"
METHODS = ("gptq", "awq")
# The part of a layer that holds its codes, and the others.
PACKED = ("weight_packed", ("weight_scale", "weight_zero_point", "weight_shape"))
INTERLEAVED = ("qweight", ("qzeros", "scales", "g_idx"))


@dataclass(frozen=True, kw_only=True)
class SameIntegersExporter(OnnxExporter):
    """Takes a packed artifact and the builder's graph, and brings them together."""

    rounding: Rounding
    options: SameIntegerOptions
    sources: tuple[str, ...]

    def facts(self) -> Mapping[str, Any]:
        """Versions and options that decide the bytes; raises EnvironmentProblem when the builder is not installed."""
        return {**super().facts(), "integers": self.takes, "rounding": self.rounding}

    def accepts(self, options: Options) -> bool:
        """Whether block and grid, where they are stated, are those of a packed artifact with these options."""
        group, symmetric = options.get("group_size", 128), options.get("symmetric", self.takes != "awq")
        stated = self.options
        return stated.block_size in (None, group) and stated.symmetric in (None, symmetric)

    def export(self, source: Path, destination: Path) -> None:
        """Fill `destination` from a packed folder."""
        model, layers = self._read(source)
        with SourceFiles() as files:
            replace = partial(_replacement, layers, files, self.options.accuracy_level)
            make_exact(self.name, model, True, replace, destination)

    def _read(self, source: Path) -> tuple[Model, dict[str, Layer]]:
        config = read_json(source / "config.json")
        tensors = read_tensors(source, sorted(path.name for path in source.glob("model*.safetensors")))
        read, first, others = (interleaved_layer, *INTERLEAVED) if self.takes in METHODS else (packed_layer, *PACKED)
        modules = [name.removesuffix(f".{first}") for name in tensors if name.endswith(f".{first}")]
        found = (read(module, tensors, _dtype(config)) for module in modules)
        layers: dict[str, Layer] = {layer.spec.name: layer for layer in found}
        parts = {f"{module}.{part}" for module in modules for part in (first, *others)}
        dense = [tensor for name, tensor in tensors.items() if name not in parts]
        if self.options.last_matrix != "float32":
            head, dense, config = _head(dense, config, self.options.last_matrix, layers)
            layers[head.spec.name] = head
        return Model(source, config, dense, tuple(layer.spec for layer in layers.values())), layers


def _dtype(config: Mapping[str, Any]) -> str:
    stated = str(config.get("dtype", config.get("torch_dtype", "bfloat16")))
    return {"float32": "F32", "float16": "F16"}.get(stated, "BF16")


def _head(
    dense: list[StoredTensor], config: Mapping[str, Any], kind: str, layers: Mapping[str, Layer]
) -> tuple[RoundedLayer, list[StoredTensor], dict[str, Any]]:
    """The output head to be rounded, the other dense tensors, and the config of a model that has one of its own."""
    by_end = {end: [tensor for tensor in dense if tensor.spec.name.endswith(end)] for end in (HEAD, EMBEDDING_SUFFIX)}
    found = by_end[HEAD] or by_end[EMBEDDING_SUFFIX]
    if len(found) != 1:
        raise Refused(f"the model has {len(found)} dense tensors that could be its last matrix", "last_matrix: float32")
    values, name = found[0], found[0].spec.name if by_end[HEAD] else HEAD
    usual = next((layer.blocks.block for layer in layers.values()), 32)
    block = block_of(usual, values.spec.columns)
    if block is None:
        raise Refused(
            f"{name}: {values.spec.columns} columns are no multiple of {BLOCK_SIZES[0]}", "last_matrix: float32"
        )
    others = [tensor for tensor in dense if not by_end[HEAD] or tensor is not values]
    return RoundedLayer(renamed(values, name).spec, Blocks(BITS[kind], block, False), values), others, untied(config)


def _replacement(
    layers: Mapping[str, Layer], files: SourceFiles, accuracy_level: int, product: Product, runs: tuple[Run, ...]
) -> Replacement:
    kinds = {layers[run.weight].blocks for run in runs}
    if len(kinds) > 1:
        raise MixedRows(f"{product.weight}: its rows are of layers with other bits or blocks", "use one for q, k and v")
    (cut,) = kinds
    if sum(run.rows for run in runs) != product.rows or product.columns != layers[runs[0].weight].spec.columns:
        raise InputError(
            f"{product.weight}: {product.rows} rows of {product.columns} columns, other than its layers have"
        )
    count = product.columns // cut.block
    shape = (product.rows, count, cut.block * cut.bits // 8)
    new = [
        NewTensor(f"{product.weight}_Q{cut.bits}", UINT8, shape, partial(_codes, layers, files, runs)),
        NewTensor(f"{product.weight}_scales", FLOAT, (product.rows, count), partial(_scales, layers, files, runs)),
    ]
    if cut.zeros:
        packed = (product.rows, -(-count * cut.bits // 8))
        new.append(NewTensor(f"{product.weight}_zero_points", UINT8, packed, partial(_zeros, layers, files, runs)))
    made = node(
        "MatMulNBits",
        [product.input, *(tensor.name for tensor in new)],
        product.output,
        f"{product.node}_Q{cut.bits}",
        K=product.columns,
        N=product.rows,
        bits=cut.bits,
        block_size=cut.block,
        accuracy_level=accuracy_level,
    )
    return Replacement((made,), tuple(new))


def _slices(layers: Mapping[str, Layer], runs: tuple[Run, ...]) -> Iterator[tuple[Layer, int, int]]:
    """Some rows at a time, of all runs in their order."""
    for run in runs:
        layer = layers[run.weight]
        height = max(1, CHUNK_VALUES // layer.spec.columns)
        for first in range(run.first_row, run.first_row + run.rows, height):
            yield layer, first, min(height, run.first_row + run.rows - first)


def _codes(layers: Mapping[str, Layer], files: SourceFiles, runs: tuple[Run, ...]) -> Iterator[Raw]:
    for layer, first, count in _slices(layers, runs):
        yield layer.codes(files, first, count)


def _scales(layers: Mapping[str, Layer], files: SourceFiles, runs: tuple[Run, ...]) -> Iterator[Raw]:
    for layer, first, count in _slices(layers, runs):
        yield layer.scales(files, first, count).view(np.uint8)


def _zeros(layers: Mapping[str, Layer], files: SourceFiles, runs: tuple[Run, ...]) -> Iterator[Raw]:
    for layer, first, count in _slices(layers, runs):
        zeros, bits = layer.zeros(files, first, count), layer.blocks.bits
        words = packing.pack(np.ascontiguousarray(zeros), bits)
        row_bytes = -(-zeros.shape[1] * bits // 8)
        yield np.ascontiguousarray(words.view(np.uint8)[:, :row_bytes]).reshape(-1)
