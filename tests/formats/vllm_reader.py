"""Run by the Python of a vLLM environment: what vLLM makes of config.json of some folders, as JSON on the last line.

Importing vLLM and its config classes takes no GPU and no compiled kernels; choosing a kernel does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override, is_layer_gptq_quantized
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYERS = [f"model.layers.0.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj")]
LAYERS += ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def read(folder: Path) -> dict[str, Any]:
    """The class of vLLM's config, the scheme of a linear layer, and which layers it takes for quantised."""
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = get_quantization_config(stated["quant_method"]).from_config(stated)
    if hasattr(config, "maybe_update_config"):
        config.maybe_update_config(str(folder))
    method = stated["quant_method"]
    if method == "compressed-tensors":
        quantised = [name for name in LAYERS if not should_ignore_layer(name, config.ignore, FUSED)]
        scheme = scheme_of(config)
    elif method == "gptq":
        named = config.modules_in_block_to_quantize
        quantised = [name for name in LAYERS if is_layer_gptq_quantized(name, named, FUSED)]
        quantised = [name for name in quantised if get_dynamic_override(config, name) is not False]
        scheme = f"{config.quant_type} in groups of {config.group_size}"
    else:
        skipped = config.modules_to_not_convert
        quantised = [name for name in LAYERS if not is_layer_skipped(name, skipped, FUSED, match_mode="substring")]
        scheme = f"{config.quant_type} in groups of {config.group_size}"
    return {"class": type(config).__name__, "scheme": scheme, "quantised": quantised}


def scheme_of(config: Any) -> str:
    """The first scheme that vLLM's own tests of a compressed-tensors layer find, in the order in which it asks them."""
    linear = config.target_scheme_map["Linear"]
    weights, activations = linear["weights"], linear["input_activations"]
    if config._is_nvfp4_format(weights) and activations is None:
        return "nvfp4"
    if config._is_mxfp4(weights) and activations is None:
        return "mxfp4"
    if config._is_wNa16_group_channel(weights, activations):
        return "wna16"
    if config._is_fp8_w8a8(weights, activations):
        return "fp8"
    return "int8" if config._is_dynamic_token_w8a8(weights, activations) else "none"


if __name__ == "__main__":
    results = {path: read(Path(path)) for path in sys.argv[1:]}
    sys.stdout.write("\n" + json.dumps(results) + "\n")
