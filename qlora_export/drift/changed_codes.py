"""How many of the 4-bit codes that training had are others in what is shipped.

Two NF4 weights in blocks of the same size are compared code by code, whatever their scales are: 0 says that rounding
fell back onto every level of the base, so that only its scales can hold anything of a delta. Both sides are packed as
bitsandbytes packs, the first code of a pair in the high nibble, so the codes need not be unpacked: a nibble of the
exclusive or is zero where they agree. Codes of a plain base are made again, by the absmax of each block alone. Cost:
one search over levels a weight, and no memory beyond the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qlora_export.merge.base_rows import BaseRows, Training
from qlora_export.merge.merged_model import Output
from qlora_export.quant.device import kernels
from qlora_export.quant.floats import UInt8
from qlora_export.quant.four_bit import NF4
from qlora_export.sources.weights import FourBitWeight
from qlora_export.tensors.reading import SourceFiles

HIGH, LOW = np.uint8(0xF0), np.uint8(0x0F)


class TrainedCodes:
    """The packed NF4 codes [out, in] that a tensor had in training, in blocks of `block` weights; None without."""

    def __init__(self, output: Output, training: Training, files: SourceFiles) -> None:
        self._files, self._source = files, output.source
        self._rows = BaseRows(output, training, files, own=False, trained=True)
        self._columns = self._rows.spec.columns
        self.block: int | None = None
        if isinstance(output.source, FourBitWeight):
            if output.source.storage == "nf4" and not output.transposed:
                self.block = output.source.block
        elif self._rows.base is not None and training.quantization.quant_type == "nf4":
            self.block = training.quantization.block_size

    def of(self, rows: range) -> UInt8:
        """The codes of rows that hold whole blocks."""
        if isinstance(self._source, FourBitWeight):
            return self._source.packed(self._files, rows.start, len(rows))
        if self.block is None:
            raise ValueError(f"{self._rows.spec.name}: training had no NF4 codes of it")
        values = self._rows.bits(rows.start, len(rows))
        if values is None:
            values = self._rows.stored(self._rows.original(rows.start, len(rows)), rows.start)
        absmax = np.zeros(-(-len(values) // self.block), np.float32)
        kernels.block_absmax(values, self.block, absmax)
        return kernels.encode_four_bit(values, absmax, self.block, NF4)


def shipped_block(shipped: Mapping[str, NDArray[np.uint8]], name: str) -> int | None:
    """The block size of a weight that is shipped in bitsandbytes' NF4 layout; None of all others."""
    state = shipped.get(f"{name}.quant_state.bitsandbytes__nf4")
    return None if state is None else int(json.loads(state.tobytes())["blocksize"])


def shipped_codes(shipped: Mapping[str, NDArray[np.uint8]], name: str, columns: int, rows: range) -> UInt8:
    """The packed codes of such a weight's rows, which begin on a whole byte."""
    codes: UInt8 = shipped[name][rows.start * columns // 2 : (rows.stop * columns + 1) // 2]
    return codes


def different_codes(first: UInt8, second: UInt8, count: int) -> int:
    """In how many of `count` codes two packed arrays differ; what pads a last byte is not looked at."""
    different = first ^ second
    if count % 2:
        different[-1] &= HIGH
    return int(np.count_nonzero(different & HIGH)) + int(np.count_nonzero(different & LOW))
