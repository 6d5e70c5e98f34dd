"""bitsandbytes NF4: `nf4` holds the merged weights, `nf4-adapter` the base of training with the adapter beside it.

For a linear `x.weight` of shape [out, in]: `x.weight` uint8 [ceil(out * in / 2), 1], the first code of a pair in the
high nibble; `x.weight.absmax` uint8 [blocks] (float32 without double quantisation); `x.weight.quant_map` float32 [16];
`x.weight.nested_absmax` float32 [ceil(blocks / 256)]; `x.weight.nested_quant_map` float32 [256];
`x.weight.quant_state.bitsandbytes__nf4` uint8, JSON padded with spaces to a length that does not depend on the
weights. Everything else stays dense in the dtype the base was loaded in. Source: bitsandbytes `QuantState.as_dict`.
Cost: 4.127 bits a weight.

`nf4` rounds to nearest, and so falls back onto the grid that the base already sits on: a delta smaller than half a
step changes no code. `nf4-adapter` keeps the codes that training saw and ships the adapter untouched, without drift.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.contracts import TORCH_NAMES, Consumes, Float32, Part, Piece, TensorSpec, TrainingQuantization
from qlora_export.device import kernels
from qlora_export.quant import four_bit, nested
from qlora_export.quant.four_bit import NF4 as GRID

STATE_SUFFIX = "quant_state.bitsandbytes__nf4"
LONGEST_OFFSET = -1.2345678901234567e-100


@dataclass(frozen=True)
class NF4:
    """NF4 weights in bitsandbytes' layout; `training` gives block size, dtypes and the absmax means of training."""

    name: str
    training: TrainingQuantization
    consumes: Consumes = "merged"
    quantises: bool = True
    keeps_adapter: bool = False

    @property
    def dense_dtype(self) -> str:
        """What is not quantised keeps the dtype the base was loaded in."""
        return self.training.storage_dtype

    def row_multiple(self, spec: TensorSpec) -> int:
        """Blocks run over row ends unless the rows hold whole blocks."""
        return four_bit.rows_of_whole_blocks(spec.columns, self.training.block_size)

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes, absmax state and the JSON state."""
        blocks = -(-spec.size // self.training.block_size)
        parts = [
            Part(spec.name, "U8", ((spec.size + 1) // 2, 1)),
            Part(f"{spec.name}.absmax", "U8" if self.training.double_quant else "F32", (blocks,)),
            Part(f"{spec.name}.quant_map", "F32", (16,)),
        ]
        if self.training.double_quant:
            parts += [
                Part(f"{spec.name}.nested_absmax", "F32", (-(-blocks // nested.BLOCK),)),
                Part(f"{spec.name}.nested_quant_map", "F32", (256,)),
            ]
        state_bytes = len(self.state(spec, np.float32(0)))
        return (*parts, Part(f"{spec.name}.{STATE_SUFFIX}", "U8", (state_bytes,)))

    def open(self, spec: TensorSpec) -> NF4Encoder:
        """Start encoding a tensor."""
        return NF4Encoder(spec, self)

    def decode(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of whole blocks of rows, before any rounding to the model's dtype."""
        block = self.training.block_size
        out = np.empty(len(rows) * spec.columns, np.float32)
        first = rows.start * spec.columns
        blocks = range(first // block, first // block - (-out.size // block))
        if self.training.double_quant:
            state = json.loads(parts[f"{spec.name}.{STATE_SUFFIX}"].tobytes())
            nested_absmax = parts[f"{spec.name}.nested_absmax"].view(np.float32)
            codes = parts[f"{spec.name}.absmax"][blocks.start : blocks.stop]
            scales = nested.decode(codes, nested_absmax, np.float32(state["nested_offset"]), blocks.start)
        else:
            scales = parts[f"{spec.name}.absmax"].view(np.float32)[blocks.start : blocks.stop]
        four_bit.decode(parts[spec.name][first // 2 : (first + out.size + 1) // 2], scales, block, GRID.codebook, out)
        return out

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """What transformers' bitsandbytes loader reads; `kept` lists every linear module that stays dense."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.training.double_quant,
            "bnb_4bit_compute_dtype": TORCH_NAMES[self.training.compute_dtype],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(kept),
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }

    def state(self, spec: TensorSpec, offset: np.float32) -> bytes:
        """The JSON state, padded with spaces to the length it has with the longest possible offset."""
        facts: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.training.block_size,
            "dtype": TORCH_NAMES[self.training.storage_dtype],
            "shape": list(spec.shape),
        }
        if self.training.double_quant:
            facts |= {"nested_blocksize": nested.BLOCK, "nested_dtype": "float32", "nested_offset": LONGEST_OFFSET}
        length = len(json.dumps(facts))
        if self.training.double_quant:
            facts["nested_offset"] = float(offset)
        return json.dumps(facts).encode().ljust(length + -length % 8)


class NF4Encoder:
    """Writes codes as rows come; the absmax of the whole tensor waits for the seal."""

    def __init__(self, spec: TensorSpec, layout: NF4) -> None:
        self._spec = spec
        self._layout = layout
        self._block = layout.training.block_size
        self._absmax = np.zeros(-(-spec.size // self._block), np.float32)

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """The rows' codes at their place."""
        first = first_row * self._spec.columns
        first_block = first // self._block
        absmax = self._absmax[first_block : first_block - (-len(values) // self._block)]
        kernels.block_absmax(values, self._block, absmax)
        yield Piece(self._spec.name, first // 2, kernels.encode_four_bit(values, absmax, self._block, GRID))

    def seal(self) -> Iterable[Piece]:
        """The absmax state of the whole tensor."""
        name, training = self._spec.name, self._layout.training
        yield Piece(f"{name}.quant_map", 0, GRID.codebook.view(np.uint8))
        offset = np.float32(0)
        if training.double_quant:
            offset = self._offset()
            exact = training.exact_nested and self._layout.consumes == "base"
            codes, nested_absmax = nested.encode(self._absmax, offset, exact)
            yield Piece(f"{name}.absmax", 0, codes)
            yield Piece(f"{name}.nested_absmax", 0, nested_absmax.view(np.uint8))
            yield Piece(f"{name}.nested_quant_map", 0, nested.dynamic_map().view(np.uint8))
        else:
            yield Piece(f"{name}.absmax", 0, self._absmax.view(np.uint8))
        state = self._layout.state(self._spec, offset)
        yield Piece(f"{name}.{STATE_SUFFIX}", 0, np.frombuffer(state, np.uint8))

    def _offset(self) -> np.float32:
        """The mean of training when it is the training's base that is encoded, else that of these weights."""
        recorded = self._layout.training.modules.get(self._spec.module)
        if self._layout.consumes == "base" and recorded is not None and recorded.nested_offset is not None:
            return np.float32(recorded.nested_offset)
        return nested.mean(self._absmax)


def nearest(training: TrainingQuantization) -> NF4:
    """Merged weights in NF4, blocks of 64, double quantisation, rounded to nearest."""
    fresh = TrainingQuantization(storage_dtype=training.storage_dtype, compute_dtype=training.compute_dtype)
    return NF4("nf4", fresh)


def trained(training: TrainingQuantization) -> NF4:
    """The base exactly as it was quantised in training, with the adapter kept beside it."""
    return NF4("nf4-adapter", training, consumes="base", keeps_adapter=True)
