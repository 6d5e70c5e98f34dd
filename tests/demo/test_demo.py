"""The embedded release, as a user runs it and as others open what it made."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_export.engine.calibration.contamination import require_apart
from qlora_export.engine.calibration.text import calibration_tokens, read_calibration
from qlora_export.errors import Refused
from qlora_export.recipe.calibration import CalibrationRecipe
from qlora_export.runtimes.loading import decoded_weight
from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.sources.text import read_entries
from qlora_export.sources.text_entries import Entry
from tests import sampling
from tests.helpers.files import folder_bytes
from tests.helpers.pico import DEMO, load_qlora
from tests.helpers.values import half_step
from tests.processes import Finished, forked, fresh

MEGABYTE = 1_000_000
# The embedded release, calibrated and measured on some of its text: enough for every verdict.
SHORTER = """
import sys
from qlora_export.recipe import load as recipe
from qlora_export.cli.main import run

load = recipe.load_recipe


def shorter(*given):
    found = load(*given)
    drift = found.drift.model_copy(update={"tokens": 1000})
    calibration = found.calibration.model_copy(update={"sequences": 16})
    return found.model_copy(update={"drift": drift, "calibration": calibration})


recipe.load_recipe = shorter
sys.argv[0] = "qlora-export"
run()
"""


def command(*words: Any) -> Finished:
    """The command as a user starts it where all cases are run, else a shorter one."""
    return fresh("-m", "qlora_export", *words) if sampling.all_cases() else forked("-c", SHORTER, *words)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo run."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    found = command("demo", "--out", folder)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "fail, as expected" in found.stdout
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / "report.json").read_text())
    return data


def test_the_demo_shows_the_point(report: dict[str, Any]) -> None:
    drift = {artifact["name"]: artifact["drift"] for artifact in report["artifacts"]}
    verdicts = {artifact["name"]: artifact["verdict"] for artifact in report["artifacts"]}
    assert verdicts == {
        "bf16": "pass", "int8": "pass", "nf4-nearest": "fail", "nf4-dithered": "pass", "nf4-calibrated": "pass",
        "nf4-adapter": "pass", "w4a16-calibrated": "pass", "onnx-int4": "pass",
    }  # fmt: skip
    shipped = [name for name in verdicts if name != "nf4-nearest"]
    assert [item["artifact"] for item in report["published"]] == shipped, "in the order of the recipe"
    assert report["reference"]["training_quantization"] == "sidecar"
    assert drift["nf4-nearest"]["survival_min"] < 0.6
    assert drift["nf4-nearest"]["gain_kept"] < 0.9
    assert drift["nf4-dithered"]["survival_min"] > 0.9
    assert drift["nf4-dithered"]["mean_kl"] < drift["nf4-nearest"]["mean_kl"] / 10
    assert drift["nf4-calibrated"]["mean_kl"] < drift["nf4-dithered"]["mean_kl"] / 10
    assert drift["nf4-calibrated"]["gain_kept"] > 0.99
    assert drift["w4a16-calibrated"]["mean_kl"] < 0.01
    assert drift["int8"]["mean_kl"] < 2e-3
    assert drift["nf4-adapter"]["mean_kl"] == 0
    assert drift["nf4-adapter"]["ln_ppl_ratio"] == 0
    assert drift["bf16"]["mean_kl"] < 1e-4
    assert drift["bf16"]["survival_min"] > 0.99


def test_our_bf16_is_the_merge_of_torch_and_bitsandbytes(report: dict[str, Any]) -> None:
    """The merged row is computed by peft on bitsandbytes' weights, the artifact by our engine."""
    (bf16,) = [artifact["drift"] for artifact in report["artifacts"] if artifact["name"] == "bf16"]
    merged = report["reference"]["merged"]
    assert bf16["mean_kl"] == pytest.approx(merged["mean_kl"], rel=0.02)
    assert bf16["ln_ppl_ratio"] == pytest.approx(merged["ln_ppl_ratio"], abs=2e-6)


def test_our_bf16_is_pefts_merge_onto_the_dequantised_base(out: Path) -> None:
    """Within one bf16 rounding, on every tensor."""
    live = load_qlora(DEMO / "base")
    dense = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    for name, module in live.named_modules():
        if type(module).__name__ == "Linear4bit":
            dense.get_submodule(name).weight.data = decoded_weight(module, [torch.bfloat16])
    merged = peft.PeftModel.from_pretrained(dense, DEMO / "adapter").merge_and_unload().state_dict()
    found = load_file(out / "bf16/model.safetensors")
    assert set(merged) - set(found) == {"lm_head.weight"}, "the head is tied"
    for name, tensor in found.items():
        assert ((tensor.float() - merged[name]).abs() <= half_step(merged[name])).all(), name


