"""bitsandbytes LLM.int8: `int8`, merged weights in 8 bits with one absmax a row.

For a linear `x.weight` of shape [out, in]: `x.weight` int8 [out, in]; `x.SCB` float32 [out], the absmax of each row;
`x.weight_format` uint8 scalar, 0: rows in their order. A weight is rounded to the model's dtype, then to fp16, as it is
when transformers quantises a saved model. On a GPU bitsandbytes rounds activations to int8 as well, but for columns
that reach `llm_int8_threshold`; on a CPU it multiplies with the decoded weights. Source: bitsandbytes
`nn.modules.Int8Params`, `Linear8bitLt._save_to_state_dict`. Cost: 8 bits a weight, and 4 bytes a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import InputError
from qlora_export.formats.base import Chosen, LevelGrid
from qlora_export.quant import llm_int8
from qlora_export.quant.device import kernels
from qlora_export.quant.floats import all_finite
from qlora_export.quant.scales import Int8 as Codes
from qlora_export.quant.scales import absmax
from qlora_export.tensors.dtypes import narrow, round_to, widen
from qlora_export.types import Consumes, Float32, Part, Piece, Rounding, TensorSpec, TrainingQuantization

THRESHOLD = 6.0
LAST = 127


@dataclass(frozen=True)
class Int8:
    """Rows of int8 in bitsandbytes' layout; what is not quantised has the dtype the base was loaded in."""

    dense_dtype: str
    name: str = "int8"
    consumes: Consumes = "merged"
    quantises: bool = True
    keeps_adapter: bool = False
    beside_experts: bool = True
    searches: bool = False
    roundings: tuple[Rounding, ...] = ("search",)

    def rounded(self, rounding: Rounding, training: TrainingQuantization, seed: int) -> Int8:
        """With absmax that a search finds; what is larger has the last code."""
        return replace(self, searches=rounding == "search")

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """None: bitsandbytes has layers for both orders."""
        return None

    def row_multiple(self, spec: TensorSpec) -> int:
        """Any row stands alone."""
        return 1

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes, absmax, and the mark of their order."""
        return (
            Part(spec.name, "I8", spec.shape),
            Part(f"{spec.module}.SCB", "F32", (spec.rows,)),
            Part(f"{spec.module}.weight_format", "U8", ()),
        )

    def open(self, spec: TensorSpec) -> Int8Encoder:
        """Start encoding a tensor."""
        return Int8Encoder(spec, self.dense_dtype, self.searches)

    def decode(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of some rows."""
        codes = parts[spec.name][rows.start * spec.columns : rows.stop * spec.columns].view(np.int8)
        largest = np.array(parts[f"{spec.module}.SCB"][4 * rows.start : 4 * rows.stop]).view(np.float32)
        out = np.empty((len(rows), spec.columns), np.float32)
        llm_int8.decode(codes.reshape(out.shape), largest.reshape(-1, 1), out)
        return out.reshape(-1)

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """The integers up to 127 in parts of it, and one absmax a row."""
        return LevelGrid(tuple(float(level) for level in llm_int8.LEVELS), spec.columns, "F32")

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes, absmax, and the mark of their order."""
        encoder = Int8Encoder(spec, self.dense_dtype)
        yield from encoder.pieces((chosen.codes.astype(np.int16) - LAST).astype(np.int8), chosen.scales, 0)
        yield from encoder.seal()

    def chosen(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]]) -> Chosen:
        """Numbers of levels and the absmax."""
        codes = (parts[spec.name].view(np.int8).astype(np.int16) + LAST).astype(np.uint8)
        largest = np.array(parts[f"{spec.module}.SCB"]).view(np.float32)
        return Chosen(codes.reshape(spec.shape), largest.reshape(-1, 1))

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


@dataclass(frozen=True)
class Int8Encoder:
    """Rounds rows; keeps no state."""

    spec: TensorSpec
    dtype: str
    searches: bool = False

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Codes and absmax of some rows; raises InputError for a value that fp16 cannot hold."""
        rounded = round_to(widen(narrow(values, self.dtype), self.dtype), "F16")
        if not all_finite(rounded.view(np.uint32)):
            most = np.abs(kernels.to_host(values)).max()
            raise InputError(
                f"tensor {self.spec.name} holds {most:.6g}, int8 weights pass float16, up to 65504",
                "choose another format for this artifact, or `keep` the module dense",
            )
        rows = rounded.reshape(-1, self.spec.columns)
        largest, codes = np.empty((len(rows), 1), np.float32), np.empty(rows.shape, np.int8)
        absmax(rows, largest)
        if self.searches:
            largest = llm_int8.searched_absmax(rows, largest)
            rows = np.clip(rows, -largest, largest)
        llm_int8.encode(rows, largest, codes)
        yield from self.pieces(codes, largest, first_row)

    def pieces(self, codes: Codes, largest: Float32, first_row: int) -> Iterable[Piece]:
        """Rows of codes and their absmax at their places."""
        yield Piece(self.spec.name, first_row * self.spec.columns, codes.reshape(-1).view(np.uint8))
        yield Piece(f"{self.spec.module}.SCB", 4 * first_row, largest.reshape(-1).view(np.uint8))

    def seal(self) -> Iterable[Piece]:
        """Zero: rows in their order."""
        yield Piece(f"{self.spec.module}.weight_format", 0, np.zeros(1, np.uint8))


def int8(training: TrainingQuantization) -> Int8:
    """Merged weights in int8."""
    return Int8(training.storage_dtype)
