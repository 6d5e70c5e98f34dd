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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import InputError, UsageError
from qlora_export.formats.base import Chosen, LevelGrid
from qlora_export.formats.compressed_tensors.config import INPUT_MAJOR, arguments, rows_in, table
from qlora_export.quant import float4, float8, ordered_codes
from qlora_export.quant.mse_float_scales import E2M1, search_float_groups
from qlora_export.types import Consumes, Float32, Part, Piece, Rounding, TensorSpec, TrainingQuantization

GLOBAL_SCALES = tuple(1 << power for power in range(4, 13))
Raw = NDArray[np.uint8]


@dataclass(frozen=True)
class Float4:
    """Weights in e2m1; with a `global_scale` NVFP4 in groups of 16, without one MXFP4 in groups of 32."""

    name: str
    group: int
    global_scale: int | None
    dense_dtype: str = "BF16"
    consumes: Consumes = "merged"
    quantises: bool = True
    keeps_adapter: bool = False
    beside_experts: bool = False
    searches: bool = False
    roundings: tuple[Rounding, ...] = ("search",)

    def rounded(self, rounding: Rounding, training: TrainingQuantization, seed: int) -> Float4:
        """With scales that a search finds."""
        return replace(self, searches=rounding == "search")

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Groups are whole, layers are `Linear`."""
        if spec.columns % self.group:
            return f"{spec.columns} columns are no multiple of the group of {self.group}"
        return INPUT_MAJOR if input_major else None

    def row_multiple(self, spec: TensorSpec) -> int:
        """Any row stands alone."""
        return 1

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes and scales."""
        module, groups = spec.module, spec.columns // self.group
        packed = Part(f"{module}.weight_packed", "U8", (spec.rows, spec.columns // 2))
        if self.global_scale is None:
            return (packed, Part(f"{module}.weight_scale", "U8", (spec.rows, groups)))
        scales = Part(f"{module}.weight_scale", "F8_E4M3", (spec.rows, groups))
        return (packed, scales, Part(f"{module}.weight_global_scale", "F32", (1,)))

    def open(self, spec: TensorSpec) -> Float4Encoder:
        """Start encoding a tensor."""
        return Float4Encoder(spec, self)

    def decode(self, spec: TensorSpec, parts: Mapping[str, Raw], rows: range) -> Float32:
        """Flat float32 values of some rows, before rounding to bf16."""
        codes = _rows_of(parts[f"{spec.module}.weight_packed"], rows, spec.columns // 2)
        out = np.empty((len(rows), spec.columns), np.float32)
        float4.decode(codes, self._steps(spec, parts, rows), float4.VALUES, out)
        return out.reshape(-1)

    def _steps(self, spec: TensorSpec, parts: Mapping[str, Raw], rows: range) -> Float32:
        """Of some rows [rows, groups]."""
        scales = _rows_of(parts[f"{spec.module}.weight_scale"], rows, spec.columns // self.group)
        if self.global_scale is None:
            return float4.mxfp4_steps(scales)
        stored = np.array(parts[f"{spec.module}.weight_global_scale"]).view(np.float32)
        return float4.nvfp4_steps(scales, float(stored[0]))

    def scales_of(self, steps: Float32) -> Raw:
        """The stored scales nearest to steps of any shape."""
        if self.global_scale is None:
            return float4.mxfp4_exponents(steps)
        return float4.nvfp4_scales(steps, self.global_scale)

    def steps_of(self, scales: Raw) -> Float32:
        """The steps of stored scales of any shape."""
        if self.global_scale is None:
            return float4.mxfp4_steps(scales)
        return float4.nvfp4_steps(scales, self.global_scale)

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """The values of e2m1."""
        levels = ordered_codes.E2M1.levels
        if self.global_scale is None:
            return LevelGrid(levels, self.group, "F8_E8M0")
        return LevelGrid(levels, self.group, "F8_E4M3", global_scale=self.global_scale)

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes and scales."""
        encoder, codes = Float4Encoder(spec, self), ordered_codes.E2M1.codes[chosen.codes]
        yield from encoder.pieces(codes[:, ::2] | (codes[:, 1::2] << np.uint8(4)), self.scales_of(chosen.scales), 0)
        yield from encoder.seal()

    def chosen(self, spec: TensorSpec, parts: Mapping[str, Raw]) -> Chosen:
        """Numbers of levels, of either zero the same, and the steps."""
        packed = parts[f"{spec.module}.weight_packed"]
        codes = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)
        numbers = ordered_codes.E2M1.numbers[codes.reshape(spec.shape)]
        return Chosen(numbers, self._steps(spec, parts, range(spec.rows)))

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The table of compressed-tensors."""
        cut: dict[str, Any] = {"group_size": self.group, "strategy": "group", "dynamic": False}
        if self.global_scale is None:
            weights = arguments(4, "float", True, {**cut, "scale_dtype": "torch.uint8"})
            return table("mxfp4-pack-quantized", weights, None, kept)
        cut |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        return table("nvfp4-pack-quantized", arguments(4, "float", True, cut), None, kept)


@dataclass(frozen=True)
class Float4Encoder:
    """Codes rows; keeps no state."""

    spec: TensorSpec
    layout: Float4

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Codes and scales of some rows at their places; raises InputError beyond the range of the global scale."""
        rows = rows_in(values, self.spec, self.layout.dense_dtype)
        layout = self.layout
        if layout.global_scale is None:
            scales, vanishing = float4.fit_mxfp4(rows, layout.group), float4.VANISHING_BFLOAT16
        else:
            self._require_in_range(rows, layout.global_scale)
            scales, vanishing = float4.fit_nvfp4(rows, layout.group, layout.global_scale), float4.NOTHING
        if layout.searches:
            steps = layout.steps_of(scales)
            scales = layout.scales_of(search_float_groups(rows, steps, E2M1, self._stored))
        codes = np.empty((len(rows), self.spec.columns // 2), np.uint8)
        float4.encode(rows, layout.steps_of(scales), vanishing, codes)
        yield from self.pieces(codes, scales, first_row)

    def _stored(self, steps: Float32) -> Float32:
        return self.layout.steps_of(self.layout.scales_of(steps))

    def pieces(self, codes: Raw, scales: Raw, first_row: int) -> Iterable[Piece]:
        """Rows of packed codes and stored scales at their places."""
        yield Piece(f"{self.spec.module}.weight_packed", first_row * codes.shape[1], codes.reshape(-1))
        yield Piece(f"{self.spec.module}.weight_scale", first_row * scales.shape[1], scales.reshape(-1))

    def seal(self) -> Iterable[Piece]:
        """The global scale."""
        if self.layout.global_scale is not None:
            scale = np.array([self.layout.global_scale], np.float32)
            yield Piece(f"{self.spec.module}.weight_global_scale", 0, scale.view(np.uint8))

    def _require_in_range(self, rows: Float32, global_scale: int) -> None:
        most = float8.LARGEST * float4.LARGEST / global_scale
        largest = float(np.abs(rows).max(initial=0))
        if largest > most:
            fitting = [scale for scale in GLOBAL_SCALES if largest * scale <= float8.LARGEST * float4.LARGEST]
            hint = f"options: {{global_scale: {max(fitting)}}}" if fitting else "`keep` the module dense"
            raise InputError(
                f"tensor {self.spec.name} holds {largest:.6g}, "
                f"{self.layout.name} with a global scale of {global_scale} ends at {most:.6g}",
                f"{hint} for this artifact",
            )


def _rows_of(raw: Raw, rows: range, row_bytes: int) -> Raw:
    return np.array(raw[rows.start * row_bytes : rows.stop * row_bytes]).reshape(len(rows), row_bytes)


def nvfp4a16(training: TrainingQuantization, *, global_scale: int = 256) -> Float4:
    """Merged weights in NVFP4; raises UsageError for another global scale."""
    if global_scale not in GLOBAL_SCALES or isinstance(global_scale, bool):
        raise UsageError(
            f"nvfp4a16: global_scale {global_scale!r}; known: {', '.join(str(scale) for scale in GLOBAL_SCALES)}"
        )
    return Float4("nvfp4a16", 16, global_scale)


def mxfp4a16(training: TrainingQuantization) -> Float4:
    """Merged weights in MXFP4."""
    return Float4("mxfp4a16", 32, None)
