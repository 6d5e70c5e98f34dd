"""Graphs laid out for WebGPU: what a browser loads, measured here on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qlora_export.drift.onnx.artifacts import validated
from qlora_export.errors import UsageError
from qlora_export.exporters.onnx.built import BuiltExporter
from qlora_export.exporters.registry import load_exporter
from qlora_export.pipeline.options import untracked
from qlora_export.runtimes.registry import load_runtime
from tests.exporters.test_onnx import TOKENS
from tests.exporters.test_onnx_architectures import TOKENS as TEXT
from tests.exporters.test_onnx_integers import make

BROWSER = {"provider": "webgpu", "layout": "transformers.js"}


@pytest.mark.parametrize(
    ("form", "options", "graph", "most"),
    [
        ("onnx-fp16", BROWSER, "onnx/model_fp16.onnx", 1e-4),
        ("onnx-int4", {**BROWSER, "accuracy_level": 1}, "onnx/model_q4f16.onnx", 0.5),
    ],
)
def test_a_graph_for_a_browser_is_measured_here(
    pico_base: Path, tmp_path: Path, form: str, options: dict[str, Any], graph: str, most: float
) -> None:
    """Every way of it agrees with prefill, and it is as near to its source as rounding leaves it."""
    source, made = make(pico_base, tmp_path, {"format": "bf16"}, {"format": form, "options": options})
    decoder = json.loads((made.path / "genai_config.json").read_text())["model"]["decoder"]
    (provider,) = decoder["session_options"]["provider_options"]
    assert list(provider) == ["webgpu"]
    assert decoder["filename"] == graph
    cache = next(
        value for value in onnx.load(made.path / graph, load_external_data=False).graph.input if "past" in value.name
    )
    assert cache.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    found = validated(made, TEXT, untracked)
    assert found is not None
    assert found.breaches == ()
    with load_runtime("transformers").open(source.path) as session:
        exact = session.log_probabilities(TOKENS)
    with load_runtime("onnxruntime").open(made.path) as session:
        rounded = session.log_probabilities(TOKENS)
    assert 0 < (np.exp(exact) * (exact - rounded)).sum(axis=1).mean() < most


@pytest.mark.parametrize(("stated", "made_for"), [("cpu", "cuda"), ("cuda", "cuda"), ("webgpu", "webgpu")])
def test_float16_for_a_cpu_alone_borrows_a_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str, made_for: str
) -> None:
    seen = []

    def run_builder(name: str, order: Any, source: Path, destination: Path) -> None:
        seen.append(order.provider)
        config: dict[str, Any] = {
            "model": {"decoder": {"session_options": {"provider_options": [{order.provider: {}}]}}}
        }
        (destination / "genai_config.json").write_text(json.dumps(config))

    monkeypatch.setattr("qlora_export.exporters.onnx.built.run_builder", run_builder)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    exporter = load_exporter("onnx-fp16", {"provider": stated})
    assert isinstance(exporter, BuiltExporter)
    exporter.export(tmp_path, tmp_path)
    session = json.loads((tmp_path / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert seen == [made_for]
    assert session["provider_options"] == ([] if stated == "cpu" else [{stated: {}}])


@pytest.mark.parametrize(("form", "rounding"), [("onnx-fp32", None), ("onnx-int4", "nearest")])
def test_a_layout_that_is_not_measured_is_no_option(form: str, rounding: Any) -> None:
    with pytest.raises(UsageError, match="no option 'provider'"):
        load_exporter(form, {"provider": "webgpu"}, rounding)
