"""Adapted linear layers of a live model, computed in float32 with the very weights that they stand for.

peft takes the norms of DoRA from a 4-bit weight that it decodes by itself, in 16 bits and on some CPUs wrongly;
`pin_dora` makes those layers multiply with the merged weight of the DoRA paper (arXiv 2402.09353) instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import bitsandbytes
import peft
import torch

from qlora_export.runtimes.loading import decoded_weight


def adapted_layers(model: Any) -> list[Any]:
    """The adapted linear layers, whose base has a weight [out, in]."""
    return [
        module
        for module in model.modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
        and isinstance(module.base_layer, torch.nn.Linear)
        and not isinstance(module, peft.tuners.lora.layer.ParamWrapper)
    ]


def pin_dora(model: Any, roundings: Sequence[torch.dtype] | None = None) -> None:
    """Make DoRA layers on 4-bit weights exact; their base is rounded as in `pin_weights`."""
    for layer in adapted_layers(model):
        if isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit) and any(layer.use_dora.values()):
            chosen = roundings if roundings is not None else [layer.base_layer.compute_dtype or torch.float32]
            layer.forward = partial(merged_forward, layer, tuple(chosen), torch.float32)


def merged_forward(
    layer: Any, roundings: Sequence[torch.dtype], stored: torch.dtype, inputs: torch.Tensor
) -> torch.Tensor:
    """The layer with its delta merged into the weight, which is then rounded once to the dtype `stored`."""
    weight = decoded_weight(layer.base_layer, roundings)
    bias = layer.base_layer.bias.float() if layer.base_layer.bias is not None else None
    for name in layer.active_adapters:
        if layer.disable_adapters or name not in layer.lora_A:
            continue
        weight = weight + layer.scaling[name] * (_factor(layer.lora_B[name]) @ _factor(layer.lora_A[name]))
        if layer.use_dora[name]:
            magnitude = layer.lora_magnitude_vector[name].weight.float()
            weight = weight * (magnitude / weight.norm(dim=1))[:, None]
        if bias is not None and layer.lora_B[name].bias is not None:
            bias = bias + layer.scaling[name] * layer.lora_B[name].bias.float()
    return torch.nn.functional.linear(inputs.float(), weight.to(stored).float(), bias)


def _factor(module: Any) -> torch.Tensor:
    """A factor as a whole matrix; peft stores a block-diagonal one without its zeros."""
    whole = getattr(module, "weight_as_blockdiagonal_matrix", None)
    weight: torch.Tensor = whole() if whole is not None else module.weight
    return weight.float()
