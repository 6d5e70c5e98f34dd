"""The GenAI model builder and ONNX Runtime, for real."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from qlora_export.artifact import Artifact
from qlora_export.engine import BuildOptions, build, export
from qlora_export.errors import (
    EnvironmentProblem,
    ExportError,
    InputError,
    PlanRefused,
    Refused,
    UsageError,
    VerifyMismatch,
)
from qlora_export.exporters.onnx.options import IntegerOptions, chosen
from qlora_export.exporters.registry import load_exporter
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import Recipe
from qlora_export.runtimes.registry import load_runtime
from tests.helpers.files import edit_json, folder_bytes
from tests.helpers.pico import RecipeMaker

TOKENS = [0, 2, 300, 301, 17, 1500, 9, 77, 5, 6, 7, 8]


def make(recipe: Recipe, out: Path) -> tuple[Plan, dict[str, Artifact]]:
    plan = make_plan(recipe, out)
    made = {artifact.name: artifact for artifact in build(plan, out, BuildOptions())}
    for item in plan.exports:
        made[item.name] = export(plan, item, made.get(item.source_name), out)
    return plan, made


@pytest.fixture(scope="module")
def exported(pico_base: Path, pico_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx")
    artifacts: list[Any] = ["bf16", "onnx-fp32", "onnx-int4"]
    recipe = Recipe.model_validate({"base": str(pico_base), "adapter": str(pico_adapter), "artifacts": artifacts})
    make(recipe, out)
    return out


def test_fp32_computes_what_transformers_computes(exported: Path) -> None:
    """Prefill and decoding with the cache, at two lengths."""
    model = transformers.AutoModelForCausalLM.from_pretrained(exported / "bf16", dtype=torch.float32)
    with load_runtime("onnxruntime").open(exported / "onnx-fp32") as session:
        for tokens in (TOKENS, TOKENS[:3]):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens])).logits[0]
            expected = torch.log_softmax(logits, -1).numpy()
            assert np.abs(session.log_probabilities(tokens) - expected).max() < 1e-4


def test_int4_is_close_and_smaller(exported: Path) -> None:
    runtime = load_runtime("onnxruntime")
    with runtime.open(exported / "onnx-fp32") as session:
        exact = session.log_probabilities(TOKENS)
    with runtime.open(exported / "onnx-int4") as session:
        rounded = session.log_probabilities(TOKENS)
    divergence = (np.exp(exact) * (exact - rounded)).sum(axis=1).mean()
    assert 0 < divergence < 0.5
    sizes = [(exported / name / "model.onnx.data").stat().st_size for name in ("onnx-fp32", "onnx-int4")]
    assert sizes[1] < sizes[0]


def test_the_folder_is_complete_and_the_tokenizer_untouched(exported: Path) -> None:
    for name in ("onnx-fp32", "onnx-int4"):
        folder = exported / name
        manifest = json.loads((folder / "manifest.json").read_text())
        assert {"manifest.json", *manifest["files"]} == set(folder_bytes(folder))
        assert manifest["runtime"] == "onnxruntime"
        assert manifest["sources"]["artifact"]["name"] == "bf16"
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (folder / file).read_bytes() == (exported / "bf16" / file).read_bytes()


def test_a_finished_export_is_kept_or_its_change_named(
    exported: Path, pico_base: Path, pico_adapter: Path, tmp_path: Path
) -> None:
    import shutil

    out = Path(shutil.copytree(exported, tmp_path / "out"))
    artifacts: list[Any] = ["bf16", "onnx-fp32", "onnx-int4"]
    recipe = Recipe.model_validate({"base": str(pico_base), "adapter": str(pico_adapter), "artifacts": artifacts})
    _, made = make(recipe, out)
    assert all(artifact.reused for artifact in made.values())
    other = Recipe.model_validate(
        {**recipe.model_dump(), "artifacts": ["bf16", {"format": "onnx-int4", "options": {"block_size": 64}}]}
    )
    with pytest.raises(UsageError, match="another plan"):
        make(other, out)
    with (out / "onnx-fp32/model.onnx.data").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(VerifyMismatch, match=r"onnx-fp32/model.onnx.data"):
        make(recipe, out)


def test_an_architecture_that_the_builder_lacks_is_refused_by_the_plan(
    pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch cannot follow it either; and by the builder, where its source does not say what it knows."""
    edit_json(base_copy / "config.json", architectures=["OPTForCausalLM"])
    recipe = pico_recipe("bf16", "onnx-fp32", base=str(base_copy))
    with pytest.raises(
        PlanRefused, match="OPTForCausalLM is not known to the model builder, and torch.onnx.export"
    ) as error:
        make(recipe, tmp_path / "out")
    assert error.value.exit_code == 4
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("qlora_export.exporters.onnx.builder.ARCHITECTURE", re.compile("nothing (of the kind)"))
    with pytest.raises(Refused, match="onnx-fp32: .*is not currently supported"):
        make(recipe, tmp_path / "out")
    assert not (tmp_path / "out/onnx-fp32").exists()
    assert (tmp_path / "out/bf16/manifest.json").exists()


