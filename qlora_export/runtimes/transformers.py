"""The runtime `transformers`: the folder as a language model or a classifier, with its `adapter/` by peft, in float32.

The folder is loaded in its own dtype, so that constants such as the embedding scale of Gemma are rounded as they will
be in serving, then widened: activations are float32. Quantised weights are decoded in float32 and rounded to the
folder's compute dtype, the values that serving multiplies with; those of compressed-tensors are decoded in the model's
dtype, and activations are rounded where the folder says so. `interleaved` decodes GPTQ and AWQ, `asymmetric` groups of
compressed-tensors with zero points.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_export.merge.companion_files import ADAPTER_FOLDER
from qlora_export.runtimes.asymmetric_int4 import is_asymmetric, load_asymmetric
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.classifier import session_of
from qlora_export.runtimes.decoded import stated_quantization
from qlora_export.runtimes.gptq_awq import METHODS, load_interleaved
from qlora_export.runtimes.loading import (
    attach_adapter,
    decompress,
    load_model,
    pin_weights,
    placed,
    widen_dense,
)
from qlora_export.runtimes.lora_layers import pin_dora
from qlora_export.sources.adapter import open_adapter


class TransformersRuntime:
    """Opens safetensors artifacts as a consumer would."""

    name = "transformers"

    @contextmanager
    def open(self, folder: Path, device: str = "cpu") -> Iterator[Session]:
        """Load the folder onto a device; raises InputError when it does not load."""
        model = _loaded(folder)
        if (folder / ADAPTER_FOLDER).is_dir():
            model = attach_adapter(model, folder / ADAPTER_FOLDER)
        decompress(model)
        widen_dense(model)
        pin_weights(model)
        pin_dora(model)
        yield session_of(placed(model, device))


def _loaded(folder: Path) -> Any:
    stated = stated_quantization(folder)
    if stated.get("quant_method") in METHODS:
        return load_interleaved(folder)
    if is_asymmetric(stated):
        return load_asymmetric(folder)
    adapter = folder / ADAPTER_FOLDER
    return load_model(folder, open_adapter(adapter).labels if adapter.is_dir() else None, dtype="auto")
