"""For training scripts: write down how the base was quantised, while the model that knows is still alive.

    from qlora_export.training import QloraExportCallback
    trainer = Trainer(model, ..., callbacks=[QloraExportCallback()])     # with every checkpoint

    from qlora_export.training import record
    model.save_pretrained(folder)
    record(model, folder)                                                # or by hand

The sidecar `qlora_export.json` lets a release reproduce the trained function to the byte instead of assuming it.
"""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora_export.errors import ExportError, UsageError
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.sources.live_model import Repacked, trained_module
from qlora_export.sources.sidecar import write_sidecar
from qlora_export.types import FROM_TORCH_NAMES, TrainingQuantization

RECORDED_PACKAGES = ("transformers", "bitsandbytes", "peft", "torch")


def record(model: Any, folder: str | Path, base: str | Path | None = None) -> Path:
    """Write the sidecar of a live 4-bit model into an adapter folder and return its path.

    `model` is a transformers model loaded with bitsandbytes NF4, with or without peft around it; `base` is the folder
    it was loaded from, by default the one transformers remembers. Raises UsageError when nothing is quantised.
    """
    return write_sidecar(Path(folder), training_quantization(model, base))


def training_quantization(model: Any, base: str | Path | None = None) -> TrainingQuantization:
    """How a live 4-bit model is quantised; raises UsageError when nothing is."""
    layers = {
        _module_name(name): module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "LinearNF4") and hasattr(module.weight, "quant_state")
    }
    if not layers:
        raise UsageError("the model has no 4-bit layer", "load it with BitsAndBytesConfig(load_in_4bit=True)")
    first = next(iter(layers.values()))
    state = first.weight.quant_state
    modules = {name: trained_module(name, layer) for name, layer in layers.items()}
    storage = _dtype_name(state.dtype)
    compute = _dtype_name(first.compute_dtype or state.dtype)
    return TrainingQuantization(
        quant_type=state.quant_type,
        block_size=int(state.blocksize),
        double_quant=bool(state.nested),
        storage_dtype=storage,
        compute_dtype=compute,
        weight_roundings=weight_roundings(storage, compute, version("bitsandbytes")),
        exact_nested=first.weight.device.type != "cpu",
        base_sha256=_base_sha256(model, base),
        modules=modules,
        versions={name: found for name in RECORDED_PACKAGES if (found := _version(name))},
        provenance="sidecar",
    )


class QloraExportCallback(TrainerCallback):
    """Writes the sidecar into every checkpoint that transformers' Trainer saves.

    The quantisation is read once, when training begins: it does not change, and evaluation may repack the weights.
    """

    def __init__(self, base: str | Path | None = None) -> None:
        self._base = base
        self._training: TrainingQuantization | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Read how the model is quantised; raises UsageError when it is not, warns when it was repacked already."""
        try:
            self._training = training_quantization(others["model"], self._base)
        except Repacked as error:
            warnings.warn(f"no sidecar will be written: {error.message}; {error.hint}", stacklevel=2)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Write the sidecar beside the adapter that was just saved."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._training is not None and state.is_world_process_zero and folder.is_dir():
            write_sidecar(folder, self._training)


def weight_roundings(storage: str, compute: str, bitsandbytes_version: str) -> tuple[str, ...]:
    """The dtypes a decoded weight is rounded to before it is multiplied.

    Up to 0.49 bitsandbytes decoded to the storage dtype and cast to the compute dtype; from 0.50 on it decodes straight
    to the compute dtype (`gemm_4bit`).
    """
    major, minor = (int(number) for number in re.findall(r"\d+", bitsandbytes_version)[:2])
    if (major, minor) >= (0, 50) or storage == compute:
        return (compute,)
    return (storage, compute)


def _module_name(name: str) -> str:
    """A module's name in the base: without what peft wraps around it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _dtype_name(dtype: Any) -> str:
    return FROM_TORCH_NAMES[str(dtype).removeprefix("torch.")]


def _base_sha256(model: Any, base: str | Path | None) -> str | None:
    """Digest of the base's headers, or None when its folder cannot be found any more."""
    source = Path(base or model.config._name_or_path)
    if not source.is_dir():
        source = _cached_snapshot(str(source), getattr(model.config, "_commit_hash", None)) or source
    try:
        return open_checkpoint(source).headers_sha256
    except ExportError:
        return None


def _cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The folder of a Hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
