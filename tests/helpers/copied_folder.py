"""An exporter that the catalog does not have: the weights of a finished `tf32` folder once more."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.types import Options, Rounding


@dataclass(frozen=True)
class CopyExporter:
    """Copies weights and configuration."""

    name: str = "tf32-copy"
    takes: str = "tf32"
    runtime: str = "transformers"
    bytes_per_weight: float = 4.0

    def working_bytes_per_weight(self, config: Mapping[str, Any]) -> float:
        """Nothing beside the artifact."""
        return 0.0

    def obstacle(self, config: Mapping[str, Any]) -> str | None:
        """None: anything can be copied."""
        return None

    def facts(self) -> Mapping[str, Any]:
        """Nothing decides the bytes but the source."""
        return {}

    def export(self, source: Path, destination: Path) -> None:
        """Fill the destination folder."""
        for path in (*source.glob("*.safetensors"), source / "config.json"):
            shutil.copyfile(path, destination / path.name)


def copied(options: Options, rounding: Rounding | None) -> CopyExporter:
    """The exporter, as its row names it."""
    return CopyExporter()
