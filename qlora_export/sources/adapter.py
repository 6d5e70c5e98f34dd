"""A LoRA adapter as PEFT saves it, opened by its headers: adapter_config.json, tensors, and the sidecar if it has one.

`adapter_config.json` is read as JSON (importing peft takes seconds). Other files of a checkpoint folder, such as
`optimizer.pt`, are ignored and never opened. Source: PEFT's checkpoint format document.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from qlora_export.contracts import TrainingQuantization
from qlora_export.errors import ExitCode, InputError, Problem, Refused
from qlora_export.sources.checkpoint import contained_file, pickles, read_json, require_folder
from qlora_export.sources.sidecar import read_sidecar
from qlora_export.tensors.header import StoredTensor, read_header

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

# Settings under which the trained function is no plain `W + scale * B @ A`.
VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with bias",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "modules_to_save": "whole saved modules (modules_to_save)",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QA-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
}
# Settings that leave the trained function plain; any other that is set is one this version does not know.
PLAIN_SETTINGS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "bias", "init_lora_weights",
}  # fmt: skip
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: folder, raw config, tensors by name, and how its base was quantised in training."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    training: TrainingQuantization

    @property
    def weights(self) -> Path:
        """The file that holds the tensors."""
        return self.folder / WEIGHTS_NAME

    def rank(self, module: str) -> int:
        """The rank that the config states for a module."""
        return int(self._by_pattern("rank_pattern", module, self.config.get("r", 8)))

    def scale(self, module: str) -> float:
        """The factor of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        alpha = float(self._by_pattern("alpha_pattern", module, self.config.get("lora_alpha", 8)))
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    @cached_property
    def sha256(self) -> str:
        """sha256 over the raw bytes of config and weights."""
        digest = hashlib.sha256()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            with (self.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _by_pattern(self, field: str, module: str, default: Any) -> Any:
        """PEFT's rule: the first key that matches the module's name from a dot to its end."""
        for key, value in (self.config.get(field) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default


def open_adapter(folder: Path) -> Adapter:
    """Open an adapter folder; raises InputError or Refused."""
    require_folder(folder, "adapter")
    config = read_json(folder / CONFIG_NAME)
    _check_config(folder / CONFIG_NAME, config)
    if not (folder / WEIGHTS_NAME).exists():
        if found := pickles(folder, "adapter_model"):
            raise Refused(
                f"{folder}: its only weights are pickles ({', '.join(found)})",
                "a pickle can run code; save the adapter as safetensors where you trust it",
            )
        raise InputError(f"{folder / WEIGHTS_NAME}: missing", "is this an adapter folder that PEFT saved?")
    tensors = read_header(contained_file(folder, WEIGHTS_NAME))
    return Adapter(folder, config, tensors, read_sidecar(folder))


class _Numbers(BaseModel):
    """The settings that the maths reads."""

    r: int = Field(8, ge=1)
    lora_alpha: float = 8
    use_rslora: bool | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, float] | None = None


def _check_config(path: Path, config: dict[str, Any]) -> None:
    try:
        numbers = _Numbers.model_validate(config)
        for pattern in (*(numbers.rank_pattern or ()), *(numbers.alpha_pattern or ())):
            re.compile(pattern)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}", "save the adapter again with peft") from None
    except re.error as error:
        raise InputError(f"{path}: {error.pattern!r} is no regular expression ({error})") from None


def variant_problems(adapter: Adapter) -> list[Problem]:
    """Why this adapter is no plain LoRA, one problem for each reason."""
    path = adapter.folder / CONFIG_NAME
    hint = "this version merges LoRA and rsLoRA with rank and alpha patterns"
    found = []
    kind = str(adapter.config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        found.append(f"{path}: peft_type {kind} cannot be merged")
    for key, name in VARIANTS.items():
        if adapter.config.get(key):
            found.append(f"{path}: {name} cannot be merged yet ({key} = {adapter.config[key]!r})")
    unknown = sorted(set(adapter.config) - PLAIN_SETTINGS - set(VARIANTS))
    found += [
        f"{path}: the setting {key} = {adapter.config[key]!r} is unknown, so it cannot be merged"
        for key in unknown
        if adapter.config[key]
    ]
    if (bias := adapter.config.get("bias", "none")) != "none":
        found.append(f"{path}: trained biases cannot be merged yet (bias = {bias!r})")
    init = adapter.config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        found.append(f"{path}: {init} changed the base before training; convert the adapter to plain LoRA first")
    return [Problem(ExitCode.REFUSED, message, hint) for message in found]
