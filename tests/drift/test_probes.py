"""Questions, prompts and layers on the whole way: from the recipe to the report, and no further."""

from __future__ import annotations

import json
import resource
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from qlora_export.drift.ledger import Entry
from qlora_export.drift.trace_run import Models, traced_entries
from qlora_export.errors import InputError
from qlora_export.pipeline.check_folder import CheckRequest, check_against
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.reference_model import trained_model
from qlora_export.pipeline.release import check
from qlora_export.publish.public_report import public_recipe, public_report
from qlora_export.recipe.config import Recipe
from qlora_export.report.data import report
from qlora_export.report.markdown import markdown
from qlora_export.report.run import Run
from qlora_export.report.schemas import report_schema
from qlora_export.report.terminal import print_ledger
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.open import open_artifact
from tests.helpers.files import edit_tensors
from tests.helpers.pico import DIALOGUE, RecipeMaker

NEAREST = {"format": "nf4", "name": "nf4", "rounding": "nearest", "limits": {"mean_kl": 1e-6}}
BFLOAT = {"format": "bf16", "limits": {"mean_kl": 0.5, "same_top1": 0.1, "perplexity_ratio": 2.0, "survival_min": None}}
PROBES = {"choices": "questions.jsonl", "prompts": "prompts.jsonl", "generate_tokens": 6}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [
        {"question": f"Order {number} came", "choices": ["broken", "late", "today"], "answer": number % 3}
        for number in range(12)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [[{"role": "user", "content": f"Order {number}?"}, DIALOGUE[1]] for number in range(7)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return tmp_path


Checks = Any


@pytest.fixture
def checked(pico_recipe: RecipeMaker, pico_text: Path, texts: Path) -> Checks:
    def run(*artifacts: Any, **drift: Any) -> tuple[Run, Recipe]:
        recipe = pico_recipe(*artifacts, drift={"text": str(pico_text), "limits": {"gain_kept": None}, **drift})
        recipe = recipe.model_copy(update={"folder": texts})
        return check(recipe, RunOptions(texts / "out", workers=1)), recipe

    return run


def artifacts_of(data: dict[str, Any]) -> dict[str, Any]:
    return {item["name"]: item for item in data["artifacts"]}


def test_from_the_recipe_to_the_report(checked: Checks, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, recipe = checked(BFLOAT, NEAREST, **PROBES)
    data = report(run)
    jsonschema.validate(data, report_schema())
    found = artifacts_of(json.loads(json.dumps(data)))
    choices, generation = found["nf4"]["choices"], found["nf4"]["generation"]
    assert set(choices) == {
        "items", "accuracy_reference", "accuracy", "accuracy_stderr", "lost", "gained", "p_value", "flipped",
    }  # fmt: skip
    assert choices["items"] == 12
    assert choices["accuracy"] - choices["accuracy_reference"] == pytest.approx(
        (choices["gained"] - choices["lost"]) / 12
    )
    assert set(generation) == {"prompts", "tokens", "agreement_mean", "agreement_median", "whole", "worst"}
    assert (generation["prompts"], generation["tokens"]) == (7, 6)
    assert generation["agreement_mean"] < found["bf16"]["generation"]["agreement_mean"] <= 6
    worst = generation["worst"][0]
    assert set(worst) == {"place", "prompt", "agreed", "reference", "candidate"}
    assert worst["prompt"].endswith("<|assistant|>\n")
    assert worst["reference"] != worst["candidate"]
    assert found["bf16"]["verdict"] == "pass"
    assert "trace" not in found["bf16"], "a passing artifact is not traced"
    assert set(found["nf4"]["trace"]) == {"layers", "broken"}
    assert [layer["name"] for layer in found["nf4"]["trace"]["layers"]][2:4] == ["model.layers.0", "model.layers.1"]
    print_ledger(run)
    shown = capsys.readouterr().out
    for line in ("of 12 questions right", "of 7 prompts to their end", "nf4: no layer stands out"):
        assert line in shown
    assert "of 12 questions right" in markdown(run)
    public = json.dumps(public_report(data))
    assert '"lost"' in public
    assert '"agreement_mean"' in public
    assert "came broken" not in public
    assert worst["reference"] not in public
    assert '"flipped"' not in public
    assert '"worst"' not in public
    moved = recipe.model_copy(update={"drift": recipe.drift.model_copy(update={"choices": "mine/questions.jsonl"})})
    assert public_recipe(moved)["drift"]["choices"] == "questions.jsonl"


def test_the_references_answers_are_kept_and_a_changed_file_is_asked_anew(
    checked: Checks, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report(checked(BFLOAT, **PROBES)[0])
    kept = {path.name for path in (texts / "out/references").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr("qlora_export.pipeline.reference_model.ask_reference", None)
        assert report(checked(BFLOAT, **PROBES)[0])["artifacts"][0]["choices"] == first["artifacts"][0]["choices"]
    questions = texts / "questions.jsonl"
    questions.write_text(questions.read_text().replace("late", "soon"))
    checked(BFLOAT, **PROBES)
    assert len({path.name for path in (texts / "out/references").iterdir()} - kept) == 1
    checked(BFLOAT, **{**PROBES, "generate_tokens": 7})
    assert len({path.name for path in (texts / "out/references").iterdir()} - kept) == 2


def test_without_probes_nothing_is_said_of_them(checked: Checks) -> None:
    found = report(checked(BFLOAT)[0])["artifacts"][0]
    assert not {"choices", "generation", "trace"} & set(found)


@pytest.mark.parametrize(("when", "traced"), [("always", ["bf16", "nf4", "adapter"]), ("never", [])])
def test_layers_are_compared_when_the_recipe_says(checked: Checks, when: str, traced: list[str]) -> None:
    run, _ = checked(BFLOAT, NEAREST, {"format": "adapter"}, trace=when)
    found = artifacts_of(report(run))
    assert [name for name, item in found.items() if "trace" in item] == traced
    if traced:
        errors = {name: max(layer["error"] for layer in found[name]["trace"]["layers"]) for name in traced}
        assert errors["adapter"] == 0, "the adapter on its own base is the reference"
        assert 0 < errors["bf16"] < errors["nf4"]


def test_a_runtime_without_layers_is_left_out_with_a_note(checked: Checks, texts: Path) -> None:
    run, _ = checked(BFLOAT)
    entry = replace(run.ledger.entries[0], runtime="onnxruntime")

    def none(entry: Entry | None = None) -> AbstractContextManager[Session]:
        raise AssertionError("no model is opened")

    tokens = run.ledger.tokens
    (found,) = traced_entries([entry], tokens, "always", Models(none, none), texts, RunOptions(texts).track)
    assert found.findings.trace is not None
    assert (found.findings.trace.layers, found.findings.trace.note) == ((), "onnxruntime shows no layers")
    data = report(replace(run, ledger=replace(run.ledger, entries=(found,))))
    jsonschema.validate(data, report_schema())
    assert data["artifacts"][0]["trace"]["note"] == "onnxruntime shows no layers"


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_built(checked: Checks, texts: Path) -> None:
    with pytest.raises(InputError, match=r"prompts.jsonl: line 1: \d+ tokens and 2048 to generate, .* context is 2048"):
        checked(BFLOAT, prompts="prompts.jsonl", generate_tokens=2048)
    assert not (texts / "out/bf16").exists()


def test_a_verdict_stands_where_there_is_no_room_for_a_trace(checked: Checks, texts: Path) -> None:
    """A file may be no larger than what one layer gives."""
    run, _ = checked(BFLOAT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    models = Models(trained_model(run.plan).open, lambda entry: open_artifact(entry.artifact, run.plan))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        (found,) = traced_entries(
            run.ledger.entries, run.ledger.tokens, "always", models, texts, RunOptions(texts).track
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.verdict == run.ledger.entries[0].verdict
    assert found.findings.trace is not None
    assert found.findings.trace.note.startswith("no room for what the layers of the reference compute")


def test_a_folder_that_no_recipe_made_is_asked_the_same(
    pico_base: Path, pico_text: Path, base_copy: Path, texts: Path
) -> None:
    name = "model.layers.1.input_layernorm"
    edit_tensors(base_copy / "model.safetensors", lambda tensors: tensors[f"{name}.weight"].mul_(1.2))
    drift = {"text": str(pico_text), "choices": str(texts / "questions.jsonl"), "prompts": str(pico_text)}
    question = CheckRequest(str(base_copy), str(pico_base))
    run = check_against(question, drift, ["drift.generate_tokens=4"], RunOptions(texts / "out", workers=1))
    (found,) = report(run)["artifacts"]
    assert found["verdict"] == "fail"
    assert found["trace"]["broken"]["name"] == name
    assert found["choices"]["items"] == 12
    assert found["generation"]["prompts"] == 10
    jsonschema.validate(report(run), report_schema())
