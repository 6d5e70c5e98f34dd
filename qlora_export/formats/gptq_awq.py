"""4-bit integers in the layouts of GPTQ and AWQ, rounded to nearest: `gptq` (symmetric) and `awq` (with zero points).

For a linear `x.weight` of shape [out, in] in groups of `size` columns (option `group_size`: 32, 64 or 128):

    gptq   `x.qweight` int32 [in / 8, out], eight inputs a word; `x.g_idx` int32 [in], the group of each input
    awq    `x.qweight` int32 [in, out / 8], eight outputs a word in the order 0, 2, 4, 6, 1, 3, 5, 7
    both   `x.qzeros` int32 [groups, out / 8] (gptq: zero - 1, in plain order); `x.scales` float16 [groups, out]

w' = (nibble - zero) * scale, zero 8 for gptq. A scale is a value of the model's dtype and of float16 alike, so
that a loader that casts it to the one it computes in changes nothing. For 16-bit models `gptq` has the integers of
`w4a16`.
Words of a tensor are interleaved over its rows, so an encoder holds half a byte a weight until the seal.
Sources: AutoGPTQ `checkpoint_format: gptq`, AutoAWQ `version: gemm`. Cost: 4.16 bits a weight in groups of 128.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import InputError
from qlora_export.formats.base import Chosen, GridFormat, LevelGrid, Stored
from qlora_export.formats.rows import ANOTHER_FORMAT, GROUP_SIZES, require_choice, rows_in
from qlora_export.quant import integers
from qlora_export.quant.floats import all_finite
from qlora_export.quant.gptq_awq_packing import (
    AWQ_ORDER,
    PER_WORD,
    PLAIN_ORDER,
    pack_inputs,
    pack_outputs,
    unpack_inputs,
    unpack_outputs,
)
from qlora_export.quant.integers import Grid
from qlora_export.quant.mse_scales import search_groups
from qlora_export.quant.scales import Int8
from qlora_export.tensors.dtypes import ITEM_BYTES, narrow, widen
from qlora_export.types import Float32, Part, Piece, TensorSpec, TrainingQuantization

SMALLEST_HALF = np.float32(2.0**-24)


@dataclass(frozen=True, kw_only=True)
class Interleaved(GridFormat):
    """Weights on an integer grid in words over [in, out]: `gptq` along the inputs, `awq` along the outputs."""

    integers: Grid
    beside_experts: bool = False

    @property
    def along_inputs(self) -> bool:
        """Whether a word holds inputs of one output: symmetric, as GPTQ packs them."""
        return self.integers.symmetric

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Groups and words are whole, layers are `Linear`."""
        if self.integers.group and spec.columns % self.integers.group:
            return f"{spec.columns} columns are no multiple of the group of {self.integers.group}"
        if spec.rows % PER_WORD:
            return f"{spec.rows} rows are no multiple of {PER_WORD}, the zero points of a word"
        return f"its module is a Conv1D, and {self.name} is of Linear layers" if input_major else None

    def row_multiple(self, spec: TensorSpec) -> int:
        """Outputs of a word."""
        return 1 if self.along_inputs else PER_WORD

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Words, zero points and scales; for gptq also the group of each input."""
        module, groups = spec.module, self.integers.groups(spec.columns)
        words = (spec.columns // PER_WORD, spec.rows) if self.along_inputs else (spec.columns, spec.rows // PER_WORD)
        parts = (
            Part(f"{module}.qweight", "I32", words),
            Part(f"{module}.qzeros", "I32", (groups, spec.rows // PER_WORD)),
            Part(f"{module}.scales", "F16", (groups, spec.rows)),
        )
        return (*parts, Part(f"{module}.g_idx", "I32", (spec.columns,))) if self.along_inputs else parts

    def held_bytes(self, spec: TensorSpec) -> int:
        """All parts."""
        return sum(prod(part.shape) * ITEM_BYTES[part.dtype] for part in self.parts(spec))

    def open(self, spec: TensorSpec) -> InterleavedEncoder:
        """Start encoding a tensor."""
        return InterleavedEncoder(spec, self)

    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of some rows, before rounding to the dtype."""
        codes, zeros = self._codes(spec, parts, rows)
        scales = self._scales(spec, parts, rows)
        out = np.empty(codes.shape, np.float32)
        integers.decode(codes, scales, zeros, out)
        return out.reshape(-1)

    def _scales(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Of some rows [rows, groups]."""
        stored = parts[f"{spec.module}.scales"].view(np.float16).reshape(-1, spec.rows)
        return np.ascontiguousarray(stored[:, rows.start : rows.stop].T).astype(np.float32)

    def _codes(self, spec: TensorSpec, parts: Stored, rows: range) -> tuple[Int8, Int8]:
        """Codes [rows, columns] and zero points [rows, groups] of some rows."""
        found = {part.name.rpartition(".")[2]: _of_part(parts[part.name], part) for part in self.parts(spec)}
        words = slice(rows.start // PER_WORD, -(-rows.stop // PER_WORD))
        codes = np.empty((len(rows), spec.columns), np.int8)
        zeros = np.zeros((len(rows), self.integers.groups(spec.columns)), np.int8)
        if self.along_inputs:
            unpack_inputs(found["qweight"][:, rows.start : rows.stop], codes)
        else:
            unpack_outputs(found["qweight"][:, words], AWQ_ORDER, codes)
            unpack_outputs(found["qzeros"][:, words], AWQ_ORDER, zeros)
        return codes, zeros

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """All integers of 4 bits around zero; `awq` states the zero point of 8 for them, as `gptq` has it."""
        scales: Literal["BF16", "F16"] = "BF16" if self.integers.dtype == "BF16" else "F16"
        return LevelGrid(self.integers.levels, self.integers.group or spec.columns, scales)

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Every part, whole."""
        encoder = InterleavedEncoder(spec, self)
        encoder.take(self.integers.codes(chosen.codes), chosen.scales)
        return encoder.seal()

    def chosen(self, spec: TensorSpec, parts: Stored) -> Chosen:
        """Numbers of levels and the scales; zero points other than 8 have none and are not asked for."""
        whole = range(spec.rows)
        codes, _ = self._codes(spec, parts, whole)
        return Chosen(self.integers.numbers(codes), self._scales(spec, parts, whole))

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """What the loaders of AutoGPTQ and AutoAWQ, GPTQModel and vLLM read."""
        facts = {"bits": self.integers.bits, "group_size": self.integers.group}
        if not self.along_inputs:
            method = {"quant_method": "awq", "version": "gemm", "zero_point": True}
            return {**method, **facts, "modules_to_not_convert": list(kept)}
        # GPTQModel's rules: a pattern after `-:` names modules that are left alone; `lm_head` has a key of its own.
        dense: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in kept if name != "lm_head"}
        method = {"quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, "sym": True}
        return {**method, **facts, "lm_head": False, "pack_dtype": "int32", "dynamic": dense}


class InterleavedEncoder:
    """Codes rows into the words of the whole tensor, which the seal writes."""

    def __init__(self, spec: TensorSpec, layout: Interleaved) -> None:
        self._spec = spec
        self._layout = layout
        self._held = {
            part.name.rpartition(".")[2]: np.empty(part.shape, np.float16 if part.dtype == "F16" else np.uint32)
            for part in layout.parts(spec)
        }

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Codes, zero points and scales of some rows into their columns; nothing is ready before the seal."""
        grid = self._layout.integers
        rows = rows_in(values, self._spec, grid.dtype)
        scales, zeros = integers.fit(rows, grid)
        if self._layout.searches:
            stored = replace(grid, dtype="F16" if grid.dtype == "F32" else grid.dtype)
            scales = search_groups(rows, self._in_half(scales), zeros, stored)
        scales = self._in_half(scales)
        codes = np.empty(rows.shape, np.int8)
        held, last_row = self._held, first_row + len(rows)
        if self._layout.along_inputs:
            integers.encode(rows, scales, zeros, grid, codes)
            pack_inputs(codes, first_row, held["qweight"])
        else:
            integers.encode(rows, scales, zeros, replace(grid, dtype="F32"), codes)
            pack_outputs(codes, first_row, AWQ_ORDER, held["qweight"])
            pack_outputs(zeros, first_row, AWQ_ORDER, held["qzeros"])
        held["scales"][:, first_row:last_row] = scales.T
        return ()

    def take(self, codes: Int8, scales: Float32) -> None:
        """All rows, already coded [rows, columns] with scales [rows, groups]."""
        held = self._held
        held["scales"][:] = self._in_half(scales).T
        if self._layout.along_inputs:
            pack_inputs(codes, 0, held["qweight"])
        else:
            pack_outputs(codes, 0, AWQ_ORDER, held["qweight"])
            pack_outputs(np.zeros(scales.shape, np.int8), 0, AWQ_ORDER, held["qzeros"])

    def seal(self) -> Iterable[Piece]:
        """Everything."""
        if self._layout.along_inputs:
            groups, rows = self._held["scales"].shape
            below = np.full((rows, groups), -1, np.int8)  # the zero point of 8 is stored as 7
            pack_outputs(below, 0, PLAIN_ORDER, self._held["qzeros"])
            size = np.uint32(self._layout.integers.group or self._spec.columns)
            self._held["g_idx"][:] = np.arange(self._spec.columns, dtype=np.uint32) // size
        for name, held in self._held.items():
            yield Piece(f"{self._spec.module}.{name}", 0, held.reshape(-1).view(np.uint8))

    def _in_half(self, scales: Float32) -> Float32:
        """Scales as float16 has them, none of them zero."""
        half = widen(narrow(scales.reshape(-1), "F16"), "F16").reshape(scales.shape)
        if not all_finite(half.reshape(-1).view(np.uint32)):
            limit = f"{self._layout.name} stores scales in float16, up to 65504"
            raise InputError(f"tensor {self._spec.name} needs a scale of {scales.max():.6g}, {limit}", ANOTHER_FORMAT)
        return np.maximum(half, SMALLEST_HALF)


def _of_part(raw: NDArray[np.uint8], part: Part) -> NDArray[Any]:
    return raw.view(np.float16 if part.dtype == "F16" else np.uint32).reshape(part.shape)


def gptq(training: TrainingQuantization, *, group_size: int = 128) -> Interleaved:
    """Merged weights in GPTQ's layout, symmetric; raises UsageError for another group size."""
    return _interleaved("gptq", training, group_size, True)


def awq(training: TrainingQuantization, *, group_size: int = 128) -> Interleaved:
    """Merged weights in AWQ's layout, with zero points; raises UsageError for another group size."""
    return _interleaved("awq", training, group_size, False)


def _interleaved(name: str, training: TrainingQuantization, group_size: int, symmetric: bool) -> Interleaved:
    require_choice(name, "group_size", group_size, GROUP_SIZES)
    dtype = training.storage_dtype
    return Interleaved(name=name, dense_dtype=dtype, integers=Grid(4, group_size, symmetric, dtype))
