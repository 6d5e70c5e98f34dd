"""The folder that three worlds load: transformers.js in Node and in Chromium, and ONNX Runtime GenAI, for real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from qlora_export.demo import recipe_path
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import release
from qlora_export.recipe.load import make_recipe
from qlora_export.report.run import Run
from qlora_export.runtimes.registry import load_runtime
from tests.exporters.javascript import SOURCES, installed_packages
from tests.exporters.local_site import served
from tests.report.chromium import Browser, found_chromium

DEMO_FOLDER = recipe_path().parent
COUNT = 24
CLIENT_SECONDS = 120
LAYOUT = {"layout": "transformers.js"}
FREE = {"perplexity_ratio": 100, "mean_kl": 100, "same_top1": 0, "gain_kept": None}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo's model in this layout, in float32 and in 4 bits, through check, lint and publication."""
    out = tmp_path_factory.mktemp("clients")
    text = (DEMO_FOLDER / "holdout.jsonl").read_text().splitlines()
    (out / "text.jsonl").write_text("\n".join(text[:3]) + "\n")
    data = {
        "base": str(DEMO_FOLDER / "base"),
        "base_id": "qlora-export/demo",
        "adapter": str(DEMO_FOLDER / "adapter"),
        "artifacts": [
            "bf16",
            {"format": "onnx-fp32", "options": LAYOUT},
            {"format": "onnx-int4", "options": {**LAYOUT, "accuracy_level": 1}},
        ],
        "drift": {"text": str(out / "text.jsonl"), "limits": FREE},
        "publish": {"to": f"folder:{out / 'registry'}", "card": {"license": "apache-2.0"}},
    }
    return release(make_recipe(data, Path(), "test"), RunOptions(out / "run"))


