"""Folders in the layouts of GPTQ and AWQ, decoded here by what their own quantization_config states.

    gptq   word [in / 8, out] and zero word [groups, out / 8], low nibble first; a zero is one more than it is stored
    awq    word [in, out / 8], zero word [groups, out / 8], outputs in the order 0, 2, 4, 6, 1, 3, 5, 7
    both   w[out, in] = (nibble - zero) * scale, in float32, then rounded to the model's dtype

transformers has loaders for both that need kernels of GPTQModel, which must be compiled for the machine; a kernel
computes with these very weights. Written apart from the encoder, so that each checks the other. Memory: the decoded
model. Sources: AutoGPTQ `qlinear_cuda.unpack`, AutoAWQ `utils/packing_utils.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from qlora_export.errors import InputError
from qlora_export.runtimes.loading import quietly_loading

METHODS = ("gptq", "awq")
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
EXPECTED: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "checkpoint_format": "gptq", "desc_act": False},
    "awq": {"bits": 4, "version": "gemm", "zero_point": True},
}


def stated_method(folder: Path) -> str | None:
    """The `quant_method` of config.json, if it has one."""
    try:
        stated = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None  # transformers says what is wrong with it
    return stated.get("quant_method") if isinstance(stated, dict) else None


def load_interleaved(folder: Path) -> Any:
    """The model with dense weights; raises InputError for a folder that is not as it states."""
    with quietly_loading(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        stated = dict(config.quantization_config)
        _require_known(folder, stated)
        del config.quantization_config
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        dense = decoded(tensors, stated["quant_method"], config.dtype or torch.float32)
        with torch.device("meta"):
            kind = type(transformers.AutoModelForCausalLM.from_config(config))
        model = kind.from_pretrained(None, config=config, state_dict=dense, dtype="auto", device_map={"": "cpu"})
    return model.eval()


def _require_known(folder: Path, stated: Mapping[str, Any]) -> None:
    for key, value in EXPECTED[stated["quant_method"]].items():
        if stated.get(key) != value:
            raise InputError(
                f"{folder}: quantization_config has {key} {stated.get(key)!r}, expected {value!r}",
                "build the artifact again; config.json and weights do not belong together",
            )


def decoded(tensors: dict[str, torch.Tensor], method: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors, with `x.weight` [out, in] of this dtype for the parts of each `x`; empties what it is given."""
    dense: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        missing = [part for part in ("qzeros", "scales") if f"{module}.{part}" not in tensors]
        if missing:
            raise InputError(f"{name}: there is no {module}.{missing[0]}", "build the artifact again")
        parts = {part: tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")}
        groups = tensors.pop(f"{module}.g_idx", None)
        dense[f"{module}.weight"] = (_gptq(parts, groups) if method == "gptq" else _awq(parts)).to(dtype)
    return {**tensors, **dense}


def _gptq(parts: Mapping[str, torch.Tensor], groups: torch.Tensor | None) -> torch.Tensor:
    """Weights [out, in] in float32; `groups` [in] says which scale an input has, by default equal shares in turn."""
    scales = parts["scales"].float()
    zeros = (_nibbles(parts["qzeros"]) + 1) & 15
    codes = _nibbles(parts["qweight"].T.contiguous()).T
    if groups is None:
        groups = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[groups.long()]) * scales[groups.long()]).T.contiguous()


def _awq(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Weights [out, in] in float32."""
    scales = parts["scales"].float()
    codes, zeros = _in_order(_nibbles(parts["qweight"])), _in_order(_nibbles(parts["qzeros"]))
    size = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T.contiguous()


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """[n, m] words as [n, 8 m] nibbles, the lowest first."""
    return ((words[:, :, None] >> torch.arange(0, 32, 4)) & 15).reshape(len(words), -1)


def _in_order(nibbles: torch.Tensor) -> torch.Tensor:
    """Nibbles of AWQ's words in the order of the outputs."""
    return nibbles.reshape(len(nibbles), -1, 8)[:, :, AWQ_PLACES].reshape(len(nibbles), -1)
