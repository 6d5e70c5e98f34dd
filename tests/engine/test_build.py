from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_export.engine import BuildOptions, build
from qlora_export.errors import EnvironmentProblem, InputError, PlanRefused, Refused, UsageError, VerifyMismatch
from qlora_export.planning.make import make_plan
from qlora_export.recipe.config import Recipe
from qlora_export.training import record
from tests.helpers.files import edit_json, edit_tensors, folder_bytes
from tests.helpers.pico import RecipeMaker, load_qlora, save_adapter, save_base
from tests.helpers.values import half_step

ALL = ("bf16", "fp32", "fp16", "nf4", "nf4-adapter", {"format": "bf16", "name": "original", "onto": "original"})


def run(recipe: Recipe, out: Path, **options: Any) -> None:
    build(make_plan(recipe, out), out, BuildOptions(**options))


def without_leftovers(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


@pytest.fixture(scope="module")
def of_one_worker(pico_recipe: RecipeMaker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All formats, made by one thread from blocks of the usual size."""
    out = tmp_path_factory.mktemp("one")
    run(pico_recipe(*ALL), out, workers=1)
    return folder_bytes(out)


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_do_not_depend_on_the_workers(
    pico_recipe: RecipeMaker, of_one_worker: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    run(pico_recipe(*ALL), tmp_path, workers=workers)
    assert folder_bytes(tmp_path) == of_one_worker


def test_bytes_do_not_depend_on_the_size_of_the_blocks(
    pico_recipe: RecipeMaker, of_one_worker: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_export.merge.base_rows.BLOCK_WEIGHTS", 1)
    run(pico_recipe(*ALL), tmp_path)
    assert folder_bytes(tmp_path) == of_one_worker


def test_sharded_in_and_sharded_out(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", seed=1, shard="100KB")
    run(pico_recipe("bf16"), tmp_path / "one")
    run(pico_recipe("bf16", base=str(base), shard_bytes=150_000), tmp_path / "many")
    index = json.loads((tmp_path / "many/bf16/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    merged: dict[str, torch.Tensor] = {}
    for file in files:
        merged |= load_file(tmp_path / "many/bf16" / file)
    expected = load_file(tmp_path / "one/bf16/model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many/bf16")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_as_trained_equals_the_merge_of_peft_within_one_rounding(tmp_path: Path, storage: torch.dtype) -> None:
    """Oracle: peft's delta on the weight that bitsandbytes de-quantises, for a base of every stored dtype."""
    base = save_base(tmp_path / "base", seed=3, dtype=storage)
    adapter = save_adapter(base, tmp_path / "adapter", seed=4, rank_pattern={"q_proj": 7}, alpha_pattern={"up_proj": 3})
    recipe = Recipe.model_validate(
        {"base": str(base), "adapter": str(adapter), "artifacts": [{"format": "fp32"}, {"format": "bf16"}]}
    )
    run(recipe, tmp_path / "out")
    exact, rounded = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("fp32", "bf16"))
    model = peft.PeftModel.from_pretrained(load_qlora(base), adapter)
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer = module.base_layer
            absmax = layer.weight.quant_state
            weight = _decode(layer.weight.data, absmax).bfloat16().float()
            expected = weight + module.get_delta_weight("default").float()
            key = f"{name.removeprefix('base_model.model.')}.weight"
            assert torch.allclose(exact[key], expected, rtol=1e-6, atol=1e-7)
            assert ((rounded[key].float() - expected).abs() <= half_step(expected)).all()
            assert torch.equal(rounded[key], exact[key].bfloat16())
            seen += 1
    assert seen == 14
    for name, tensor in load_file(base / "model.safetensors").items():
        if "proj" not in name:
            assert torch.equal(rounded[name], tensor.bfloat16()), name


def _decode(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """De-quantise without bitsandbytes' CPU kernel, which errs where a row ends inside a block."""
    from bitsandbytes.functional import dequantize_blockwise

    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[: state.shape.numel()]
    values = state.code[codes.long()] * absmax.repeat_interleave(state.blocksize)[: state.shape.numel()]
    return values.reshape(state.shape)


def test_onto_the_original_adds_to_the_stored_weight(
    pico_recipe: RecipeMaker, pico_base: Path, pico_adapter: Path, tmp_path: Path
) -> None:
    run(pico_recipe("fp32", merge={"onto": "original"}), tmp_path / "out")
    found = load_file(tmp_path / "out/fp32/model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(pico_base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, pico_adapter).merge_and_unload()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-7), name


def test_nf4_adapter_holds_the_codes_of_training(
    pico_recipe: RecipeMaker, pico_base: Path, pico_adapter: Path, tmp_path: Path
) -> None:
    run(pico_recipe("nf4-adapter"), tmp_path / "out")
    folder = tmp_path / "out/nf4-adapter"
    found = load_file(folder / "model.safetensors")
    live = load_qlora(pico_base).state_dict()
    for name, tensor in live.items():
        if "quant_state" not in name:
            assert torch.equal(found[name], tensor), name
    assert (
        load_file(folder / "adapter/adapter_model.safetensors").keys()
        == load_file(pico_adapter / "adapter_model.safetensors").keys()
    )
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == (
        pico_adapter / "adapter_model.safetensors"
    ).read_bytes()
    before = json.loads((pico_adapter / "adapter_config.json").read_text())
    after = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert after == {**before, "base_model_name_or_path": ".."}


@pytest.mark.parametrize("name", ["nf4", "nf4-adapter"])
def test_quantised_folders_load_as_users_load_them(pico_recipe: RecipeMaker, tmp_path: Path, name: str) -> None:
    run(pico_recipe(name), tmp_path / "out")
    folder = tmp_path / "out" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.is_loaded_in_4bit
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.lm_head).__name__ == "Linear"
    if name == "nf4-adapter":
        wrapped = peft.PeftModel.from_pretrained(model, folder / "adapter")
        assert len(wrapped.active_adapters) == 1
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.load_adapter(str(folder / "adapter"))
        assert model.active_adapters() == ["default"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # its repacking asserts that rows are a multiple of 32
    ids = tokenizer("Order 512", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_kept_modules_stay_dense_in_bytes_and_config(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    run(pico_recipe({"format": "nf4", "keep": ["*.layers.0.*", "*.down_proj"]}), tmp_path / "out")
    folder = tmp_path / "out/nf4"
    names = load_file(folder / "model.safetensors").keys()
    assert "model.layers.0.mlp.up_proj.weight.absmax" not in names
    assert "model.layers.1.mlp.up_proj.weight.absmax" in names
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds["model.layers.0.mlp.up_proj"] == kinds["model.layers.1.mlp.down_proj"] == "Linear"
    assert kinds["model.layers.1.mlp.up_proj"] == "Linear4bit"


def test_carried_files_and_config(
    pico_recipe: RecipeMaker, pico_base: Path, adapter_copy: Path, tmp_path: Path
) -> None:
    (adapter_copy / "chat_template.jinja").write_text("{{ bos_token }}own template")
    recipe = pico_recipe("bf16", "nf4", adapter=str(adapter_copy))
    plan = make_plan(recipe, tmp_path / "out")
    assert any("chat_template.jinja" in assumption for assumption in plan.assumptions)
    build(plan, tmp_path / "out", BuildOptions())
    folder = tmp_path / "out/nf4"
    assert (folder / "chat_template.jinja").read_text() == "{{ bos_token }}own template"
    assert (folder / "tokenizer.json").read_bytes() == (pico_base / "tokenizer.json").read_bytes()
    config, original = (json.loads((place / "config.json").read_text()) for place in (folder, pico_base))
    quantization = config.pop("quantization_config")
    assert config == original
    assert quantization["quant_method"] == "bitsandbytes"
    assert "quantization_config" not in json.loads((tmp_path / "out/bf16/config.json").read_text())
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_manifest_lists_every_file(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    run(pico_recipe("nf4-adapter"), tmp_path / "out")
    folder = tmp_path / "out/nf4-adapter"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"manifest.json", *manifest["files"]} == set(folder_bytes(folder))
    assert str(tmp_path) not in (folder / "manifest.json").read_text()
    assert len(manifest["sources"]["base"]["files"]["model.safetensors"]["sha256"]) == 64


def test_finished_artifacts_are_verified_and_kept(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(pico_recipe("bf16"), out)
    before = (out / "bf16/model.safetensors").stat()
    artifacts = build(make_plan(pico_recipe("bf16", "nf4"), out), out, BuildOptions())
    assert [artifact.reused for artifact in artifacts] == [True, False]
    assert (out / "bf16/model.safetensors").stat().st_ino == before.st_ino
    assert without_leftovers(out) == {"bf16", "nf4"}


def test_a_changed_finished_artifact_is_named(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    run(pico_recipe("bf16"), tmp_path)
    path = tmp_path / "bf16/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(VerifyMismatch, match="model.safetensors"):
        run(pico_recipe("bf16"), tmp_path)
    path.unlink()
    with pytest.raises(VerifyMismatch, match="missing"):
        run(pico_recipe("bf16"), tmp_path)


def test_other_weights_in_the_same_shapes_are_noticed(
    pico_recipe: RecipeMaker, base_copy: Path, adapter_copy: Path, tmp_path: Path
) -> None:
    (adapter_copy / "qlora_export.json").unlink()
    recipe = pico_recipe("bf16", base=str(base_copy), adapter=str(adapter_copy))
    run(recipe, tmp_path / "out")
    edit_tensors(base_copy / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(InputError, match="made from another model.safetensors"):
        run(recipe, tmp_path / "out")


def test_folders_that_are_not_this_plans_are_left_alone(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16/thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="no artifact of ours"):
        run(pico_recipe("bf16"), tmp_path)
    assert folder_bytes(tmp_path) == {"bf16/thesis.txt": b"precious"}
    shutil.rmtree(tmp_path / "bf16")
    run(pico_recipe("bf16"), tmp_path)
    with pytest.raises(UsageError, match="another plan"):
        run(pico_recipe("bf16", merge={"onto": "original"}), tmp_path)


def test_a_partial_folder_of_another_plan_is_left_alone(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    (tmp_path / "bf16.partial").mkdir()
    (tmp_path / "bf16.partial/.journal").write_text('{"plan": "other"}\n')
    with pytest.raises(UsageError, match="left behind by a run of another plan"):
        run(pico_recipe("bf16"), tmp_path)
    assert not (tmp_path / "bf16").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_nan_in_the_base_is_named_and_nothing_is_final(
    pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path, name: str, bad: float
) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = bad

    edit_tensors(base_copy / "model.safetensors", poison)
    with pytest.raises(InputError, match=f"tensor {name} is {bad}"):
        run(pico_recipe("bf16", "nf4-adapter", base=str(base_copy)), tmp_path / "out")
    assert not {"bf16", "nf4-adapter"} & without_leftovers(tmp_path / "out")


def test_a_base_with_other_weights_than_in_training_is_refused(
    pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path
) -> None:
    edit_tensors(
        base_copy / "model.safetensors", lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][0].neg_()
    )
    with pytest.raises(InputError, match="layers.0.mlp.up_proj.weight: the NF4 codes of this base"):
        run(pico_recipe("bf16", base=str(base_copy)), tmp_path / "out")
    assert not (tmp_path / "out/bf16").exists()


def test_an_overflow_of_fp16_is_named(pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path) -> None:
    edit_tensors(base_copy / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(70000))
    with pytest.raises(InputError, match="tensor model.norm.weight holds 70144, float16 ends at 65504"):
        run(pico_recipe("fp16", base=str(base_copy)), tmp_path / "out")


def test_sources_are_never_touched(
    pico_recipe: RecipeMaker, base_copy: Path, adapter_copy: Path, tmp_path: Path
) -> None:
    before = folder_bytes(base_copy), folder_bytes(adapter_copy)
    for folder in (base_copy, adapter_copy):
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
    run(pico_recipe(*ALL, base=str(base_copy), adapter=str(adapter_copy)), tmp_path / "out")
    assert (folder_bytes(base_copy), folder_bytes(adapter_copy)) == before


def test_two_runs_in_one_folder(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another run is at work here"):
        run(pico_recipe("bf16"), tmp_path)
    os.close(descriptor)
    run(pico_recipe("bf16"), tmp_path)


def test_a_full_disk_leaves_nothing_final(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    """A real limit on the size of files stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(EnvironmentProblem, match="no space for"):
            run(pico_recipe("bf16"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "bf16").exists()
    run(pico_recipe("bf16"), tmp_path)
    assert (tmp_path / "bf16/manifest.json").exists()


def test_a_build_imports_neither_torch_nor_transformers(pico_base: Path, pico_adapter: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom qlora_export.cli.main import _run\n"
        f"sys.argv = ['x', 'build', '--base', '{pico_base}', '--adapter', '{pico_adapter}', '--format', 'nf4', "
        f"'--out', '{tmp_path}']\n"
        "assert _run() == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_a_stale_quantization_config_goes(pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path) -> None:
    edit_json(base_copy / "config.json", _name_or_path="/home/me/model", quantization_config=None)
    run(pico_recipe("bf16", base=str(base_copy)), tmp_path / "out")
    config = json.loads((tmp_path / "out/bf16/config.json").read_text())
    assert "_name_or_path" not in config
    assert "quantization_config" not in config


@pytest.mark.parametrize("artifact", ["nf4-adapter", {"format": "bf16", "onto": "original"}])
def test_the_sidecar_is_checked_whatever_is_built(
    pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path, artifact: Any
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(base_copy / "model.safetensors", lambda tensors: tensors[name].mul_(2))
    with pytest.raises(InputError, match=f"{name}: the NF4 absmax state of this base"):
        run(pico_recipe(artifact, base=str(base_copy)), tmp_path / "out")


def test_a_nan_in_a_kept_adapter_is_named(pico_recipe: RecipeMaker, adapter_copy: Path, tmp_path: Path) -> None:
    edit_tensors(adapter_copy / "adapter_model.safetensors", lambda t: next(iter(t.values())).fill_(float("nan")))
    with pytest.raises(PlanRefused, match="NaN or infinite"):
        run(pico_recipe("nf4-adapter", adapter=str(adapter_copy)), tmp_path / "out")


@pytest.mark.parametrize(("form", "storage"), [("bf16", torch.float32), ("fp32", torch.float16)])
def test_what_rounding_makes_infinite_is_named(tmp_path: Path, form: str, storage: torch.dtype) -> None:
    """A float32 base holds what neither bf16 nor the fp16 that training loaded it in can hold."""
    base = save_base(tmp_path / "base", seed=8, dtype=torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", seed=9)
    record(load_qlora(base, storage), adapter)
    value = 3.4e38 if storage == torch.float32 else 70000.0
    edit_tensors(base / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(value))
    recipe = Recipe.model_validate({"base": str(base), "adapter": str(adapter), "artifacts": [{"format": form}]})
    with pytest.raises(InputError, match=r"tensor model.norm.weight (holds 3.4e\+38|is inf)"):
        run(recipe, tmp_path / "out")


@pytest.mark.parametrize("harm", ["unlisted", "stray", "link"])
def test_a_finished_folder_is_verified_against_the_plan(pico_recipe: RecipeMaker, tmp_path: Path, harm: str) -> None:
    run(pico_recipe("bf16"), tmp_path)
    folder = tmp_path / "bf16"
    if harm == "unlisted":
        (folder / "config.json").unlink()
        files = json.loads((folder / "manifest.json").read_text())["files"]
        edit_json(folder / "manifest.json", files={k: v for k, v in files.items() if k != "config.json"})
    elif harm == "stray":
        (folder / "adapter_config.json").write_text("{}")
    else:
        (folder / "config.json").rename(tmp_path / "elsewhere")
        (folder / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerifyMismatch, match="config.json"):
        run(pico_recipe("bf16"), tmp_path)


def test_a_carried_file_may_not_lead_out(pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path) -> None:
    (base_copy / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(Refused, match="LICENSE: leads out of the folder"):
        run(pico_recipe("bf16", base=str(base_copy)), tmp_path / "out")
