"""`check ARTIFACT --against MODEL`: folders that no recipe made, each measured as its consumers open it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_export.drift.reference_store import kept_references
from qlora_export.errors import ExitCode, InputError, UsageError
from qlora_export.pipeline import check_folder
from qlora_export.pipeline.check_folder import CheckRequest, check_against
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import build
from qlora_export.report.data import exit_code, report
from qlora_export.report.run import Checked
from qlora_export.runtimes.tokenizer import FolderTokenizer
from tests.helpers.files import edit_json, edit_tensors, folder_bytes
from tests.helpers.gguf_files import write_gguf

FREE = ["drift.limits={perplexity_ratio: 1.001, mean_kl: 0.0001, same_top1: null, gain_kept: null}"]
Check = Callable[..., Checked]


@pytest.fixture
def check(pico_text: Path, tmp_path: Path) -> Check:
    """Check a folder against a model on the pico text."""

    def run(artifact: Path, against: Path | str, settings: list[str] | None = None, **facts: Any) -> Checked:
        question = CheckRequest(str(artifact), str(against), **facts)
        drift = {"text": str(pico_text)}
        return check_against(question, drift, FREE if settings is None else settings, RunOptions(tmp_path / "out"))

    return run


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, pico_base: Path, pico_adapter: Path) -> Path:
    """The run folder of a bf16, an fp32 and an int8 artifact."""
    from qlora_export.recipe.load import make_recipe

    formats = ("bf16", "fp32", "int8")
    data = {"base": str(pico_base), "adapter": str(pico_adapter), "artifacts": list(formats)}
    out = tmp_path_factory.mktemp("merged")
    build(make_recipe(data, Path(), "test"), RunOptions(out))
    return out


def drift_of(run: Checked) -> Any:
    assert run.ledger is not None
    return run.ledger.entries[0].drift


def test_a_model_against_itself_has_exactly_no_drift(check: Check, merged: Path, tmp_path: Path) -> None:
    run = check(merged / "bf16", merged / "bf16")
    drift = drift_of(run)
    assert (drift.mean_kl, drift.ln_ppl_ratio, drift.same_top1) == (0, 0, 1)
    assert drift.gain_kept is None
    assert exit_code(run) == ExitCode.OK
    facts = report(run)
    assert facts["recipe_digest"] is None
    assert facts["reference"]["model"] == "the model itself"


def test_resharding_changes_nothing(check: Check, merged: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(merged / "bf16", dtype="auto")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    drift = drift_of(check(tmp_path / "shards", merged / "bf16"))
    assert (drift.mean_kl, drift.ln_ppl_ratio) == (0, 0)


def test_against_a_base_with_its_adapter(check: Check, merged: Path, pico_base: Path, pico_adapter: Path) -> None:
    run = check(merged / "bf16", f"{pico_base}+{pico_adapter}")
    assert run.ledger is not None
    assert run.ledger.base is not None
    assert run.ledger.merged is not None
    assert 0 < drift_of(run).mean_kl < 1e-4
    assert drift_of(run).mean_kl == pytest.approx(run.ledger.merged.mean_kl, rel=0.5)
    found = report(run)
    assert found["reference"]["model"] == "4-bit base with live adapter"
    (step,) = found["artifacts"][0]["steps"]
    assert step["artifact"] == "merged"
    assert step["mean_kl"] == pytest.approx(drift_of(run).mean_kl - run.ledger.merged.mean_kl)
    assert step["ln_ppl_ratio"] == pytest.approx(drift_of(run).ln_ppl_ratio - run.ledger.merged.ln_ppl_ratio)


def test_an_adapter_on_its_base(check: Check, pico_base: Path, pico_adapter: Path, tmp_path: Path) -> None:
    run = check(pico_adapter, f"{pico_base}+{pico_adapter}")
    assert drift_of(run).mean_kl == 0
    assert any("ships no tokenizer" in text for text in report(run)["assumptions"])
    alone = Path(shutil.copytree(pico_adapter, tmp_path / "adapter"))
    edit_json(alone / "adapter_config.json", base_model_name_or_path=str(pico_base))
    assert drift_of(check(alone, pico_base)).mean_kl > 1e-3
    edit_json(alone / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UsageError, match="which is not there") as caught:
        check(alone, pico_base)
    assert "--base" in caught.value.hint
    assert drift_of(check(alone, pico_base, base=str(pico_base))).mean_kl > 1e-3


def test_a_reference_is_run_once_for_several_artifacts(
    check: Check, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = check(merged / "int8", merged / "fp32")
    assert len(kept_references(tmp_path / "out")) == 1
    monkeypatch.setattr("qlora_export.pipeline.reference_model.measure_model", None)
    second = check(merged / "bf16", merged / "fp32")
    assert first.ledger is not None
    assert second.ledger is not None
    assert first.ledger.reference == second.ledger.reference
    assert first.ledger.noise == second.ledger.noise
    monkeypatch.undo()
    check(merged / "int8", merged / "bf16")
    assert len(kept_references(tmp_path / "out")) == 2


def test_sources_are_left_as_they_are(check: Check, merged: Path) -> None:
    before = folder_bytes(merged)
    check(merged / "int8", merged / "bf16")
    assert folder_bytes(merged) == before


def test_a_worse_folder_fails(check: Check, merged: Path, tmp_path: Path) -> None:
    worse = Path(shutil.copytree(merged / "bf16", tmp_path / "worse"))
    (worse / "manifest.json").unlink()
    edit_tensors(worse / "model.safetensors", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))
    run = check(worse, merged / "bf16")
    assert exit_code(run) == ExitCode.GATE_FAILED
    found = report(run)["artifacts"][0]
    assert found["manifest_sha256"] is None
    assert found["format"] == "bfloat16"
    assert found["worst"]["tokens"][0]["kl"] > 0


def test_another_tokenizer_is_refused(check: Check, merged: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(merged / "bf16", tmp_path / "other"))
    path = other / "chat_template.jinja"
    template = path.read_text()
    path.write_text(template.replace("{{ bos_token }}", ""))
    assert path.read_text() != template
    with pytest.raises(InputError, match="the template renders line 1 otherwise"):
        check(other, merged / "bf16")


def test_logits_that_are_no_numbers(check: Check, merged: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(merged / "bf16", tmp_path / "broken"))
    edit_tensors(broken / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    run = check(broken, merged / "bf16")
    assert exit_code(run) == ExitCode.GATE_FAILED
    assert "NaN or infinity" in report(run)["artifacts"][0]["reasons"][0]
    json.dumps(report(run), allow_nan=False)
    with pytest.raises(InputError, match="the reference gives NaN or infinity in window 1 of"):
        check(merged / "bf16", broken)


@pytest.mark.parametrize(
    ("artifact", "error", "says"),
    [
        ("nothing", InputError, "no such folder"),
        ("empty", InputError, "neither config.json, nor genai_config.json, nor adapter_config.json"),
        ("torn", InputError, "not valid JSON"),
        ("list", InputError, "no JSON object"),
        ("model.gguf", InputError, "transformers cannot load it"),
        ("ggufs", InputError, "a folder of 2 GGUF files"),
        ("foreign", InputError, "foreign/manifest.json: no manifest of ours"),
    ],
)
def test_folders_that_are_none(
    check: Check, merged: Path, tmp_path: Path, artifact: str, error: type[Exception], says: str
) -> None:
    for name, text in (("torn", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "ggufs").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "ggufs" / name).write_bytes(b"GGUF")
    with pytest.raises(error, match=says):
        check(tmp_path / artifact, merged / "bf16")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_size": "wide"}, "Validation error for field 'hidden_size': TypeError: "),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"dtype": "float1"}, "has no attribute 'float1'"),
        ({"vocab_size": 3}, "of the text has no row in an embedding of 3"),
    ],
)
def test_a_damaged_config_is_no_bug_of_ours(
    check: Check, merged: Path, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    broken = Path(shutil.copytree(merged / "bf16", tmp_path / "broken"))
    edit_json(broken / "config.json", **config)
    with pytest.raises(InputError, match="broken: ") as caught:
        check(broken, merged / "bf16")
    assert says in caught.value.message


def test_torn_weights_are_named(check: Check, merged: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(merged / "bf16", tmp_path / "broken"))
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(InputError, match="broken: transformers cannot load it: Error while deserializing header"):
        check(broken, merged / "bf16")


def test_no_weight_is_made_up(check: Check, merged: Path, tmp_path: Path) -> None:
    lacking = Path(shutil.copytree(merged / "bf16", tmp_path / "lacking"))
    path = lacking / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    for artifact, against in ((lacking, merged / "bf16"), (merged / "bf16", lacking)):
        with pytest.raises(InputError, match=r"lacking: has no model\.norm\.weight, 1 weights are missing"):
            check(artifact, against)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 1 + messages[0].content }}", "{{ messages[0].nothing.at }}"])
def test_a_template_that_fails_is_no_bug_of_ours(template: str, merged: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(merged / "bf16", tmp_path / "broken"))
    (broken / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="the chat template refuses a chat"):
        FolderTokenizer(broken).render([{"role": "user", "content": "x"}], answering=True)


def test_other_tokens_that_end_a_text_ask_the_reference_anew(check: Check, merged: Path, tmp_path: Path) -> None:
    reference = Path(shutil.copytree(merged / "bf16", tmp_path / "reference"))
    check(merged / "bf16", reference)
    edit_json(reference / "generation_config.json", eos_token_id=[1, 5])
    check(merged / "bf16", reference)
    assert len(kept_references(tmp_path / "out")) == 2


def test_other_vocabularies_do_not_compare(check: Check, merged: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(merged / "bf16", dtype="auto")
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(tmp_path / "larger")
    with pytest.raises(InputError, match="tokens in the vocabulary, the reference has"):
        check(tmp_path / "larger", merged / "bf16")


def test_pickled_weights_are_not_opened(check: Check, merged: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(merged / "bf16", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    torch.save(tensors, other / "pytorch_model.bin")
    for name in ("model.safetensors", "manifest.json"):
        (other / name).unlink()
    with pytest.raises(InputError, match="transformers cannot load it: .*safetensors"):
        check(other, merged / "bf16")


def test_a_gguf_file_without_a_weight_is_refused(check: Check, merged: Path, tmp_path: Path) -> None:
    without = Path(shutil.copytree(merged / "fp32", tmp_path / "without"))
    write_gguf(without, tmp_path / "model.gguf", "F32", leaves_out="blk.1.ffn_up.weight")
    with pytest.raises(InputError, match=r"has no model.layers.1.mlp.up_proj.weight, 1 weights are missing"):
        check(tmp_path / "model.gguf", merged / "fp32")


@pytest.mark.parametrize(("kind", "most"), [("F32", 1e-9), ("Q8_0", 1e-2)])
def test_a_gguf_file(check: Check, merged: Path, tmp_path: Path, kind: str, most: float) -> None:
    write_gguf(merged / "fp32", tmp_path / "model.gguf", kind)
    run = check(tmp_path / "model.gguf", merged / "fp32")
    assert drift_of(run).mean_kl < most
    assert (kind == "F32") == (drift_of(run).mean_kl == 0)
    found = report(run)["artifacts"][0]
    assert (found["runtime"], found["format"], found["name"]) == ("gguf", "gguf", "model.gguf")
    assert "has its tokenizer inside" in report(run)["assumptions"][-1]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a+b", ("a", "b")),
        ("a", ("a", None)),
        ("owner/model@abc+owner/adapter", ("owner/model@abc", "owner/adapter")),
        ("b+c+adapter", ("b+c", "adapter")),
        ("b+c", ("b+c", None)),
    ],
)
def test_models_and_adapters_of_against(
    text: str, parts: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b+c").mkdir()
    assert check_folder._parts(text) == parts


@pytest.mark.parametrize("text", ["+b", "a+"])
def test_against_names_a_model(text: str) -> None:
    with pytest.raises(UsageError, match="names no model"):
        check_folder._parts(text)
