"""Artifacts made of a dense folder alone: by the model builder or, where it lacks the architecture, by tracing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_export.exporters.onnx.builder import Order, run_builder
from qlora_export.exporters.onnx.exporter import OnnxExporter
from qlora_export.exporters.onnx.graphs import CONFIG_NAME, is_built
from qlora_export.exporters.onnx.options import BITS, Float16Options, Float32Options, Int8Options, IntegerOptions
from qlora_export.exporters.onnx.rounded_products import BlockRounding
from qlora_export.exporters.onnx.traced.rounded import TracedRounding, trace_rounded
from qlora_export.exporters.onnx.traced.tracer import trace
from qlora_export.exporters.transformers_js import GENAI_CONFIG
from qlora_export.sources.checkpoint import read_json

# Where q, k and v are as wide as each other, the builder stacks a quarter of all weights.
STACKED_BYTES_PER_WEIGHT = 0.5

BuiltOptions = Float32Options | Float16Options | IntegerOptions | Int8Options


@dataclass(frozen=True, kw_only=True)
class BuiltExporter(OnnxExporter):
    """Makes the graph with one precision."""

    precision: str
    options: BuiltOptions
    takes: str = "dense"

    def working_bytes_per_weight(self, config: Mapping[str, Any]) -> float:
        """What the builder stacks, or the dense graph that traced integers are rounded from."""
        if is_built(config):
            return STACKED_BYTES_PER_WEIGHT
        dense = 2.0 if self._traced_dtype == "fp16" else 4.0
        return dense if isinstance(self.options, IntegerOptions | Int8Options) else 0.0

    def obstacle(self, config: Mapping[str, Any]) -> str | None:
        """That of an architecture which neither the builder nor torch.onnx.export makes a graph of."""
        sensitive = isinstance(self.options, IntegerOptions) and self.options.sensitive_layers != "int4"
        if sensitive and not is_built(config):
            return (
                f"{self.name}: the model builder chooses sensitive_layers and does not make this graph: leave them out"
            )
        return super().obstacle(config)

    def export(self, source: Path, destination: Path) -> None:
        """Fill `destination`; raises Refused for what cannot be traced, EnvironmentProblem for a builder that fails."""
        if is_built(read_json(source / CONFIG_NAME)):
            self._build(source, destination)
        elif isinstance(self.options, IntegerOptions | Int8Options):
            trace_rounded(self.name, self._traced_dtype, _rounding(self.options), source, destination)
        else:
            trace(self.name, self._traced_dtype, source, destination)

    def _build(self, source: Path, destination: Path) -> None:
        extra = self.options.words() if isinstance(self.options, IntegerOptions | Int8Options) else ()
        stated = "cpu" if isinstance(self.options, Float32Options) else self.options.provider
        # For a CPU the builder lays float16 out around an attention that has none; the one of CUDA runs there as well.
        provider = "cuda" if self.precision == "fp16" and stated == "cpu" else stated
        run_builder(self.name, Order(self.precision, provider, extra), source, destination)
        if provider != stated:
            _open_on_cpu(destination / GENAI_CONFIG)

    @property
    def _traced_dtype(self) -> str:
        """That of activations: the builder, too, has float16 in integer graphs for other providers than a CPU."""
        elsewhere = not isinstance(self.options, Float32Options) and self.options.provider != "cpu"
        return "fp16" if self.precision == "fp16" or elsewhere else "fp32"


def _rounding(options: IntegerOptions | Int8Options) -> TracedRounding:
    bits = BITS[options.last_matrix] if isinstance(options, IntegerOptions) else 8
    usual = BlockRounding(
        4 if isinstance(options, IntegerOptions) else 8,
        options.block_size,
        options.symmetric,
        options.algorithm,
        options.accuracy_level,
    )
    excluded = frozenset(filter(None, options.exclude.split(",")))
    return TracedRounding(usual, replace(usual, bits=bits), excluded)


def _open_on_cpu(path: Path) -> None:
    """Have ONNX Runtime GenAI open the folder without an execution provider of its own."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    path.write_text(json.dumps(config, indent=4), encoding="utf-8")
