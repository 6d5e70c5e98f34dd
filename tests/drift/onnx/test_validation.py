"""Graphs that are right, and graphs that are wrong in one layer each, run in every way for real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from qlora_export.artifact import Artifact, read_artifact
from qlora_export.drift.onnx.artifacts import source_of, validated
from qlora_export.drift.onnx.validation import validate, validation_windows
from qlora_export.drift.onnx.variants import GraphFindings
from qlora_export.drift.tokens import Protocol, TokenSet, Window
from qlora_export.errors import ExitCode, InputError
from qlora_export.pipeline.check_folder import CheckRequest, check_against
from qlora_export.pipeline.options import RunOptions, untracked
from qlora_export.report.data import exit_code, write_report
from qlora_export.report.probes import probe_lines
from qlora_export.report.schemas import report_schema
from qlora_export.runtimes.registry import load_runtime
from tests.helpers.graphs import Spoil

GENERATOR = np.random.default_rng(3)
IDS = [tuple(GENERATOR.integers(5, 2000, 101).tolist()) for _ in range(3)]
TOKENS = TokenSet(
    tuple(Window(ids, tuple(range(1, 101)), "", block) for block, ids in enumerate(IDS)),
    Protocol("test", "as the test says", 101),
)
SAME = ("decoding with the cache", "a batch of three, padded", "decoding a batch of three, padded")


def windows_of(*lengths: int) -> list[int]:
    """The lengths of what is run of windows that feed so many tokens."""
    ids = IDS[0]
    windows = tuple(Window(ids[: length + 1], tuple(range(1, length + 1)), "", 0) for length in lengths)
    return [len(window) for window in validation_windows(TokenSet(windows, TOKENS.protocol))]


def test_lengths_differ_wherever_there_are_tokens_enough() -> None:
    assert windows_of(100, 100, 100) == [96, 48, 16]
    assert windows_of(60, 60, 60) == [60, 30, 10]
    assert windows_of(100) == [96, 48, 16]
    assert windows_of(100, 30, 100) == [96, 15, 16]
    assert windows_of(4) == [4, 2, 2]
    assert windows_of(1) == [1]


def found_of(artifact: Artifact) -> GraphFindings:
    found = validated(artifact, TOKENS, untracked)
    assert found is not None
    return found


def test_a_right_graph_agrees_in_every_way(graphs: Path) -> None:
    found = found_of(read_artifact(graphs / "onnx-fp32"))
    assert (found.weights, found.source, found.window_tokens) == ("float32", "bf16", (96, 48, 16))
    assert (found.breaches, found.departs, found.accuracy_level) == ((), None, None)
    prefill, *others = found.ways
    assert [way.name for way in others[:3]] == list(SAME)
    assert prefill.from_source is not None
    assert (prefill.from_source.tokens, prefill.from_source.top1_differs) == (160, 0)
    for way in found.ways:
        assert way.from_source is not None
        assert way.from_source.mean_kl < 1e-9
    assert all(way.from_prefill is not None and way.from_prefill.mean_kl < 1e-9 for way in others)
    assert others[0].from_prefill is not None
    assert others[0].from_prefill.tokens == 24


def test_accuracies_of_integer_products_are_told_apart(graphs: Path) -> None:
    found = found_of(read_artifact(graphs / "onnx-int4"))
    assert (found.weights, found.accuracy_level, found.breaches) == ("4-bit", 4, ())
    assert found.source == "w4a16"
    levels = {way.name: way for way in found.ways if way.name.startswith("accuracy_level")}
    assert list(levels) == ["accuracy_level 0", "accuracy_level 1"]
    for way in levels.values():
        assert way.from_prefill is not None
        assert 1e-6 < way.from_prefill.mean_kl < 1e-3
        assert way.from_source is not None
        assert way.from_source.limit == 1e-3
        assert way.from_source.mean_kl < 1e-5
    assert found.ways[0].from_source is not None
    assert found.ways[0].from_source.limit is None


def test_integers_that_are_not_those_of_the_source_are_found(graphs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(graphs / "onnx-int4", tmp_path / "copied"))
    scales = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    product = next(item for item in scales if item.name.startswith("/model/layers.0/mlp/up_proj"))
    doubled(folder, product.input[2])
    source = source_of(read_artifact(graphs / "onnx-int4"))
    assert source is not None
    found = validate(folder, TOKENS, source)
    assert found.departs == "model.layers.0.mlp.up_proj"
    assert found.breaches[0].startswith("ONNX: accuracy_level 0 differs from w4a16 in torch: mean KL ")
    assert len(found.breaches) == 2


def test_a_source_that_is_another_one_is_none(graphs: Path, copied: Path) -> None:
    manifest = json.loads((graphs / "onnx-fp32/manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert source_of(read_artifact(copied)) is None
    assert source_of(read_artifact(graphs / "onnx-fp32")) is not None
    assert validated(read_artifact(graphs / "bf16"), TOKENS, untracked) is None


def wrong_present(model: Any) -> None:
    """What the last layer keeps of the past is half as large again."""
    attention = next(node for node in model.graph.node if "present.1.value" in node.output)
    attention.output[list(attention.output).index("present.1.value")] = "kept"
    model.graph.initializer.append(helper.make_tensor("larger", onnx.TensorProto.FLOAT, [], [1.5]))
    model.graph.node.append(helper.make_node("Mul", ["kept", "larger"], ["present.1.value"]))


def test_a_cache_that_is_wrong_is_named_with_its_layer(spoiled: Spoil) -> None:
    found = validate(spoiled(wrong_present), TOKENS, None)
    assert found.departs == "model.layers.1.attn"
    assert found.breaches[0].startswith("ONNX: decoding with the cache differs from prefill: mean KL ")
    assert found.breaches[0].endswith("the first layer that departs is model.layers.1.attn")
    assert len(found.breaches) == 3


def test_an_operator_that_nobody_knows_is_found_by_the_checker(spoiled: Spoil) -> None:
    folder = spoiled(lambda model: model.graph.node.append(helper.make_node("Nonsense", ["logits"], ["more"])))
    with pytest.raises(InputError, match="the ONNX checker: No Op registered for Nonsense"):
        validate(folder, TOKENS, None)


def doubled(folder: Path, name: str) -> None:
    """A weight of the graph is twice what it should be, in the data file."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(item for item in model.graph.initializer if item.name == name)
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    values = np.memmap(folder / "model.onnx.data", np.float32, "r+", offset, tuple(tensor.dims))
    values *= 2
    values.flush()


