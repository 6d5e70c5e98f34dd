"""Artifacts whose weights the builder itself makes, from a dense folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_export.contracts import Takes
from qlora_export.exporters.onnx.builder import Order, require_packages
from qlora_export.exporters.onnx.graphs import make_graph, obstacle
from qlora_export.exporters.onnx.options import Float16Options, Float32Options, Int8Options, IntegerOptions
from qlora_export.exporters.transformers_js import lay_out


@dataclass(frozen=True)
class BuiltExporter:
    """Runs the builder with one precision."""

    name: str
    precision: str
    bytes_per_weight: float
    options: Float32Options | Float16Options | IntegerOptions | Int8Options
    takes: Takes = "dense"
    runtime: str = "onnxruntime"
    working_bytes_per_weight: float = 0.0

    def facts(self) -> Mapping[str, Any]:
        """Versions and options that decide the bytes; raises EnvironmentProblem when the builder is not installed."""
        return {"versions": dict(require_packages(self.name)), "options": asdict(self.options)}

    def obstacle(self, config: Mapping[str, Any]) -> str | None:
        """That of an architecture which neither the builder nor torch.onnx.export makes a graph of."""
        return obstacle(self.name, config)

    def export(self, source: Path, destination: Path) -> None:
        """Fill `destination`; raises Refused for an architecture that the builder lacks, else EnvironmentProblem."""
        extra = self.options.words() if isinstance(self.options, IntegerOptions | Int8Options) else ()
        stated = "cpu" if isinstance(self.options, Float32Options) else self.options.provider
        # For a CPU the builder lays float16 out around an attention that has none; the one of CUDA runs there as well.
        provider = "cuda" if self.precision == "fp16" and stated == "cpu" else stated
        make_graph(self.name, Order(self.precision, provider, extra), source, destination)
        if provider != stated:
            _open_on_cpu(destination / "genai_config.json")

    def finish(self, source: Path, destination: Path) -> None:
        """Give the complete folder the layout that was asked for."""
        lay_out(self.options.layout, source, destination)


def _open_on_cpu(path: Path) -> None:
    """Have ONNX Runtime GenAI open the folder without an execution provider of its own."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    path.write_text(json.dumps(config, indent=4), encoding="utf-8")