@pytest.fixture(scope="module")
def folders(released: Run) -> dict[str, Path]:
    return {artifact.name: artifact.path for artifact in released.artifacts}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (DEMO_FOLDER / "holdout.jsonl").read_text().splitlines()[:3]
    return [json.loads(line)["messages"][0]["content"] for line in lines]


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], prompts: list[str]) -> list[list[int]]:
    """Prompts and their greedy continuations by torch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bf16"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["bf16"], dtype=torch.float32)
    found = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            found.append(model.generate(**inputs, max_new_tokens=COUNT, do_sample=False)[0].tolist())
    return found


def test_one_graph_and_one_data_file_under_the_names_of_that_layout(folders: dict[str, Path]) -> None:
    for name, graph in (("onnx-fp32", "model.onnx"), ("onnx-int4", "model_q4.onnx")):
        folder = folders[name]
        assert {path.name for path in folder.glob("**/*.onnx*")} == {graph, f"{graph}_data"}
        assert json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["filename"] == f"onnx/{graph}"
        model = onnx.load(folder / "onnx" / graph, load_external_data=False)
        places = {entry.value for item in model.graph.initializer for entry in item.external_data[:1]}
        assert places == {f"{graph}_data"}
        past = next(value for value in model.graph.input if value.name == "past_key_values.0.key")
        assert past.type.tensor_type.shape.dim[3].dim_value == 64


def test_the_configuration_tells_a_client_everything(folders: dict[str, Path]) -> None:
    config = json.loads((folders["onnx-int4"] / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}
    assert config["model_type"] == "llama"
    template = (folders["onnx-int4"] / "chat_template.jinja").read_text()
    assert json.loads((folders["onnx-int4"] / "tokenizer_config.json").read_text())["chat_template"] == template


def test_it_is_measured_validated_linted_and_published(released: Run) -> None:
    assert released.ledger is not None
    for entry in released.ledger.entries[1:]:
        assert entry.runtime == "onnxruntime"
        assert entry.verdict.outcome == "pass", entry.verdict.reasons
        assert entry.findings.onnx is not None
        assert entry.findings.onnx.breaches == ()
    assert {receipt.artifact for receipt in released.receipts} == {"bf16", "onnx-fp32", "onnx-int4"}
    assert "onnx/model_q4.onnx_data" in next(r.files for r in released.receipts if r.artifact == "onnx-int4")


def test_genai_writes_what_torch_writes(folders: dict[str, Path], expected: list[list[int]]) -> None:
    script = (
        "import json, sys, onnxruntime_genai as genai\n"
        "asked = json.load(sys.stdin)\n"
        "model = genai.Model(asked['folder'])\n"
        "answers = []\n"
        "for prompt, total in asked['prompts']:\n"
        "    parameters = genai.GeneratorParams(model)\n"
        "    parameters.set_search_options(max_length=total, do_sample=False)\n"
        "    generator = genai.Generator(model, parameters)\n"
        "    generator.append_tokens(prompt)\n"
        "    while not generator.is_done():\n"
        "        generator.generate_next_token()\n"
        "    answers.append([int(token) for token in generator.get_sequence(0)])\n"
        "print(json.dumps(answers))"
    )
    lengths = [max(place for place, token in enumerate(ids) if token == 3) + 2 for ids in expected]
    asked = [(ids[:length], len(ids)) for ids, length in zip(expected, lengths, strict=True)]
    request = json.dumps({"folder": str(folders["onnx-fp32"]), "prompts": asked})
    found = subprocess.run([sys.executable, "-c", script], input=request, check=True, capture_output=True, text=True)
    assert json.loads(found.stdout.splitlines()[-1]) == expected
    assert all(len(ids) - length > 8 for ids, length in zip(expected, lengths, strict=True))


def in_node(folder: Path, prompts: Sequence[str], place: Path) -> Any:
    """What transformers.js writes in Node."""
    (place / "node_modules").symlink_to(installed_packages())
    for name in ("generate.mjs", "node.mjs"):
        (place / name).write_bytes((SOURCES / name).read_bytes())
    asked = {"folder": str(folder.parent), "name": folder.name, "device": "cpu", "prompts": prompts, "count": COUNT}
    found = subprocess.run(
        ["node", "node.mjs"], input=json.dumps(asked), cwd=place, capture_output=True, text=True, timeout=CLIENT_SECONDS
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_node_writes_what_torch_writes(
    folders: dict[str, Path], prompts: list[str], expected: list[list[int]], tmp_path: Path
) -> None:
    assert in_node(folders["onnx-fp32"], prompts, tmp_path) == expected


def test_node_writes_in_four_bits_what_python_writes(
    folders: dict[str, Path], prompts: list[str], tmp_path: Path
) -> None:
    (found,) = in_node(folders["onnx-int4"], prompts[:1], tmp_path)
    with load_runtime("onnxruntime").open(folders["onnx-int4"]) as session:
        rows = session.log_probabilities(found[:-1])
    assert rows[-COUNT:].argmax(axis=1).tolist() == found[-COUNT:]
    assert np.isfinite(rows).all()


def test_chromium_writes_what_torch_writes(
    folders: dict[str, Path], prompts: list[str], expected: list[list[int]], tmp_path: Path
) -> None:
    """WebAssembly, without a cache and without anything from another machine."""
    path = found_chromium()
    if path is None:
        pytest.skip("no Chromium")
    places = {name: SOURCES / name for name in ("page.html", "generate.mjs")}
    places |= {"node_modules": installed_packages(), "models": folders["onnx-fp32"].parent}
    with served(places) as site, Browser(path, tmp_path / "profile") as browser:
        browser.send("Page.navigate", url=f"{site}/page.html")
        asked = {"name": "onnx-fp32", "device": "wasm", "prompts": prompts[:2], "count": COUNT}
        waiting = "new Promise((done) => { const look = () => window.ask ? done() : setTimeout(look, 50); look(); })"
        browser.value(waiting)
        assert browser.value(f"window.ask({json.dumps(asked)})") == expected[:2]
        requests = [event["request"]["url"] for event in browser.told("Network.requestWillBeSent")]
        assert any(url.endswith("onnx/model.onnx_data") for url in requests)
        assert [url for url in requests if not url.startswith((site, "data:", "blob:"))] == []
