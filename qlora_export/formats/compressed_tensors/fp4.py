"""compressed-tensors in 4-bit floats: `nvfp4a16` and `mxfp4a16`, merged weights in e2m1 with activations in 16 bits.

For a linear `x.weight` of shape [out, in]: `x.weight_packed` uint8 [out, in / 2], the first of a pair the low nibble;
nvfp4a16: `x.weight_scale` float8_e4m3fn [out, in / 16]; `x.weight_global_scale` float32 [1]
mxfp4a16: `x.weight_scale` uint8 [out, in / 32], an exponent with bias 127 (E8M0)
Equations: `quant/float4.py`. The library decodes to bf16, so everything dense is bf16 too, whatever the base is in.

The global scale of NVFP4 is the same for every layer (option `global_scale`, a power of two from 16 to 4096). vLLM
fuses q, k, v and gate, up, and takes the largest of their global scales for all of them: if each tensor had its own, it
would compute with other weights than these. It only shifts the range in which local scales have their three bits,
groups with magnitudes from 0.094 / global to 2688 / global: 3.7e-4 to 10.5 for 256. What is larger is refused.
Source: compressed-tensors `compressors/nvfp4`, `compressors/mxfp4`. Cost: 4.5 and 4.25 bits a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_export.formats.base import Chosen, GridFormat, LevelGrid, RowEncoder, Stored
from qlora_export.formats.compressed_tensors.config import INPUT_MAJOR, WIDER_DTYPE, arguments, table
from qlora_export.formats.rows import overflow, require_choice, row_piece, rows_in, stored_rows
from qlora_export.quant import float4, float8
from qlora_export.quant.floats import UInt8
from qlora_export.quant.mse_float_scales import E2M1, search_float_groups
from qlora_export.quant.ordered_codes import E2M1 as ORDER
from qlora_export.types import Float32, Part, Piece, TensorSpec, TrainingQuantization

GLOBAL_SCALES = tuple(1 << power for power in range(4, 13))


@dataclass(frozen=True, kw_only=True)
class Float4(GridFormat):
    """Weights in e2m1; with a `global_scale` NVFP4 in groups of 16, without one MXFP4 in groups of 32."""

    group: int
    global_scale: int | None
    dense_dtype: str = "BF16"
    beside_experts: bool = False

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Groups are whole, layers are `Linear`."""
        if spec.columns % self.group:
            return f"{spec.columns} columns are no multiple of the group of {self.group}"
        return INPUT_MAJOR if input_major else None

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes and scales."""
        module, kind = spec.module, "U8" if self.global_scale is None else "F8_E4M3"
        packed = Part(f"{module}.weight_packed", "U8", (spec.rows, spec.columns // 2))
        scales = Part(f"{module}.weight_scale", kind, (spec.rows, spec.columns // self.group))
        known = Part(f"{module}.weight_global_scale", "F32", (1,))
        return (packed, scales) if self.global_scale is None else (packed, scales, known)

    def open(self, spec: TensorSpec) -> RowEncoder:
        """Start encoding a tensor."""
        return RowEncoder(self._encode, spec, self._known(spec))

    def _encode(self, spec: TensorSpec, values: Float32, first_row: int) -> Iterable[Piece]:
        """Raises InputError beyond the range of the global scale."""
        rows = rows_in(values, spec, self.dense_dtype, WIDER_DTYPE)
        if self.global_scale is None:
            scales, vanishing = float4.fit_mxfp4(rows, self.group), float4.VANISHING_BFLOAT16
        else:
            self._require_in_range(spec, rows, self.global_scale)
            scales, vanishing = float4.fit_nvfp4(rows, self.group, self.global_scale), float4.NOTHING
        steps = self._steps(scales, self.global_scale)
        if self.searches:
            steps = search_float_groups(rows, steps, E2M1, self._storable)
        codes = np.empty((len(rows), spec.columns // 2), np.uint8)
        float4.encode(rows, steps, vanishing, codes)
        return self._pieces(spec, codes, steps, first_row)

    def _pieces(self, spec: TensorSpec, codes: UInt8, steps: Float32, first_row: int) -> Iterable[Piece]:
        packed, scales = self.parts(spec)[:2]
        return row_piece(packed, codes, first_row), row_piece(scales, self._scales(steps), first_row)

    def _known(self, spec: TensorSpec) -> tuple[Piece, ...]:
        """The global scale."""
        return tuple(row_piece(part, np.array([self.global_scale], np.float32), 0) for part in self.parts(spec)[2:])

    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of some rows, before rounding to bf16."""
        out = np.empty((len(rows), spec.columns), np.float32)
        codes = stored_rows(parts, self.parts(spec)[0], rows)
        float4.decode(codes, self._stored_steps(spec, parts, rows), float4.VALUES, out)
        return out.reshape(-1)

    def _stored_steps(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Of some rows [rows, groups]."""
        _, scales, *known = self.parts(spec)
        global_scale = float(stored_rows(parts, known[0], range(1))[0, 0]) if known else None
        return self._steps(stored_rows(parts, scales, rows), global_scale)

    def _scales(self, steps: Float32) -> UInt8:
        """The stored scales nearest to steps of any shape."""
        if self.global_scale is None:
            return float4.mxfp4_exponents(steps)
        return float4.nvfp4_scales(steps, self.global_scale)

    def _steps(self, scales: UInt8, global_scale: float | None) -> Float32:
        """The steps of stored scales of any shape."""
        return float4.mxfp4_steps(scales) if global_scale is None else float4.nvfp4_steps(scales, global_scale)

    def _storable(self, steps: Float32) -> Float32:
        return self._steps(self._scales(steps), self.global_scale)

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """The values of e2m1."""
        if self.global_scale is None:
            return LevelGrid(ORDER.levels, self.group, "F8_E8M0")
        return LevelGrid(ORDER.levels, self.group, "F8_E4M3", global_scale=self.global_scale)

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes and scales."""
        codes = ORDER.codes[chosen.codes]
        packed = codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))
        return *self._pieces(spec, packed, chosen.scales, 0), *self._known(spec)

    def chosen(self, spec: TensorSpec, parts: Stored) -> Chosen:
        """Numbers of levels, of either zero the same, and the steps."""
        packed = parts[self.parts(spec)[0].name]
        codes = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)
        return Chosen(ORDER.numbers[codes.reshape(spec.shape)], self._stored_steps(spec, parts, range(spec.rows)))

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The table of compressed-tensors."""
        layout, strategy, dtype = "nvfp4-pack-quantized", "tensor_group", "torch.float8_e4m3fn"
        if self.global_scale is None:
            layout, strategy, dtype = "mxfp4-pack-quantized", "group", "torch.uint8"
        cut = {"group_size": self.group, "strategy": strategy, "dynamic": False, "scale_dtype": dtype}
        return table(layout, arguments(4, "float", True, cut), None, kept)

    def _require_in_range(self, spec: TensorSpec, rows: Float32, global_scale: int) -> None:
        most, largest = float8.LARGEST * float4.LARGEST, float(np.abs(rows).max(initial=0))
        if largest > most / global_scale:
            fitting = [scale for scale in GLOBAL_SCALES if largest * scale <= most]
            hint = f"options: {{global_scale: {max(fitting)}}}" if fitting else "`keep` the module dense"
            limit = f"{self.name} with a global scale of {global_scale} ends at {most / global_scale:.6g}"
            raise overflow(rows, spec, limit, f"{hint} for this artifact")


def nvfp4a16(training: TrainingQuantization, *, global_scale: int = 256) -> Float4:
    """Merged weights in NVFP4; raises UsageError for another global scale."""
    require_choice("nvfp4a16", "global_scale", global_scale, GLOBAL_SCALES)
    return Float4(name="nvfp4a16", group=16, global_scale=global_scale)


def mxfp4a16(training: TrainingQuantization) -> Float4:
    """Merged weights in MXFP4."""
    return Float4(name="mxfp4a16", group=32, global_scale=None)
