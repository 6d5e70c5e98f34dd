"""Folders that transformers has no loader for here, decoded by what their own quantization_config states.

The words of the folder become dense weights, which go to the model class that transformers chooses. Each layout is
decoded in a file of its own, written apart from the encoder, so that each checks the other. Memory: the decoded model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from qlora_export.errors import InputError
from qlora_export.runtimes.loading import auto_class, quietly_loading, require_stored

Tensors = dict[str, torch.Tensor]
# All tensors of a folder, the statement and the model's dtype to dense ones; empties what it is given.
Decode = Callable[[Tensors, Mapping[str, Any], torch.dtype], Tensors]
BUILD_AGAIN = "build the artifact again; config.json and weights do not belong together"


def stated_quantization(folder: Path) -> Mapping[str, Any]:
    """The `quantization_config` of config.json, empty where it has none."""
    try:
        stated = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return {}  # transformers says what is wrong with it
    return stated if isinstance(stated, dict) else {}


def load_decoded(folder: Path, decode: Decode) -> Any:
    """The model with dense weights; raises InputError for a folder that is not as it states."""
    with quietly_loading(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        stated = dict(config.quantization_config)
        del config.quantization_config
        tensors: Tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        dense = decode(tensors, stated, config.dtype or torch.float32)
        with torch.device("meta"):
            kind = type(auto_class(folder).from_config(config))
        options: dict[str, Any] = {"dtype": "auto", "device_map": {"": "cpu"}, "output_loading_info": True}
        model, loaded = kind.from_pretrained(None, config=config, state_dict=dense, **options)
    require_stored(folder, model, loaded)
    return model.eval()


def parts_of(tensors: Tensors, module: str, names: tuple[str, ...], first: str) -> Tensors:
    """Take these parts of a module, which its part `first` asks for; raises InputError for one that is not there."""
    missing = [name for name in names if f"{module}.{name}" not in tensors]
    if missing:
        raise InputError(f"{module}.{first}: there is no {module}.{missing[0]}", "build the artifact again")
    return {name: tensors.pop(f"{module}.{name}") for name in names}


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """[n, m] words as [n, 8 m] nibbles, the lowest first."""
    return ((words[:, :, None] >> torch.arange(0, 32, 4)) & 15).reshape(len(words), -1)
