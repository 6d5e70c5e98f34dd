"""What a live model is made of: where its decoder blocks are, what a bitsandbytes 4-bit layer holds for the sidecar.

Reads attributes of modules and tensors; imports neither torch nor bitsandbytes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from qlora_export.errors import UsageError
from qlora_export.sources.sidecar import absmax_sha256
from qlora_export.types import TrainedModule


class Repacked(UsageError):
    """bitsandbytes has rearranged the codes and rounded the absmax, for inference on a CPU."""


def decoder_place(model: Any) -> str | None:
    """Name of the ModuleList of a causal language model's decoder blocks; None where there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if type(module).__name__ == "ModuleList"]
    found = [name for name, module in lists if len(module) == count]
    return min(found, key=lambda name: name.count("."), default=None)


def trained_module(name: str, layer: Any) -> TrainedModule:
    """Digests of a Linear4bit's codes and absmax state, and its absmax mean; raises UsageError when it was repacked."""
    state = layer.weight.quant_state
    if state is None:
        raise UsageError(f"{name}: the layer is not quantised yet", "record the model after it was loaded in 4 bits")
    if getattr(state, "packing_format_for_cpu", False):
        raise Repacked(
            f"{name}: bitsandbytes repacked this weight for CPU inference",
            "record the model before it runs in eval mode, or set support_avx512bf16_for_cpu = False on its layers",
        )
    codes = _numpy(layer.weight.data).view(np.uint8)
    codes_sha256 = hashlib.sha256(codes.tobytes()).hexdigest()
    if not state.nested:
        absmax = _numpy(state.absmax.float())
        return TrainedModule(codes_sha256, hashlib.sha256(absmax.tobytes()).hexdigest(), None)
    offset = np.float32(state.offset.item())
    digest = absmax_sha256(_numpy(state.absmax), _numpy(state.state2.absmax.float()), offset)
    return TrainedModule(codes_sha256, digest, float(offset))


def _numpy(tensor: Any) -> Any:
    """A tensor's values on the CPU; 16-bit storage of codes comes as bytes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point() and tensor.element_size() == 2:
        tensor = tensor.view(tensor.new_empty(0).short().dtype)
    return tensor.numpy()
