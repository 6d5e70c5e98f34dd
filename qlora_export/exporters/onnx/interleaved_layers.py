"""Layers as `gptq` and `awq` store them, [in, out], some outputs at a time.

    gptq   word [in / 8, out] is, read down its column, the word of eight codes that MatMulNBits wants: it is moved, not
           unpacked. Zero points are stored one too low, and all are 8; `g_idx` numbers the groups in their order.
    awq    word [in, out / 8] holds eight outputs out of order: unpacked and packed anew, zero points too.

A scale of float16 is a float32. Other zero points of `gptq` and groups out of order (act-order) are none of ours, and
are refused by the layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import Refused
from qlora_export.exporters.onnx.graph import Raw
from qlora_export.exporters.onnx.layers import Blocks, Layer, block_of
from qlora_export.quant import packing
from qlora_export.quant.gptq_awq_packing import AWQ_ORDER, PER_WORD, unpack_outputs
from qlora_export.quant.scales import Int8
from qlora_export.tensors.dtypes import ITEM_BYTES, widen
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32, TensorSpec

BITS = 4
ZEROS_OF_GPTQ = np.uint32(0x77777777)  # eight zero points of 8, one too low


@dataclass(frozen=True)
class Interleaved:
    """The stored parts of a layer."""

    words: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor


@dataclass(frozen=True)
class GptqLayer(Layer):
    """A layer whose words hold eight inputs of an output."""

    parts: Interleaved

    def codes(self, files: SourceFiles, first: int, count: int) -> Raw:
        """The words of some columns, column by column."""
        words = _columns(files, self.parts.words, first, count).view(np.uint32)
        return np.ascontiguousarray(words.T).reshape(-1).view(np.uint8)

    def scales(self, files: SourceFiles, first: int, count: int) -> Float32:
        """Widened."""
        return _scales(files, self.parts.scales, first, count)


@dataclass(frozen=True)
class AwqLayer(GptqLayer):
    """A layer whose words hold eight outputs of an input."""

    def codes(self, files: SourceFiles, first: int, count: int) -> Raw:
        """Unpacked from the words that hold these outputs, and packed along the inputs."""
        return packing.pack(_outputs(files, self.parts.words, first, count), BITS).reshape(-1).view(np.uint8)

    def zeros(self, files: SourceFiles, first: int, count: int) -> Int8:
        """Unpacked."""
        return _outputs(files, self.parts.zeros, first, count)


def interleaved_layer(module: str, tensors: Mapping[str, StoredTensor], dtype: str) -> Layer:
    """A layer by its parts, of `gptq` where it has `g_idx`; raises Refused where no MatMulNBits holds it as it is."""
    parts = Interleaved(*(tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")))
    groups, rows = parts.scales.spec.shape
    of_inputs = tensors.get(f"{module}.g_idx")
    columns = parts.words.spec.rows if of_inputs is None else of_inputs.spec.size
    block = columns // groups
    if block_of(block, columns) != block:
        raise Refused(f"{module}: no MatMulNBits has groups of {block} columns", "keep the layer dense")
    spec = TensorSpec(f"{module}.weight", dtype, (rows, columns))
    if of_inputs is None:
        return AwqLayer(spec, Blocks(BITS, block, True), parts)
    _require_plain(module, parts.zeros, of_inputs, block)
    return GptqLayer(spec, Blocks(BITS, block, False), parts)


def _require_plain(module: str, zeros: StoredTensor, of_inputs: StoredTensor, block: int) -> None:
    with SourceFiles() as files:
        groups = files.read_bytes(of_inputs, 0, of_inputs.bytes).view(np.uint32)
        stored = files.read_bytes(zeros, 0, zeros.bytes).view(np.uint32)
    if not np.array_equal(groups, np.arange(groups.size) // block):
        raise Refused(f"{module}: its groups are not in the order of its inputs (act-order)", "build the source again")
    if (stored != ZEROS_OF_GPTQ).any():
        raise Refused(f"{module}: it has zero points other than 8, which our gptq has not", "build the source again")


def _columns(files: SourceFiles, tensor: StoredTensor, first: int, count: int) -> NDArray[np.uint8]:
    """Bytes [rows, count * item] of some columns of a stored tensor."""
    item = ITEM_BYTES[tensor.spec.dtype]
    row_bytes = tensor.spec.columns * item
    lines = [files.read_bytes(tensor, row * row_bytes + first * item, count * item) for row in range(tensor.spec.rows)]
    return np.stack(lines)


def _outputs(files: SourceFiles, tensor: StoredTensor, first: int, count: int) -> Int8:
    """Codes [count, rows of the tensor] of some outputs, eight of which share a word."""
    skipped = first % PER_WORD
    height = -(-(skipped + count) // PER_WORD)
    words = _columns(files, tensor, first // PER_WORD, height).view(np.uint32)
    codes = np.empty((height * PER_WORD, tensor.spec.rows), np.int8)
    unpack_outputs(words, AWQ_ORDER, codes)
    return codes[skipped : skipped + count]


def _scales(files: SourceFiles, tensor: StoredTensor, first: int, count: int) -> Float32:
    """Of some outputs, one for each group."""
    stored = _columns(files, tensor, first, count)
    values = widen(np.ascontiguousarray(stored).reshape(-1), tensor.spec.dtype).reshape(-1, count)
    return np.ascontiguousarray(values.T).reshape(-1)
