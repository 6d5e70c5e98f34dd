"""bitsandbytes LLM.int8: `int8`, merged weights in 8 bits with one absmax a row.

For a linear `x.weight` of shape [out, in]: `x.weight` int8 [out, in]; `x.SCB` float32 [out], the absmax of each row;
`x.weight_format` uint8 scalar, 0: rows in their order. A weight is rounded to the model's dtype, then to fp16, as it is
when transformers quantises a saved model. On a GPU bitsandbytes rounds activations to int8 as well, but for columns
that reach `llm_int8_threshold`; on a CPU it multiplies with the decoded weights. Source: bitsandbytes
`nn.modules.Int8Params`, `Linear8bitLt._save_to_state_dict`. Cost: 8 bits a weight, and 4 bytes a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_export.formats.base import Chosen, GridFormat, LevelGrid, RowEncoder, Stored
from qlora_export.formats.rows import ANOTHER_FORMAT, overflow, row_piece, stored_rows
from qlora_export.quant import llm_int8
from qlora_export.quant.floats import all_finite
from qlora_export.quant.scales import Int8 as Codes
from qlora_export.quant.scales import group_absmax
from qlora_export.tensors.dtypes import narrow, round_to, widen
from qlora_export.types import Float32, Part, Piece, TensorSpec, TrainingQuantization

THRESHOLD = 6.0
LAST = 127


@dataclass(frozen=True, kw_only=True)
class Int8(GridFormat):
    """Rows of int8 in bitsandbytes' layout, which has layers for both orders of a weight."""

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes, absmax, and the mark of their order."""
        return (
            Part(spec.name, "I8", spec.shape),
            Part(f"{spec.module}.SCB", "F32", (spec.rows,)),
            Part(f"{spec.module}.weight_format", "U8", ()),
        )

    def open(self, spec: TensorSpec) -> RowEncoder:
        """Start encoding a tensor."""
        return RowEncoder(self._encode, spec, self._known(spec))

    def _encode(self, spec: TensorSpec, values: Float32, first_row: int) -> Iterable[Piece]:
        """Raises InputError for a value that fp16 cannot hold."""
        rounded = round_to(widen(narrow(values, self.dense_dtype), self.dense_dtype), "F16")
        if not all_finite(rounded.view(np.uint32)):
            raise overflow(values, spec, "int8 weights pass float16, up to 65504", ANOTHER_FORMAT)
        rows = rounded.reshape(-1, spec.columns)
        largest, codes = group_absmax(rows, 1), np.empty(rows.shape, np.int8)
        if self.searches:
            largest = llm_int8.searched_absmax(rows, largest)
            rows = np.clip(rows, -largest, largest)
        llm_int8.encode(rows, largest, codes)
        return self._pieces(spec, codes, largest, first_row)

    def _pieces(self, spec: TensorSpec, codes: Codes, largest: Float32, first_row: int) -> Iterable[Piece]:
        of_codes, of_absmax, _ = self.parts(spec)
        return row_piece(of_codes, codes, first_row), row_piece(of_absmax, largest, first_row)

    def _known(self, spec: TensorSpec) -> tuple[Piece, ...]:
        """Zero: rows in their order."""
        return (row_piece(self.parts(spec)[2], np.zeros(1, np.uint8), 0),)

    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of some rows."""
        codes, largest = (stored_rows(parts, part, rows) for part in self.parts(spec)[:2])
        out = np.empty((len(rows), spec.columns), np.float32)
        llm_int8.decode(codes, largest, out)
        return out.reshape(-1)

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """The integers up to 127 in parts of it, and one absmax a row."""
        return LevelGrid(tuple(float(level) for level in llm_int8.LEVELS), spec.columns, "F32")

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes, absmax, and the mark of their order."""
        codes = (chosen.codes.astype(np.int16) - LAST).astype(np.int8)
        return *self._pieces(spec, codes, chosen.scales, 0), *self._known(spec)

    def chosen(self, spec: TensorSpec, parts: Stored) -> Chosen:
        """Numbers of levels and the absmax."""
        codes, largest = (stored_rows(parts, part, range(spec.rows)) for part in self.parts(spec)[:2])
        return Chosen((codes.astype(np.int16) + LAST).astype(np.uint8).reshape(spec.shape), largest)

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """What transformers' bitsandbytes loader reads; `kept` lists every linear module that stays dense."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_skip_modules": list(kept),
            "llm_int8_threshold": THRESHOLD,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }


def int8(training: TrainingQuantization) -> Int8:
    """Merged weights in int8."""
    return Int8(name="int8", dense_dtype=training.storage_dtype)