def test_its_rehearsal_keeps_what_was_built_and_publishes_it_to_a_hub(out: Path) -> None:
    before = folder_bytes(out)
    found = command("rehearse", "--out", out, "--json")
    assert found.returncode == 0, found.stderr
    data = json.loads(found.stdout)
    assert all(artifact["reused"] for artifact in data["artifacts"])
    assert [item["destination"] for item in data["published"]] == [
        "rehearsal/bf16", "rehearsal/int8", "rehearsal/nf4-dithered", "rehearsal/nf4-calibrated",
        "rehearsal/nf4-adapter", "rehearsal/w4a16-calibrated", "rehearsal/onnx-int4",
    ]  # fmt: skip
    for item in data["published"]:
        assert item["proof"]["nll"] == pytest.approx(item["proof"]["nll_released"], abs=1e-6)
    after = folder_bytes(out)
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    changed = {name for name, raw in before.items() if after[name] != raw}
    assert new == {".publication"}
    assert changed == {"report.json", "report.md", "report.html"}


def test_the_registry_is_opened_from_another_process(out: Path) -> None:
    registry = out / "registry"
    bf16, nf4, onnx = (str(registry / name / "latest") for name in ("bf16", "nf4-adapter", "onnx-int4"))
    load = "import transformers, peft\nmodel = transformers.AutoModelForCausalLM.from_pretrained"
    scripts = (
        f"{load}({bf16!r})",
        f"{load}({nf4!r})\npeft.PeftModel.from_pretrained(model, {nf4 + '/adapter'!r})",
        f"import onnxruntime\nonnxruntime.InferenceSession({onnx + '/model.onnx'!r})",
    )
    for script in scripts:
        found = forked("-c", script)
        assert found.returncode == 0, found.stderr
    assert not (registry / "nf4-nearest").exists()


def answer(model: Any, tokenizer: Any) -> str:
    line = (DEMO / "holdout.jsonl").read_text().splitlines()[3]
    prompt = json.loads(line)["messages"][:1]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=20, do_sample=False)
    decoded: str = tokenizer.decode(found[0, ids.shape[1] :])
    return decoded


def test_every_folder_loads_plainly_and_answers(out: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "nf4-nearest")
    answers = {}
    for name in ("bf16", "nf4-nearest", "nf4-dithered", "nf4-adapter"):
        model = transformers.AutoModelForCausalLM.from_pretrained(out / name)
        if name == "nf4-adapter":
            model = peft.PeftModel.from_pretrained(model, out / name / "adapter")
        answers[name] = answer(model, tokenizer)
    assert answers["bf16"].startswith("Case ")
    assert answers["nf4-adapter"] == answers["bf16"]


def test_transformers_loads_the_kept_adapter_by_itself(out: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "nf4-adapter")
    model.load_adapter(str(out / "nf4-adapter" / "adapter"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "nf4-adapter")
    assert answer(model, tokenizer).startswith("Case ")


def test_the_embedded_model_is_small_and_recorded() -> None:
    assert sum(len(raw) for raw in folder_bytes(DEMO).values()) < 9 * MEGABYTE
    record = json.loads((DEMO / "training_record.json").read_text())
    assert 0.04 < record["adapter"]["relative_delta_median"] < 0.12
    assert len(record["adapter"]["relative_delta"]) == 28
    assert record["adapter"]["held_out_nll_tuned"] < record["adapter"]["held_out_nll_base"] / 4
    sizes = [tensor.numel() for tensor in load_file(DEMO / "base/model.safetensors").values()]
    assert 3e6 < sum(sizes) < 4e6


@pytest.mark.parametrize(
    ("name", "seed"), [("holdout", "held_out_dialogues"), ("calibration", "calibration_dialogues")]
)
def test_the_texts_come_from_the_generator(name: str, seed: str) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("demo_dialogues", Path("tools/demo_dialogues.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_dialogues"] = module
    spec.loader.exec_module(module)
    lines = (DEMO / f"{name}.jsonl").read_text().splitlines()
    record = json.loads((DEMO / "training_record.json").read_text())
    expected = module.dialogues(record["seeds"][seed], len(lines))
    assert [json.loads(line)["messages"] for line in lines] == expected
    trained = {json.dumps(talk) for talk in module.dialogues(record["seeds"]["train_dialogues"], 6000)}
    assert not trained & {json.dumps(talk) for talk in expected}


def test_the_demo_calibrates_on_other_dialogues_than_it_measures_on() -> None:
    recipe = CalibrationRecipe(text="calibration.jsonl")
    texts, holdout = read_calibration(recipe, DEMO), read_entries("holdout.jsonl", DEMO)
    require_apart(texts, holdout, "holdout.jsonl")
    found = calibration_tokens(recipe, texts, FolderTokenizer(DEMO / "base"))
    assert (found.sequences, found.notes) == (128, ())
    # Two of its chats within, one under another system prompt: the check that passed above can fail.
    ninth = holdout[9].content
    assert not isinstance(ninth, str)
    system = Entry(({"role": "system", "content": "Be brief."}, *ninth), "line 130")
    mixed = replace(texts[0], entries=(*texts[0].entries, holdout[4], system))
    with pytest.raises(Refused, match=r"2 of 130 chats of calibration\.jsonl stand in holdout\.jsonl too.*line 5"):
        require_apart([mixed], holdout, "holdout.jsonl")
