"""`nf4-lowrank`: NF4 of the merged weights, and a LoRA adapter that makes up for some of what rounding left wrong.

The weights lie as those of `nf4` do. Beside them, for each layer x of shape [out, in], in
`adapter/adapter_model.safetensors`: `base_model.model.x.lora_A.weight` bf16 [rank, in] and
`base_model.model.x.lora_B.weight` bf16 [out, rank], with alpha = rank, x the name in the live model. Both are chosen by
calibration; a layer that was left to its format has factors of zeros. All layers have one rank: the option `rank`, or
the largest within `correction_bits` a weight. Source: QERA (arXiv 2410.06040). Cost: 4.127 bits a weight, and
16 * rank * (out + in) bits a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from qlora_export.errors import UsageError
from qlora_export.formats.base import Stored
from qlora_export.formats.bitsandbytes.four_bit import FourBit, FourBitEncoder, nf4
from qlora_export.tensors.dtypes import ITEM_BYTES, narrow, widen
from qlora_export.types import Float32, Part, Piece, Rounding, TensorSpec, TrainingQuantization

FACTOR_DTYPE = "BF16"
CORRECTION_BITS = 0.1
FOLDER = "adapter"
WEIGHTS_FILE = f"{FOLDER}/adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class CorrectedFourBit(FourBit):
    """4-bit weights with factors beside them; `modules` are the live names of the layers that have any, by tensor."""

    rank: int = 0
    budget_bits: float = CORRECTION_BITS
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """None without a text to calibrate on."""
        return ()

    @property
    def stored(self) -> FourBit:
        """The weights without their correction."""
        return nf4(self.training)

    def corrected(self, layers: Mapping[str, TensorSpec]) -> CorrectedFourBit:
        """For these layers [out, in] by their live modules; raises UsageError where no rank fits the budget."""
        rank = self.rank or self._largest_rank(list(layers.values()))
        return replace(self, rank=rank, modules={spec.name: module for module, spec in sorted(layers.items())})

    def corrects(self, spec: TensorSpec) -> bool:
        """Whether a layer has factors."""
        return spec.name in self.modules

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Those of the weight, A and B."""
        return (*super().parts(spec), *self._factor_parts(spec))

    def open(self, spec: TensorSpec) -> FourBitEncoder:
        """Start encoding a tensor that is left without a correction."""
        return _Uncorrected(spec, self)

    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of whole blocks of rows with their correction, the weight not rounded to any dtype."""
        values: Float32 = super().decode(spec, parts, rows) + self.product(spec, parts, rows)
        return values

    def factors(self, spec: TensorSpec, b: Float32, a: Float32) -> Iterable[Piece]:
        """The parts of B [out, rank] and A [rank, in]."""
        parts = self._factor_parts(spec)
        for part, values in zip(parts, (a, b)[: len(parts)], strict=True):
            yield Piece(part.name, 0, narrow(np.ascontiguousarray(values).reshape(-1), FACTOR_DTYPE))

    def product(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of B A for some rows; zeros for a layer without factors."""
        if not self.corrects(spec):
            return np.zeros(len(rows) * spec.columns, np.float32)
        a, b = (widen(parts[part.name], FACTOR_DTYPE).reshape(part.shape) for part in self._factor_parts(spec))
        values: Float32 = (b[rows.start : rows.stop] @ a).reshape(-1)
        return values

    def adapter_config(self) -> dict[str, Any]:
        """What peft loads the correction by."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "..",
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "target_modules": list(self.modules.values()),
        }

    def _largest_rank(self, layers: list[TensorSpec]) -> int:
        bits = 8 * ITEM_BYTES[FACTOR_DTYPE] * sum(spec.rows + spec.columns for spec in layers)
        weights = sum(spec.size for spec in layers)
        rank = math.floor(self.budget_bits * weights / bits) if bits else 0
        if rank < 1:
            needed = math.ceil(1000 * bits / weights) / 1000 if weights else 0
            raise UsageError(
                f"{self.name}: correction_bits {self.budget_bits:g} hold no component, one of every layer takes "
                f"{needed:g} bits a weight",
                f"options: {{correction_bits: {needed:g}}} or {{rank: 1}} hold one",
            )
        return rank

    def _factor_parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        if not self.corrects(spec):
            return ()
        module = f"base_model.model.{self.modules[spec.name]}"
        return (
            Part(f"{module}.lora_A.weight", FACTOR_DTYPE, (self.rank, spec.columns), WEIGHTS_FILE),
            Part(f"{module}.lora_B.weight", FACTOR_DTYPE, (spec.rows, self.rank), WEIGHTS_FILE),
        )


class _Uncorrected(FourBitEncoder):
    """Encodes the nearest codes; the factors are zeros."""

    def __init__(self, spec: TensorSpec, layout: CorrectedFourBit) -> None:
        super().__init__(spec, layout)
        self._corrected = layout

    def seal(self) -> Iterable[Piece]:
        """The absmax state of the whole tensor, and the factors."""
        yield from super().seal()
        rank = self._corrected.rank
        b, a = np.zeros((self._spec.rows, rank), np.float32), np.zeros((rank, self._spec.columns), np.float32)
        yield from self._corrected.factors(self._spec, b, a)


def nf4_lowrank(
    training: TrainingQuantization, *, rank: int | None = None, correction_bits: float | None = None
) -> CorrectedFourBit:
    """Merged weights in NF4 with a correction of a rank, or of so many bits a weight; raises UsageError."""
    if rank is not None and correction_bits is not None:
        raise UsageError("nf4-lowrank takes rank or correction_bits, not both")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UsageError(f"nf4-lowrank: rank is {rank!r}, expected a whole number from 1 on")
    bits = CORRECTION_BITS if correction_bits is None else correction_bits
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < math.inf:
        raise UsageError(f"nf4-lowrank: correction_bits is {bits!r}, expected a number above 0")
    plain, bits = nf4(training), float(bits)
    facts = {item.name: getattr(plain, item.name) for item in fields(plain)}
    return CorrectedFourBit(**{**facts, "name": "nf4-lowrank", "rank": rank or 0, "budget_bits": bits})
