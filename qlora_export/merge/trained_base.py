"""The base as the adapter saw it: `round(decode(nf4(round(W))))`, one module at a time.

The stored weight is rounded to the dtype it was loaded in, quantised to NF4 with (double-quantised) absmax, decoded in
float32, and rounded to the dtypes it passed on its way into the matrix product. Double quantisation needs the absmax of
the whole tensor before the first row can be decoded, so every tensor is passed over twice; the state between costs
4 bytes for each block of 64 weights. The codes and the absmax state are hashed on the way and must equal the sidecar's.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np

from qlora_export.errors import InputError
from qlora_export.quant import double_quant, four_bit
from qlora_export.quant.device import kernels
from qlora_export.quant.device.kernels import Values
from qlora_export.quant.floats import Float32, UInt8, all_finite
from qlora_export.sources.sidecar import absmax_sha256
from qlora_export.tensors.dtypes import round_to
from qlora_export.types import TensorSpec, TrainedModule, TrainingQuantization


class TrainedBase:
    """One NF4 tensor of the as-trained base: observe every row once, settle, then ask for rows in any order."""

    def __init__(self, spec: TensorSpec, training: TrainingQuantization) -> None:
        self._spec = spec
        self._training = training
        self._recorded = training.modules.get(spec.module)
        self._absmax = np.zeros(-(-spec.size // training.block_size), np.float32)
        self._scales = self._absmax
        self._codes_digest = _OrderedDigest()
        self._absmax_sha256 = ""
        self._second_level: tuple[float, Float32] | None = None

    @property
    def scales(self) -> Float32:
        """What the absmax of every block decodes to, once it is settled."""
        return self._scales

    @property
    def second_level(self) -> tuple[float, Float32] | None:
        """Offset and nested absmax of double quantisation, once it is settled."""
        return self._second_level

    def observe(self, values: Values, first_row: int) -> bool:
        """Take note of the absmax of flat rows, which hold whole blocks; whether all of them are finite."""
        absmax = self._blocks(self._absmax, values, first_row)
        kernels.block_absmax(values, self._training.block_size, absmax)
        return bool(all_finite(absmax.view(np.uint32)))

    def settle(self) -> None:
        """Quantise the absmax of the whole tensor."""
        if not self._training.double_quant:
            if self._recorded is not None:
                self._absmax_sha256 = hashlib.sha256(self._absmax.tobytes()).hexdigest()
            return
        offset = double_quant_offset(self._absmax, self._recorded)
        codes, nested_absmax = double_quant.encode(self._absmax, offset, self._training.exact_nested)
        self._scales = double_quant.decode(codes, nested_absmax, offset)
        self._second_level = (float(offset), nested_absmax)
        if self._recorded is not None:
            self._absmax_sha256 = absmax_sha256(codes, nested_absmax, offset)

    def rows(self, values: Values, first_row: int) -> Values:
        """The same rows as training multiplied with, a new array; every row passes here exactly once."""
        absmax, scales = self._blocks(self._absmax, values, first_row), self._blocks(self._scales, values, first_row)
        if self._recorded is not None:
            codes = kernels.encode_four_bit(values, absmax, self._training.block_size, four_bit.NF4)
            self._codes_digest.update(first_row * self._spec.columns // 2, codes)
        out = kernels.round_trip(values, absmax, scales, self._training.block_size, four_bit.NF4)
        for dtype in self._training.weight_roundings:
            out = round_to(out, dtype)
        return out

    def require_recorded(self) -> None:
        """Raise InputError unless codes and absmax state are those of the sidecar."""
        if self._recorded is None:
            return
        for what, ours, theirs in (
            ("codes", self._codes_digest.hexdigest(), self._recorded.codes_sha256),
            ("absmax state", self._absmax_sha256, self._recorded.absmax_sha256),
        ):
            if ours != theirs:
                raise InputError(
                    f"{self._spec.name}: the NF4 {what} of this base have sha256 {ours[:12]}, "
                    f"the adapter was trained on {theirs[:12]}",
                    "this is not the base that the adapter saw: check revision and dtype of the base",
                )

    def _blocks(self, per_block: Float32, values: Values, first_row: int) -> Float32:
        """The slice of a per-block array that belongs to these rows."""
        first = first_row * self._spec.columns // self._training.block_size
        return per_block[first : first - (-len(values) // self._training.block_size)]


def double_quant_offset(absmax: Float32, recorded: TrainedModule | None) -> np.float32:
    """The mean that double quantisation subtracts: the recorded one, since it depends on torch's threads, or ours."""
    if recorded is not None and recorded.nested_offset is not None:
        return np.float32(recorded.nested_offset)
    return double_quant.mean(absmax)


class _OrderedDigest:
    """sha256 of a byte string whose pieces arrive in any order; early ones wait."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._position = 0
        self._waiting: dict[int, UInt8] = {}
        self._lock = threading.Lock()

    def update(self, position: int, data: UInt8) -> None:
        with self._lock:
            self._waiting[position] = data
            while (piece := self._waiting.pop(self._position, None)) is not None:
                self._digest.update(piece.data)
                self._position += piece.nbytes

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
