"""Folders in the layouts of GPTQ and AWQ, decoded here by what their own quantization_config states.

    gptq   word [in / 8, out] and zero word [groups, out / 8], low nibble first; a zero is one more than it is stored
    awq    word [in, out / 8], zero word [groups, out / 8], outputs in the order 0, 2, 4, 6, 1, 3, 5, 7
    both   w[out, in] = (nibble - zero) * scale, in float32, then rounded to the model's dtype

transformers has loaders for both that need kernels of GPTQModel, which must be compiled for the machine; a kernel
computes with these very weights. Sources: AutoGPTQ `qlinear_cuda.unpack`, AutoAWQ `utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_export.errors import InputError
from qlora_export.runtimes.decoded import BUILD_AGAIN, Tensors, load_decoded, nibbles, parts_of

METHODS = ("gptq", "awq")
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
EXPECTED: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "checkpoint_format": "gptq", "desc_act": False},
    "awq": {"bits": 4, "version": "gemm", "zero_point": True},
}


def load_interleaved(folder: Path) -> Any:
    """The model with dense weights; raises InputError for a folder that is not as it states."""

    def decode(tensors: Tensors, stated: Mapping[str, Any], dtype: torch.dtype) -> Tensors:
        _require_known(folder, stated)
        return decoded(tensors, stated["quant_method"], dtype)

    return load_decoded(folder, decode)


def _require_known(folder: Path, stated: Mapping[str, Any]) -> None:
    for key, value in EXPECTED[stated["quant_method"]].items():
        if stated.get(key) != value:
            raise InputError(
                f"{folder}: quantization_config has {key} {stated.get(key)!r}, expected {value!r}", BUILD_AGAIN
            )


def decoded(tensors: Tensors, method: str, dtype: torch.dtype) -> Tensors:
    """All tensors, with `x.weight` [out, in] of this dtype for the parts of each `x`; empties what it is given."""
    dense: Tensors = {}
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = parts_of(tensors, module, ("qweight", "qzeros", "scales"), "qweight")
        groups = tensors.pop(f"{module}.g_idx", None)
        dense[f"{module}.weight"] = (_gptq(parts, groups) if method == "gptq" else _awq(parts)).to(dtype)
    return {**tensors, **dense}


def _gptq(parts: Mapping[str, torch.Tensor], groups: torch.Tensor | None) -> torch.Tensor:
    """Weights [out, in] in float32; `groups` [in] says which scale an input has, by default equal shares in turn."""
    scales = parts["scales"].float()
    zeros = (nibbles(parts["qzeros"]) + 1) & 15
    codes = nibbles(parts["qweight"].T.contiguous()).T
    if groups is None:
        groups = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[groups.long()]) * scales[groups.long()]).T.contiguous()


def _awq(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Weights [out, in] in float32."""
    scales = parts["scales"].float()
    codes, zeros = _in_order(nibbles(parts["qweight"])), _in_order(nibbles(parts["qzeros"]))
    size = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T.contiguous()


def _in_order(of_words: torch.Tensor) -> torch.Tensor:
    """Nibbles of AWQ's words in the order of the outputs."""
    return of_words.reshape(len(of_words), -1, 8)[:, :, AWQ_PLACES].reshape(len(of_words), -1)
