"""Sequence classifiers in ONNX: traced, run in batches, and laid out for transformers.js."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
import transformers

from qlora_export.artifact import read_artifact
from qlora_export.drift.onnx.artifacts import validated
from qlora_export.errors import InputError, PlanRefused
from qlora_export.pipeline.options import RunOptions, untracked
from qlora_export.pipeline.release import build
from qlora_export.planning.make import make_plan
from qlora_export.publish.card.facts import CardItem
from qlora_export.publish.card.snippets import javascript, snippet
from qlora_export.publish.lint.companions import companion_problems
from qlora_export.publish.lint.contents import Contents
from qlora_export.recipe.config import Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.onnx.folder import open_graph
from qlora_export.runtimes.onnxruntime import OnnxRuntime
from tests.exporters.test_onnx_traced import IDS, TOKENS
from tests.helpers.files import edit_json
from tests.helpers.pico import save_base

EXPORTS: list[Any] = [
    "bf16",
    "onnx-fp32",
    {"format": "onnx-fp32", "name": "javascript", "options": {"layout": "transformers.js"}},
    {"format": "onnx-int8", "name": "onnx-int8"},
]


def recipe(base: Path, adapter: Path, *artifacts: Any) -> Recipe:
    return make_recipe({"base": str(base), "adapter": str(adapter), "artifacts": list(artifacts)}, Path(), "test")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that states the token that pads, and nothing of generation; its one layer is all that the plan traces."""
    folder = save_base(tmp_path_factory.mktemp("classifier") / "base", seed=1, num_hidden_layers=1, pad_token_id=2)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    folder = base.parent / "adapter"
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(base: Path, adapter: Path) -> Path:
    out = adapter.parent / "run"
    build(recipe(base, adapter, *EXPORTS), RunOptions(out))
    return out


@pytest.mark.parametrize("name", ["onnx-fp32", "javascript", "onnx-int8"])
def test_it_says_what_torch_says_alone_and_in_a_batch(made: Path, name: str) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made / "bf16", dtype=torch.float32)
    tolerance = 0.05 if name == "onnx-int8" else 1e-5
    with OnnxRuntime().open(made / name) as session:
        for ids in IDS:
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits.log_softmax(-1).numpy()
            found = session.log_probabilities(ids)
            assert found.shape == (1, 3)
            np.testing.assert_allclose(found, expected, atol=tolerance)
    findings = validated(read_artifact(made / name), TOKENS, untracked)
    assert findings is not None
    assert findings.breaches == ()
    assert [way.name for way in findings.ways][:3] == [
        "prefill", "a batch of three, padded", "prefill without graph optimisation",
    ]  # fmt: skip


def test_the_folder_names_its_labels_and_lies_as_transformers_js_reads_it(made: Path) -> None:
    plain = json.loads((made / "onnx-fp32/config.json").read_text())
    assert plain["architectures"] == ["LlamaForSequenceClassification"]
    assert plain["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    folder = made / "javascript"
    assert json.loads((folder / "config.json").read_text())["transformers.js_config"]["dtype"] == "fp32"
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx")
    assert [item.name for item in session.get_inputs()] == ["input_ids", "attention_mask"]


def test_a_card_shows_how_it_is_loaded(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts: Any = SimpleNamespace(repository="acme/labels")
    drift: Any = None
    plain, javascript_item = (CardItem(read_artifact(made / name), drift, "") for name in ("onnx-fp32", "javascript"))
    assert plain.packages[0] == "onnxruntime"
    for item in (plain, javascript_item):
        text = snippet(facts, item).replace('snapshot_download("acme/labels")', repr(str(item.artifact.path)))
        exec(compile(text, "snippet", "exec"), {})
        assert capsys.readouterr().out.startswith("LABEL_")
    assert "pipeline('text-classification', 'acme/labels')" in (javascript(facts, javascript_item) or "")
    assert javascript(facts, plain) is None


@pytest.mark.parametrize("name", ["onnx-fp32", "javascript"])
def test_nothing_is_missing_for_a_publication_but_its_config(made: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(made / name, tmp_path / "staged"))
    names = frozenset(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert list(companion_problems(Contents(folder, names), "")) == []
    (folder / "config.json").unlink()
    without = Contents(folder, names - {"config.json"})
    assert "genai_config.json" in next(companion_problems(without, "")).message


def test_a_graph_with_other_inputs_is_no_classifier(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "onnx-fp32", tmp_path / "copied"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.input[1].name = "token_type_ids"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        InputError, match="has the inputs 'input_ids', 'token_type_ids', a classifier has input_ids and"
    ):
        open_graph(folder)


def test_without_a_token_that_pads_it_is_refused_by_the_plan(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "base"))
    edit_json(other / "config.json", pad_token_id=None)
    with pytest.raises(PlanRefused, match="config.json states no pad_token_id"):
        make_plan(recipe(other, adapter, "bf16", "onnx-fp32"), tmp_path / "out")
