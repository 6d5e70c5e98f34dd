"""What all compressed-tensors formats state: config.json's table, which layers they suit, rows in the model's dtype.

The table is what the library's own `ModelCompressor.update_config` writes: one group of settings for every `Linear`,
and `ignore`, the full names of modules that stay dense. vLLM and transformers read it with the library's own models.
Source: compressed-tensors `quantization/quant_config.py`, `quant_scheme.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from qlora_export.tensors.dtypes import round_to
from qlora_export.types import Float32

VERSION = "0.20.0"
PER_CHANNEL = {"group_size": None, "strategy": "channel", "dynamic": False}
PER_TOKEN = {"group_size": None, "strategy": "token", "dynamic": True}
INPUT_MAJOR = "its module is a Conv1D, and compressed-tensors loads nothing but Linear"
# The hint for values that the model's dtype cannot hold.
WIDER_DTYPE = "choose a dense format of a wider dtype for this artifact"


def arguments(bits: int, kind: str, symmetric: bool, cut: dict[str, Any]) -> dict[str, Any]:
    """How weights or activations are rounded: `kind` is int or float, `cut` says what shares a scale."""
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, **cut}


def table(
    layout: str, weights: dict[str, Any], activations: dict[str, Any] | None, kept: Sequence[str]
) -> dict[str, Any]:
    """The `quantization_config` of a layout; `activations` that are None stay in 16 bits."""
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def scale_dtype(dtype: str) -> Literal["F32", "BF16", "F16"]:
    """The dtype of a model, as that of scales."""
    return cast(Literal["F32", "BF16", "F16"], dtype)


def scales_in(dtype: str) -> Callable[[Float32], Float32]:
    """Rounds scales of any shape to the dtype."""
    return lambda scales: round_to(scales.reshape(-1).copy(), dtype).reshape(scales.shape)
