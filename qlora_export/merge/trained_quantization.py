"""How the base was quantised in training, from the best source there is, and which stored modules that means.

The sidecar knows; else a base that is stored in 4 or 8 bits shows it; else it is stated; else the usual is assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from qlora_export.merge.base_rows import Training
from qlora_export.merge.module_names import DENSE_BY_DEFAULT, EXPERT, Names
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.sources.weights import FourBitWeight, Int8Weight
from qlora_export.types import FROM_TORCH_NAMES, TrainingQuantization


@dataclass(frozen=True)
class TrainingFacts:
    """Training with live and with stored module names, and the stored linear layers that 4-bit formats encode."""

    live: TrainingQuantization
    stored: Training
    encodable: AbstractSet[str]
    experts: AbstractSet[str]
    unmatched_skips: tuple[str, ...] = ()


def training_facts(adapter: Adapter | None, stated: TrainingQuantization | None, names: Names) -> TrainingFacts:
    """The facts of one adapter on one base; without an adapter the base is what was trained."""
    checkpoint = names.checkpoint
    experts = {weight.spec.module for weight in checkpoint.weights.values() if EXPERT.search(weight.spec.name)}
    found = _quantization(adapter, stated, checkpoint)
    if found.provenance == "sidecar":
        stored_names = {name: names.stored_module(name) or name for name in found.modules}
        modules = {stored_names[name]: module for name, module in found.modules.items()}
        training = Training(replace(found, modules=modules), frozenset(modules))
        return TrainingFacts(found, training, frozenset(modules) - experts, experts)
    if found.provenance == "base":
        quantised = frozenset(
            weight.spec.module for weight in checkpoint.weights.values() if weight.storage not in ("plain", "fp8")
        )
        return TrainingFacts(found, Training(found, quantised), quantised - experts, experts)
    linear = names.linear
    if adapter is not None and any(EXPERT.search(name) for name in adapter.tensors) and not _packed(adapter):
        linear = linear | {name for name in experts if len(checkpoint.weights[f"{name}.weight"].spec.shape) == 2}
    by_skip = {skip: {name for name in linear if _lies_in(name, skip)} for skip in found.skip}
    skipped = {name for matched in by_skip.values() for name in matched}
    quantised = frozenset() if found.quant_type == "none" else linear - skipped
    unmatched = tuple(skip for skip, matched in by_skip.items() if not matched and not DENSE_BY_DEFAULT.search(skip))
    return TrainingFacts(found, Training(found, quantised), linear - skipped - experts, experts, unmatched)


def _lies_in(module: str, name: str) -> bool:
    """Whether a module is one of that name, or lies in one."""
    return re.search(rf"(^|\.){re.escape(name)}($|\.)", module) is not None


def _packed(adapter: Adapter) -> bool:
    return bool(adapter.config.get("target_parameters"))


def _quantization(
    adapter: Adapter | None, stated: TrainingQuantization | None, checkpoint: Checkpoint
) -> TrainingQuantization:
    if adapter is not None and adapter.training.recorded:
        return adapter.training
    if (shown := _shown_by_base(checkpoint)) is not None:
        return shown
    if adapter is None:
        return TrainingQuantization(storage_dtype=checkpoint.dtype, compute_dtype=checkpoint.dtype)
    return stated or adapter.training


def _shown_by_base(checkpoint: Checkpoint) -> TrainingQuantization | None:
    """What a base that is stored in 4 or 8 bits says of itself."""
    weights = checkpoint.weights.values()
    four_bit = next((weight for weight in weights if isinstance(weight, FourBitWeight)), None)
    config: Mapping[str, Any] = checkpoint.config.get("quantization_config") or {}
    config = config if isinstance(config, Mapping) else {}
    if four_bit is not None:
        stated = FROM_TORCH_NAMES.get(str(config.get("bnb_4bit_compute_dtype")), four_bit.spec.dtype)
        return TrainingQuantization(
            quant_type=four_bit.storage,
            block_size=four_bit.block,
            double_quant=four_bit.offset is not None,
            storage_dtype=four_bit.spec.dtype,
            compute_dtype=stated,
            weight_roundings=(stated,),
            provenance="base",
        )
    if any(isinstance(weight, Int8Weight) for weight in weights):
        dtype = checkpoint.dtype
        return TrainingQuantization(
            quant_type="int8", storage_dtype=dtype, compute_dtype=dtype, weight_roundings=(), provenance="base"
        )
    return None