@pytest.fixture
def judge(graphs: Path, copied: Path, pico_text: Path, tmp_path: Path) -> Callable[[], Any]:
    """The check of the copy against bf16, with limits that only the validation breaks."""
    wide = ["drift.limits={perplexity_ratio: 100, mean_kl: 100, same_top1: 0, gain_kept: null}"]

    def run() -> Any:
        question = CheckRequest(str(copied), str(graphs / "bf16"))
        return check_against(question, {"text": str(pico_text)}, wide, RunOptions(tmp_path / "out"))

    return run


def test_a_weight_that_is_wrong_fails_the_check_and_is_named(
    judge: Callable[[], Any], copied: Path, tmp_path: Path
) -> None:
    doubled(copied, "model.layers.1.mlp.up_proj.MatMul.weight")
    run = judge()
    assert exit_code(run) == ExitCode.GATE_FAILED
    (entry,) = run.ledger.entries
    assert entry.verdict.reasons[0].startswith("ONNX: prefill differs from the model in torch: mean KL ")
    assert entry.verdict.reasons[0].endswith("the first layer that departs is model.layers.1.mlp.up_proj")
    assert any("fails 1 of its comparisons" in line for line in probe_lines(entry))


def test_a_right_folder_passes_and_is_reported(judge: Callable[[], Any], tmp_path: Path) -> None:
    import jsonschema  # type: ignore[import-untyped]

    run = judge()
    assert exit_code(run) == ExitCode.OK
    path = write_report(run, tmp_path)
    report = json.loads(path.read_text())
    jsonschema.validate(report, report_schema())
    assert report["artifacts"][0]["onnx"]["ways"][0]["from_source"]["mean_kl"] < 1e-9
    line = "ONNX in float32: 5 ways of running agree with prefill"
    assert line in (tmp_path / "report.md").read_text()
    assert line in probe_lines(run.ledger.entries[0])[0]


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-int4"])
def test_the_folder_is_left_as_it_was(graphs: Path, name: str) -> None:
    names = {path.name for path in (graphs / name).iterdir()}
    assert names == {"manifest.json", *read_artifact(graphs / name).manifest["files"]}
    assert load_runtime("onnxruntime").name == "onnxruntime"
