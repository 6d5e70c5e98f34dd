"""What writes a tensor in bitsandbytes' 4 bits: codes as rows come, and the absmax of the whole tensor at the seal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qlora_export.device import kernels
from qlora_export.quant import dithering, nested
from qlora_export.quant.searched_scales import search_blocks
from qlora_export.types import Float32, Piece, StoredScales, TensorSpec

if TYPE_CHECKING:
    from qlora_export.formats.four_bit import FourBit


class FourBitEncoder:
    """The nearest codes for the absmax of each block, or for the scale that a search finds."""

    def __init__(self, spec: TensorSpec, layout: FourBit) -> None:
        self._spec = spec
        self._layout = layout
        self._block = layout.training.block_size
        self._scales = np.zeros(-(-spec.size // self._block), np.float32)

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """The rows' codes at their place."""
        first = first_row * self._spec.columns
        first_block = first // self._block
        scales = self._scales[first_block : first_block - (-len(values) // self._block)]
        kernels.block_absmax(values, self._block, scales)
        if self._layout.rounding == "search":
            values = kernels.to_host(values)
            scales[:] = search_blocks(values, scales, self._block, self._layout.levels)
        codes = kernels.encode_four_bit(values, scales, self._block, self._layout.levels)
        yield Piece(self._spec.name, first // 2, codes)

    def seal(self) -> Iterable[Piece]:
        """The absmax state of the whole tensor."""
        training, scales = self._layout.training, self._scales
        if not training.double_quant:
            return self._layout.sealed(self._spec, StoredScales(scales))
        offset = self._offset()
        exact = training.exact_nested and self._layout.as_trained
        codes, nested_absmax = nested.encode(scales, offset, exact)
        return self._layout.sealed(self._spec, StoredScales(scales, codes, nested_absmax, float(offset)))

    def _offset(self) -> np.float32:
        """The mean of training by whose rules this is sealed, else that of these weights."""
        recorded = self._layout.training.modules.get(self._spec.module)
        if self._layout.as_trained and recorded is not None and recorded.nested_offset is not None:
            return np.float32(recorded.nested_offset)
        return nested.mean(self._scales)


class FourBitDitherer:
    """Codes of a stored weight with a delta added by chance; scales that need not grow keep their bytes."""

    def __init__(self, spec: TensorSpec, layout: FourBit, stored: StoredScales) -> None:
        self._spec = spec
        self._layout = layout
        self._stored = stored
        self._block = layout.training.block_size
        self._scales = stored.scales.copy()
        self._key = dithering.key_of(layout.seed, spec.name)

    def dither(self, codes: NDArray[np.uint8], delta: Float32, first_row: int) -> Iterable[Piece]:
        """The rows' new codes at their place."""
        first = first_row * self._spec.columns
        first_block = first // self._block
        scales = self._scales[first_block : first_block - (-len(delta) // self._block)]
        changed = dithering.dither(codes, scales, kernels.to_host(delta), self._block, self._key, first)
        yield Piece(self._spec.name, first // 2, changed)

    def seal(self) -> Iterable[Piece]:
        """The absmax state: the stored one, but for blocks whose scale grew."""
        stored, scales = self._stored, self._scales
        if stored.codes is None or stored.nested_absmax is None:
            return self._layout.sealed(self._spec, StoredScales(scales))
        offset, grown = np.float32(stored.offset), scales != stored.scales
        largest = stored.nested_absmax.copy()
        np.maximum.at(largest, np.flatnonzero(grown) // nested.BLOCK, np.abs(scales[grown] - offset))
        wider = np.repeat(largest != stored.nested_absmax, nested.BLOCK)[: scales.size]
        fitted = nested.codes_on(scales, largest, offset)
        codes = np.where(grown | wider, fitted, stored.codes)
        return self._layout.sealed(self._spec, StoredScales(scales, codes, largest, stored.offset))
