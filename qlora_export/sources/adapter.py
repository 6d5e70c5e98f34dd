"""A LoRA adapter as PEFT saves it, opened by its headers: adapter_config.json, tensors, and the sidecar if it has one.

`adapter_config.json` is read as JSON (importing peft takes seconds). Other files of a checkpoint folder, such as
`optimizer.pt`, are ignored and never opened. Source: PEFT's checkpoint format document.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from qlora_export.errors import ExitCode, InputError, Problem, Refused
from qlora_export.sources.architecture import CLASSIFIER_HEADS
from qlora_export.sources.checkpoint import (
    pickles,
    read_json,
    read_tensors,
    require_folder,
    require_indexed,
    weight_map,
)
from qlora_export.sources.sidecar import read_sidecar
from qlora_export.tensors.header import StoredTensor
from qlora_export.types import TrainingQuantization

WEIGHTS_NAME = "adapter_model.safetensors"
SHARD_INDEX_NAME = "adapter_model.safetensors.index.json"
CONFIG_NAME = "adapter_config.json"

# Settings under which the trained function is no weight that could be written down.
REFUSED = {
    "layer_replication": ("layer replication", "it repeats layers of the base, with other deltas in each copy"),
    "alora_invocation_tokens": ("aLoRA", "its delta begins at a token of the text, no weight can do that"),
    "use_qalora": ("QA-LoRA", "it pools the inputs of a base that is quantised by groups"),
    "arrow_config": ("Arrow", "it routes every token to other adapters"),
    "kasa_config": ("KaSA", "it truncates the base before training"),
}
# Settings that are merged, or that leave the trained function as it is; any other that is set is not known here.
MERGED_SETTINGS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "bias", "init_lora_weights", "use_dora", "lora_bias", "fan_in_fan_out",
    "modules_to_save", "trainable_token_indices", "target_parameters", "use_bdlora",
}  # fmt: skip
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
CLASSIFIERS = ("SEQ_CLS",)
HEAD_WEIGHT = re.compile(rf"\.({'|'.join(CLASSIFIER_HEADS)})(\.modules_to_save)?\.weight$")
LANGUAGE_MODELS = ("CAUSAL_LM",)
LARGEST_RANK = 1 << 20
Whole = Annotated[int, Field(strict=True)]
Rank = Annotated[int, Field(strict=True, ge=1, le=LARGEST_RANK)]


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: folder, raw config, tensors by name, and how its base was quantised in training."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    training: TrainingQuantization = field(default_factory=TrainingQuantization)

    @property
    def weights(self) -> Path:
        """The file that holds the tensors; the first of several."""
        return self.files[0] if self.files else self.folder / WEIGHTS_NAME

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold tensors, sorted."""
        return tuple(sorted({tensor.path for tensor in self.tensors.values()}))

    @property
    def classifier(self) -> bool:
        """Whether it was trained as a sequence classifier."""
        return self.config.get("task_type") in CLASSIFIERS

    @property
    def labels(self) -> int | None:
        """How many labels a classifier's head tells apart; None where there is none."""
        heads = [tensor.spec.shape[0] for name, tensor in self.tensors.items() if HEAD_WEIGHT.search(name)]
        return heads[0] if self.classifier and heads else None

    def rank(self, module: str) -> int:
        """The rank that the config states for a module."""
        return int(self._by_pattern("rank_pattern", module, self.config.get("r", 8)))

    def scale(self, module: str) -> float:
        """The factor of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        alpha = float(self._by_pattern("alpha_pattern", module, self.config.get("lora_alpha", 8)))
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def diagonal_blocks(self, module: str) -> tuple[int, int]:
        """How many blocks lie on the diagonals of a module's A and B; 1 for whole matrices."""
        stated = self.config.get("use_bdlora")
        if not isinstance(stated, dict):
            return (1, 1)
        blocks = int(stated.get("nblocks", 1))
        a, b = (
            any(pattern in module for pattern in stated.get(key) or [])
            for key in ("target_modules_bd_a", "target_modules_bd_b")
        )
        return (blocks if a else 1, blocks if b else 1)

    @cached_property
    def sha256(self) -> str:
        """sha256 over the raw bytes of config and weights."""
        digest = hashlib.sha256()
        for path in (self.folder / CONFIG_NAME, *self.files):
            with path.open("rb") as file:
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
    config = adapter_config(folder)
    return Adapter(folder, config, _tensors(folder), read_sidecar(folder))