def test_a_source_that_the_builder_cannot_read(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(EnvironmentProblem, match="the model builder failed"):
        load_exporter("onnx-fp32", {}).export(tmp_path / "empty", tmp_path / "out")


def test_a_killed_builder_is_named_and_the_next_run_starts_anew(
    pico_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_export.exporters.onnx.builder.BUILDER", "tests.exporters.killed_builder")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    recipe = pico_recipe("bf16", "onnx-fp32")
    with pytest.raises(EnvironmentProblem, match="killed by SIGKILL"):
        make(recipe, tmp_path)
    assert (tmp_path / "onnx-fp32.partial").is_dir()
    assert not (tmp_path / "onnx-fp32").exists()
    monkeypatch.setattr("qlora_export.exporters.onnx.builder.BUILDER", "tests.exporters.plain_builder")
    make(recipe, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"bf16", "onnx-fp32"}


def test_a_partial_folder_that_is_not_ours_is_left_alone(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    (tmp_path / "onnx-fp32.partial").mkdir()
    (tmp_path / "onnx-fp32.partial/thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not left behind by a run of ours"):
        make(pico_recipe("bf16", "onnx-fp32"), tmp_path)
    assert (tmp_path / "onnx-fp32.partial/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("artifact", "says"),
    [
        ({"format": "onnx-int4", "options": {"blocksize": 32}}, "onnx-int4 has no option 'blocksize'"),
        ({"format": "onnx-int4", "options": {"block_size": 33}}, "block_size is 33"),
        ({"format": "onnx-int4", "options": {"last_matrix": "fp8"}}, "last_matrix is 'fp8'"),
        ({"format": "onnx-fp32", "options": {"block_size": 32}}, "onnx-fp32 has no option 'block_size'"),
        ({"format": "onnx-fp32", "onto": "original"}, "from a dense artifact merged onto original"),
    ],
)
def test_options_that_are_wrong(pico_recipe: RecipeMaker, tmp_path: Path, artifact: Any, says: str) -> None:
    with pytest.raises(ExportError, match=says) as error:
        make_plan(pico_recipe("bf16", artifact), tmp_path)
    assert error.value.exit_code == 2
    assert error.value.hint


@pytest.mark.parametrize(
    ("package", "found", "says"),
    [
        ("onnx", "1.16.0", "onnx-fp32 needs onnx 1.21 or newer, 1.16.0 is installed"),
        ("onnxruntime-genai", "0.9.2", "onnx-fp32 needs onnxruntime-genai 0.18 or newer, 0.9.2 is installed"),
        ("onnxruntime", None, "onnx-fp32 needs onnxruntime, which is not installed"),
    ],
)
def test_a_package_that_is_missing_or_too_old_is_told_by_the_plan(
    pico_recipe: RecipeMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    found: str | None,
    says: str,
) -> None:
    def version(name: str) -> str:
        if name == package and found is None:
            raise PackageNotFoundError(name)
        return str(found) if name == package else "99.0"

    monkeypatch.setattr("qlora_export.exporters.onnx.builder.version", version)
    with pytest.raises(EnvironmentProblem, match=re.escape(says)) as error:
        make_plan(pico_recipe("bf16", "onnx-fp32"), tmp_path)
    assert error.value.hint == "pip install -U 'qlora-export[onnx]'"


def test_every_option_is_a_word_of_the_builder() -> None:
    mixed = {"sensitive_layers": "int8", "exclude": "/lm_head/MatMul"}
    stated: dict[str, Any] = {"block_size": 64, "symmetric": False, **mixed}
    assert chosen("onnx-int4", IntegerOptions, stated).words() == (
        "shared_embeddings=false",
        "is_symmetric=false",
        "block_size=64",
        "algo_config=default",
        "accuracy_level=4",
        "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8",
        "nodes_to_exclude=/lm_head/MatMul",
    )


def test_float16_and_mixed_integers_run_on_a_cpu(exported: Path, tmp_path: Path) -> None:
    """Zero points, sensitive layers in 8 bits and one left dense; float16 with the graph that was meant for CUDA."""
    exclude = "/model/layers.0/mlp/up_proj/MatMul"
    options: dict[str, Any] = {"symmetric": False, "sensitive_layers": "int8", "exclude": exclude, "accuracy_level": 1}
    with load_runtime("onnxruntime").open(exported / "onnx-fp32") as session:
        exact = session.log_probabilities(TOKENS)
    for name, settings, most in (("onnx-fp16", {}, 1e-4), ("onnx-int4", options, 0.5)):
        (tmp_path / name).mkdir()
        load_exporter(name, settings).export(exported / "bf16", tmp_path / name)
        with load_runtime("onnxruntime").open(tmp_path / name) as session:
            found = session.log_probabilities(TOKENS)
        assert 0 < (np.exp(exact) * (exact - found)).sum(axis=1).mean() < most
    operators = [node.op_type for node in onnx.load(tmp_path / "onnx-int4/model.onnx").graph.node]
    assert operators.count("MatMul") == 1
    assert "MatMulNBits" in operators


def test_a_graph_that_does_not_load_is_an_input_error(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_bytes((exported / "onnx-fp32/genai_config.json").read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    runtime = load_runtime("onnxruntime")
    with pytest.raises(InputError, match=r"model.onnx: is no ONNX graph"), runtime.open(tmp_path):
        pass


def test_a_worker_that_is_killed_is_an_environment_problem(exported: Path) -> None:
    with load_runtime("onnxruntime").open(exported / "onnx-fp32") as session:
        session.log_probabilities(TOKENS)
        worker: Any = session
        os.kill(worker.worker.process.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentProblem, match="ONNX Runtime was killed"):
            session.log_probabilities(TOKENS)


def test_nothing_in_the_current_folder_is_executed(
    pico_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downloaded folder may hold an onnx.py; the builder and the worker must not import it."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("onnx.py", "numpy.py", "json.py", "onnxruntime.py"):
        (here / name).write_text("raise SystemExit('executed from the current folder')")
    monkeypatch.chdir(here)
    _, made = make(pico_recipe("bf16", "onnx-fp32"), tmp_path / "out")
    with load_runtime("onnxruntime").open(made["onnx-fp32"].path) as session:
        assert session.log_probabilities(TOKENS).shape == (12, 2048)


def test_the_graph_does_not_depend_on_the_repository_around_it(exported: Path) -> None:
    raw = (exported / "onnx-fp32/model.onnx").read_bytes()
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True).stdout
    assert b"0.18.0" in raw
    assert not head or head.strip().encode() not in raw


def test_an_adapter_alone_is_made_anew_when_what_travels_with_it_changes(
    pico_recipe: RecipeMaker, adapter_copy: Path, tmp_path: Path
) -> None:
    recipe = pico_recipe("adapter", adapter=str(adapter_copy))
    first = make_plan(recipe, tmp_path).exports[0].digest
    (adapter_copy / "tokenizer_config.json").write_text("{}")
    second = make_plan(recipe, tmp_path).exports[0].digest
    (adapter_copy / "qlora_export.json").unlink()
    assert len({first, second, make_plan(recipe, tmp_path).exports[0].digest}) == 3


def test_an_empty_partial_folder_is_no_obstacle(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    (tmp_path / "adapter.partial").mkdir()
    make(pico_recipe("adapter"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_genai_generates_from_the_folder(exported: Path) -> None:
    """In a process of its own, as a consumer would; the native library prints and must not disturb the tests."""
    script = (
        "import sys, onnxruntime_genai as genai\n"
        f"model = genai.Model({str(exported / 'onnx-int4')!r})\n"
        "tokenizer = genai.Tokenizer(model)\n"
        "parameters = genai.GeneratorParams(model)\n"
        "parameters.set_search_options(max_length=12)\n"
        "generator = genai.Generator(model, parameters)\n"
        "generator.append_tokens(tokenizer.encode('Order 512'))\n"
        "while not generator.is_done():\n    generator.generate_next_token()\n"
        "print(len(generator.get_sequence(0)))"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert 4 < int(found.stdout.split()[-1]) <= 12
