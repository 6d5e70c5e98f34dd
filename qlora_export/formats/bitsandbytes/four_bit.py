"""bitsandbytes in 4 bits: `nf4` and `fp4` of the merged weights, `nf4-adapter` of the base, with the adapter beside it.

For a linear `x.weight` of shape [out, in]: `x.weight` uint8 [ceil(out * in / 2), 1], the first code of a pair in the
high nibble; `x.weight.absmax` uint8 [blocks] (float32 without double quantisation); `x.weight.quant_map` float32 [16];
`x.weight.nested_absmax` float32 [ceil(blocks / 256)]; `x.weight.nested_quant_map` float32 [256];
`x.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) uint8, JSON padded with spaces to a length that does not depend on
the weights. Everything else stays dense in the dtype the base was loaded in. Source: bitsandbytes `QuantState.as_dict`.
Cost: 4.127 bits a weight.

Rounded to nearest, `nf4` falls back onto the grid that the base already sits on: a delta smaller than half a step
changes no code. Dithered, it is the nearest code of the base as it was loaded with the delta added, in the blocks and
by the rules of training, so that without a delta the bytes are those of training; where the base itself is stored in 4
bits, the delta goes onto its codes by chance (`quant/stochastic_rounding.py`). `search` fits the scales
(`quant/mse_scales.py`). `fp4` has the levels of a 4-bit float, which are further apart where most weights are.
`nf4-adapter` keeps the codes that training saw and ships the adapter untouched, without drift.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.formats.base import Chosen, GridFormat, LevelGrid, Stored
from qlora_export.quant import double_quant, four_bit, stochastic_rounding
from qlora_export.quant.device import kernels
from qlora_export.quant.four_bit import FP4, NF4, FourBitGrid
from qlora_export.quant.mse_scales import search_blocks
from qlora_export.types import (
    TORCH_NAMES,
    Float32,
    Part,
    Piece,
    Rounding,
    StoredScales,
    TensorSpec,
    TrainingQuantization,
)

LONGEST_OFFSET = -1.2345678901234567e-100


@dataclass(frozen=True, kw_only=True)
class FourBit(GridFormat):
    """Weights of a 4-bit grid in bitsandbytes' layout; `training` gives block size, dtypes, absmax means.

    A block may be short, and bitsandbytes has layers for both orders of a weight.
    """

    levels: FourBitGrid
    training: TrainingQuantization
    dithers: bool = False
    seed: int = 0

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """Only NF4 is what bases are trained in; the base of training is not rounded anew."""
        if self.consumes == "base":
            return ()
        return ("dithered", "search") if self.levels.name == NF4.name else ("search",)

    def rounded(self, rounding: Rounding, training: TrainingQuantization, seed: int) -> FourBit:
        """Dithered, in the blocks and by the rules of training; searched, in its own."""
        if rounding == "dithered":
            return replace(self, dithers=True, training=training, dense_dtype=training.storage_dtype, seed=seed)
        return replace(self, searches=rounding == "search")

    @property
    def as_trained(self) -> bool:
        """Whether absmax are sealed by the rules and recorded means of training."""
        return self.consumes == "base" or self.dithers

    @property
    def state_suffix(self) -> str:
        """The last part of the name of the JSON state."""
        return f"quant_state.bitsandbytes__{self.levels.name}"

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
                Part(f"{spec.name}.nested_absmax", "F32", (-(-blocks // double_quant.BLOCK),)),
                Part(f"{spec.name}.nested_quant_map", "F32", (256,)),
            ]
        state_bytes = len(self.state(spec, np.float32(0)))
        return (*parts, Part(f"{spec.name}.{self.state_suffix}", "U8", (state_bytes,)))

    def open(self, spec: TensorSpec) -> FourBitEncoder:
        """Start encoding a tensor."""
        return FourBitEncoder(spec, self)

    def open_on(self, spec: TensorSpec, stored: StoredScales) -> FourBitDitherer:
        """Start adding a delta to stored codes."""
        return FourBitDitherer(spec, self, stored)

    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of whole blocks of rows, before any rounding to the model's dtype."""
        block = self.training.block_size
        out = np.empty(len(rows) * spec.columns, np.float32)
        first = rows.start * spec.columns
        blocks = range(first // block, first // block - (-out.size // block))
        if self.training.double_quant:
            state = json.loads(parts[f"{spec.name}.{self.state_suffix}"].tobytes())
            nested_absmax = parts[f"{spec.name}.nested_absmax"].view(np.float32)
            stored = parts[f"{spec.name}.absmax"][blocks.start : blocks.stop]
            scales = double_quant.decode(stored, nested_absmax, np.float32(state["nested_offset"]), blocks.start)
        else:
            scales = parts[f"{spec.name}.absmax"].view(np.float32)[blocks.start : blocks.stop]
        codes = parts[spec.name][first // 2 : (first + out.size + 1) // 2]
        four_bit.decode(codes, scales, block, self.levels.codebook, out)
        return out

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """The codebook in ascending order, and blocks as groups where a row holds whole ones."""
        if spec.columns % self.training.block_size:
            return None
        levels = tuple(float(level) for level in self.levels.levels)
        return LevelGrid(levels, self.training.block_size, "nested" if self.training.double_quant else "F32")

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes, absmax state and the JSON state."""
        yield Piece(spec.name, 0, four_bit.pack(chosen.codes.reshape(-1), self.levels))
        scales, offset = chosen.scales.reshape(-1), np.float32(chosen.offset)
        if chosen.nested_absmax is None:
            yield from self.sealed(spec, StoredScales(scales))
        else:
            codes = double_quant.codes_on(scales, chosen.nested_absmax, offset)
            yield from self.sealed(spec, StoredScales(scales, codes, chosen.nested_absmax, float(offset)))

    def sealed(self, spec: TensorSpec, scales: StoredScales) -> Iterable[Piece]:
        """Everything but the codes of the weights."""
        yield Piece(f"{spec.name}.quant_map", 0, self.levels.codebook.view(np.uint8))
        if scales.codes is None or scales.nested_absmax is None:
            yield Piece(f"{spec.name}.absmax", 0, scales.scales.view(np.uint8))
        else:
            yield Piece(f"{spec.name}.absmax", 0, scales.codes)
            yield Piece(f"{spec.name}.nested_absmax", 0, scales.nested_absmax.view(np.uint8))
            yield Piece(f"{spec.name}.nested_quant_map", 0, double_quant.dynamic_map().view(np.uint8))
        state = self.state(spec, np.float32(scales.offset))
        yield Piece(f"{spec.name}.{self.state_suffix}", 0, np.frombuffer(state, np.uint8))

    def chosen(self, spec: TensorSpec, parts: Stored) -> Chosen:
        """Numbers of ascending levels, the scales, and their second level as the JSON state has it."""
        numbers = four_bit.unpack(parts[spec.name], spec.size, self.levels).reshape(spec.rows, spec.columns)
        raw = parts[f"{spec.name}.absmax"]
        if not self.training.double_quant:
            return Chosen(numbers, raw.view(np.float32).reshape(spec.rows, -1))
        offset = float(json.loads(bytes(parts[f"{spec.name}.{self.state_suffix}"]))["nested_offset"])
        nested_absmax = parts[f"{spec.name}.nested_absmax"].view(np.float32)
        scales = double_quant.decode(raw, nested_absmax, np.float32(offset))
        return Chosen(numbers, scales.reshape(spec.rows, -1), offset, nested_absmax)

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """What transformers' bitsandbytes loader reads; `kept` lists every linear module that stays dense."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.levels.name,
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
            "quant_type": self.levels.name,
            "blocksize": self.training.block_size,
            "dtype": TORCH_NAMES[self.training.storage_dtype],
            "shape": list(spec.shape),
        }
        if self.training.double_quant:
            facts |= {
                "nested_blocksize": double_quant.BLOCK,
                "nested_dtype": "float32",
                "nested_offset": LONGEST_OFFSET,
            }
        length = len(json.dumps(facts))
        if self.training.double_quant:
            facts["nested_offset"] = float(offset)
        return json.dumps(facts).encode().ljust(length + -length % 8)


def _fresh(training: TrainingQuantization) -> TrainingQuantization:
    """Blocks of 64 and double quantisation, in the dtypes of training."""
    return TrainingQuantization(storage_dtype=training.storage_dtype, compute_dtype=training.compute_dtype)


def nf4(training: TrainingQuantization) -> FourBit:
    """Merged weights in NF4."""
    return FourBit(name="nf4", dense_dtype=training.storage_dtype, levels=NF4, training=_fresh(training))


def fp4(training: TrainingQuantization) -> FourBit:
    """Merged weights in FP4."""
    return FourBit(name="fp4", dense_dtype=training.storage_dtype, levels=FP4, training=_fresh(training))


def nf4_adapter(training: TrainingQuantization) -> FourBit:
    """The base exactly as it was quantised in training, with the adapter kept beside it."""
    return replace(nf4(training), name="nf4-adapter", training=training, consumes="base", keeps_adapter=True)


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
        if self._layout.searches:
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
        codes, nested_absmax = double_quant.encode(scales, offset, exact)
        return self._layout.sealed(self._spec, StoredScales(scales, codes, nested_absmax, float(offset)))

    def _offset(self) -> np.float32:
        """The mean of training by whose rules this is sealed, else that of these weights."""
        recorded = self._layout.training.modules.get(self._spec.module)
        if self._layout.as_trained and recorded is not None and recorded.nested_offset is not None:
            return np.float32(recorded.nested_offset)
        return double_quant.mean(self._scales)


class FourBitDitherer:
    """Codes of a stored weight with a delta added by chance; scales that need not grow keep their bytes."""

    def __init__(self, spec: TensorSpec, layout: FourBit, stored: StoredScales) -> None:
        self._spec = spec
        self._layout = layout
        self._stored = stored
        self._block = layout.training.block_size
        self._scales = stored.scales.copy()
        self._key = stochastic_rounding.key_of(layout.seed, spec.name)

    def dither(self, codes: NDArray[np.uint8], delta: Float32, first_row: int) -> Iterable[Piece]:
        """The rows' new codes at their place."""
        first = first_row * self._spec.columns
        first_block = first // self._block
        scales = self._scales[first_block : first_block - (-len(delta) // self._block)]
        changed = stochastic_rounding.dither(codes, scales, kernels.to_host(delta), self._block, self._key, first)
        yield Piece(self._spec.name, first // 2, changed)

    def seal(self) -> Iterable[Piece]:
        """The absmax state: the stored one, but for blocks whose scale grew."""
        stored, scales = self._stored, self._scales
        if stored.codes is None or stored.nested_absmax is None:
            return self._layout.sealed(self._spec, StoredScales(scales))
        offset, grown = np.float32(stored.offset), scales != stored.scales
        largest = stored.nested_absmax.copy()
        np.maximum.at(largest, np.flatnonzero(grown) // double_quant.BLOCK, np.abs(scales[grown] - offset))
        wider = np.repeat(largest != stored.nested_absmax, double_quant.BLOCK)[: scales.size]
        fitted = double_quant.codes_on(scales, largest, offset)
        codes = np.where(grown | wider, fitted, stored.codes)
        return self._layout.sealed(self._spec, StoredScales(scales, codes, largest, stored.offset))