def adapter_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter folder, its settings checked; raises InputError."""
    require_folder(folder, "adapter")
    config = read_json(folder / CONFIG_NAME)
    if str(config.get("peft_type", "LORA")).upper() == "LORA":
        require_settings(folder / CONFIG_NAME, config)
    return config


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the one file, or of the shards that an index names."""
    names: tuple[str, ...] = (WEIGHTS_NAME,)
    if (folder / SHARD_INDEX_NAME).exists() and not (folder / WEIGHTS_NAME).exists():
        names = tuple(sorted(set(weight_map(folder / SHARD_INDEX_NAME).values())))
    elif not (folder / WEIGHTS_NAME).exists():
        if found := pickles(folder, "adapter_model"):
            raise Refused(
                f"{folder}: its only weights are pickles ({', '.join(found)})",
                "a pickle can run code; save the adapter as safetensors where you trust it",
            )
        raise InputError(f"{folder / WEIGHTS_NAME}: missing", "is this an adapter folder that PEFT saved?")
    tensors = read_tensors(folder, names)
    if len(names) > 1:
        require_indexed(folder / SHARD_INDEX_NAME, tensors)
    return tensors


def is_lora(adapter: Adapter) -> bool:
    """Whether its tensors are those of LoRA or a variant of it."""
    return str(adapter.config.get("peft_type", "LORA")).upper() == "LORA"


def variant_problems(adapter: Adapter) -> list[Problem]:
    """Why this adapter cannot be merged whatever its base is, one problem for each reason."""
    path = adapter.folder / CONFIG_NAME
    found = []
    if not is_lora(adapter):
        kind = adapter.config["peft_type"]
        found.append((f"peft_type {kind} cannot be merged", "only LoRA and its variants can"))
    for key, (name, reason) in REFUSED.items():
        if adapter.config.get(key):
            found.append((f"{name} cannot be merged ({key} = {adapter.config[key]!r})", reason))
    for key in sorted(set(adapter.config) - MERGED_SETTINGS - set(REFUSED)) if is_lora(adapter) else ():
        if adapter.config[key]:
            reason = "a setting that is not known may change the trained function; see docs/adapters.md"
            found.append((f"the setting {key} = {adapter.config[key]!r} is unknown, so it cannot be merged", reason))
    init = adapter.config.get("init_lora_weights", True)
    if isinstance(init, str) and is_lora(adapter) and not init.lower().startswith(BASE_CHANGING_INITS + HARMLESS_INITS):
        found.append((f"init_lora_weights = {init!r} is unknown, so it cannot be merged", "it may change the base"))
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        found.append(
            (
                f"{init} changed the base before training",
                "save the adapter with path_initial_model_for_weight_conversion, which makes it a plain LoRA",
            )
        )
    task = adapter.config.get("task_type")
    if task is not None and task not in CLASSIFIERS + LANGUAGE_MODELS:
        found.append((f"task_type {task} cannot be merged", "causal language models and sequence classifiers can"))
    return [Problem(ExitCode.REFUSED, f"{path}: {message}", hint) for message, hint in found]


class _Blocks(BaseModel):
    """The settings of a block-diagonal LoRA."""

    nblocks: Rank = 1
    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None


class _Settings(BaseModel):
    r: Rank = 8
    lora_alpha: float = 8
    use_rslora: bool | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[Whole] | Whole | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[Whole] | dict[str, list[Whole]] | None = None
    use_bdlora: _Blocks | None = None


def require_settings(path: Path, config: dict[str, Any]) -> None:
    """Raise InputError for a LoRA setting of the wrong kind, or a pattern that is no regular expression."""
    try:
        settings = _Settings.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}", "save the adapter again with peft") from None
    patterns = [rf"(.*\.)?({key})$" for key in (*(settings.rank_pattern or ()), *(settings.alpha_pattern or ()))]
    patterns += [text for text in (settings.target_modules, settings.exclude_modules) if isinstance(text, str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            shown = pattern.removeprefix(r"(.*\.)?(").removesuffix(")$")
            raise InputError(f"{path}: {shown!r} is no regular expression ({error})") from None
