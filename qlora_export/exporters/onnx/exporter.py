"""What exporters to ONNX share: their packages and options decide the bytes, and the layout comes last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_export.exporters.onnx.builder import require_packages
from qlora_export.exporters.onnx.graphs import obstacle
from qlora_export.exporters.onnx.surgery import SURGERY_BYTES_PER_WEIGHT
from qlora_export.exporters.transformers_js import lay_out


@dataclass(frozen=True, kw_only=True)
class OnnxExporter:
    """An exporter that puts weights into a graph with marks, unless it states otherwise."""

    name: str
    takes: str
    bytes_per_weight: float
    options: Any
    runtime: str = "onnxruntime"

    def facts(self) -> Mapping[str, Any]:
        """Versions and options that decide the bytes; raises EnvironmentProblem when the builder is not installed."""
        return {"versions": dict(require_packages(self.name)), "options": asdict(self.options)}

    def working_bytes_per_weight(self, config: Mapping[str, Any]) -> float:
        """Marks and the graph around them."""
        return SURGERY_BYTES_PER_WEIGHT

    def obstacle(self, config: Mapping[str, Any]) -> str | None:
        """That of an architecture which neither the builder nor torch.onnx.export makes a graph of."""
        return obstacle(self.name, config)

    def finish(self, source: Path, destination: Path) -> None:
        """Give the complete folder the layout that was asked for."""
        lay_out(self.options.layout, source, destination)
