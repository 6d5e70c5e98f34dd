"""The adapter on its own: peft's files as they are, for those who have the base already.

On disk: `adapter_config.json`, `adapter_model.safetensors`, the sidecar and the adapter's own tokenizer files, byte for
byte. It is measured on the base of training, with the adapter loaded from the shipped folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.errors import UsageError
from qlora_export.sources.adapter import CONFIG_NAME, SHARD_INDEX_NAME, open_adapter
from qlora_export.sources.sidecar import SIDECAR_NAME
from qlora_export.types import Options, Rounding


@dataclass(frozen=True)
class AdapterExporter:
    """Copies an adapter."""

    name: str = "adapter"
    takes: str = "adapter"
    runtime: str = "as-trained"
    bytes_per_weight: float = 0.0

    def facts(self) -> Mapping[str, Any]:
        """Nothing but the adapter decides the bytes."""
        return {}

    def working_bytes_per_weight(self, config: Mapping[str, Any]) -> float:
        """None."""
        del config
        return 0.0

    def obstacle(self, config: Mapping[str, Any]) -> str | None:
        """None: any architecture has it."""
        del config
        return None

    def export(self, source: Path, destination: Path) -> None:
        """Copy what peft reads, and the sidecar."""
        weights = [path.name for path in open_adapter(source).files]
        for name in (CONFIG_NAME, *weights, SHARD_INDEX_NAME, SIDECAR_NAME):
            if (source / name).exists():
                shutil.copyfile(source / name, destination / name)


def alone(options: Options, rounding: Rounding | None) -> AdapterExporter:
    """The adapter's own files."""
    if rounding is not None:
        raise UsageError(f"adapter rounds nothing, so there is nothing to be {rounding}", "leave `rounding` out")
    if options:
        raise UsageError(f"adapter has no option {next(iter(options))!r}", "it has none")
    return AdapterExporter()
