"""The same adapter under other spellings, in shards, with a resized vocabulary: what the files may look like."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_export.engine import BuildOptions, build
from qlora_export.errors import PlanRefused
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.load import make_recipe
from tests.helpers.files import edit_json, edit_tensors, folder_bytes
from tests.helpers.zoo import TOKENS, oracle, reload_logits, save_architecture, save_variant

Tensors = dict[str, torch.Tensor]


def built(base: Path, adapter: Path, out: Path, *formats: str, **changes: Any) -> Plan:
    data = {"base": str(base), "adapter": str(adapter), "merge": {"onto": "original"}, "artifacts": list(formats)}
    plan = make_plan(make_recipe({**data, **changes}, Path(), "test"), out)
    build(plan, out, BuildOptions())
    return plan


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_architecture(name, folder / name, seed=3) for name in ("llama", "qwen3", "gpt2")}


def with_adapter_name(name: str) -> str:
    return re.sub(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)", r".\1.default", name)


def with_wrappers(name: str) -> str:
    return name.replace("base_model.model.", "base_model.model._orig_mod._fsdp_wrapped_module.")


def with_saved_modules(name: str) -> str:
    return re.sub(r"(lm_head)\.", r"\1.modules_to_save.default.", name) if "lora" not in name else name


def with_magnitude_weight(name: str) -> str:
    return f"{name}.weight" if name.endswith("lora_magnitude_vector") else name


def without_prefix(name: str) -> str:
    return name.removeprefix("base_model.model.")


@pytest.mark.parametrize(
    ("variant", "spelling"),
    [
        ("lora", with_adapter_name),
        ("embedding", with_adapter_name),
        ("dora", with_adapter_name),
        ("lora", with_wrappers),
        ("modules_to_save", with_saved_modules),
        ("dora", with_magnitude_weight),
        ("lora", without_prefix),
    ],
)
def test_old_spellings_give_the_same_bytes(
    bases: dict[str, Path], tmp_path: Path, variant: str, spelling: Callable[[str], str]
) -> None:
    adapter = save_variant(bases["llama"], "llama", variant, tmp_path / "adapter", seed=4)
    built(bases["llama"], adapter, tmp_path / "new", "fp32")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {spelling(name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    built(bases["llama"], adapter, tmp_path / "old", "fp32")
    files = [(tmp_path / place / "fp32/model.safetensors").read_bytes() for place in ("new", "old")]
    assert files[0] == files[1]


def test_shards_give_the_same_bytes(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["llama"], "llama", "dora", tmp_path / "adapter", seed=4)
    built(bases["llama"], adapter, tmp_path / "one", "fp32", "nf4-adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"adapter_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, adapter / file)
        weight_map |= dict.fromkeys(part, file)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    built(bases["llama"], adapter, tmp_path / "two", "fp32", "nf4-adapter", "adapter")
    files = [(tmp_path / place / "fp32/model.safetensors").read_bytes() for place in ("one", "two")]
    assert files[0] == files[1]
    kept = {path.name for path in (tmp_path / "two/nf4-adapter/adapter").iterdir()}
    assert kept == {"adapter_config.json", "adapter_model.safetensors.index.json", *weight_map.values()}


def resize(adapter: Path, rows: int, names: tuple[str, ...]) -> Tensors:
    """Grow saved embeddings, as training on a resized vocabulary saves them."""
    grown: Tensors = {}

    def change(tensors: Tensors) -> None:
        for name in names:
            torch.manual_seed(0)
            old = tensors[f"base_model.model.{name}"]
            grown[name] = torch.cat([old, torch.randn(rows - old.shape[0], old.shape[1])])
            tensors[f"base_model.model.{name}"] = grown[name]

    edit_tensors(adapter / "adapter_model.safetensors", change)
    return grown


def test_a_resized_vocabulary_moves_into_the_model(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["llama"], "llama", "embedding_layers", tmp_path / "adapter", seed=4)
    grown = resize(adapter, 217, ("model.embed_tokens.weight", "lm_head.weight"))
    plan = built(bases["llama"], adapter, tmp_path / "out", "fp32")
    assert "the vocabulary was resized in training: 217 rows" in plan.assumptions
    tensors = load_file(tmp_path / "out/fp32/model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in grown.items())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/fp32")
    assert model.config.vocab_size == 217
    assert model(input_ids=torch.tensor([[3, 216]])).logits.shape == (1, 2, 217)


def test_a_resized_vocabulary_of_a_tied_pair(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["qwen3"], "qwen3", "embedding_layers", tmp_path / "adapter", seed=4)
    resize(adapter, 180, ("model.embed_tokens.weight", "lm_head.weight"))
    built(bases["qwen3"], adapter, tmp_path / "out", "fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/fp32")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == 180


def test_half_of_a_resized_pair_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["llama"], "llama", "embedding_layers", tmp_path / "adapter", seed=4)
    resize(adapter, 217, ("model.embed_tokens.weight",))
    with pytest.raises(PlanRefused, match=r"embed_tokens.weight has 217 rows and lm_head.weight has 211 rows"):
        built(bases["llama"], adapter, tmp_path / "out", "fp32")


def test_tokens_without_a_row_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["llama"], "llama", "lora", tmp_path / "adapter", seed=4)
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 211, "content": "<new>"}]}
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PlanRefused, match=r"token 211 has no row in model.embed_tokens.weight of 211 rows"):
        built(bases["llama"], adapter, tmp_path / "out", "fp32")


def test_an_untied_pair_says_so(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["qwen3"], "qwen3", "head", tmp_path / "adapter", seed=4)
    plan = built(bases["qwen3"], adapter, tmp_path / "out", "bf16")
    assert any("both are written, untied" in note for note in plan.assumptions)
    config = json.loads((tmp_path / "out/bf16/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "out/bf16/model.safetensors")


def test_a_classifier_is_written_as_one(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["llama"], "llama_classifier", "lora", tmp_path / "adapter", seed=4)
    plan = built(bases["llama"], adapter, tmp_path / "out", "bf16", "nf4")
    assert "lm_head.weight is left out: a classifier has no output head" in plan.assumptions
    for name in ("bf16", "nf4"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name)
        assert type(model).__name__ == "LlamaForSequenceClassification"
        assert model.config.num_labels == 3
        assert model.score.weight.dtype == torch.bfloat16
        assert model(input_ids=torch.tensor([TOKENS])).logits.isfinite().all()


def test_config_is_put_right_everywhere(bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "x.Y"}, "_name_or_path": "there", "mystery": 1, "torch_dtype": "float16"}
    config["vision_config"] = {"torch_dtype": "float32", "_name_or_path": "here", "kept": True}
    (base / "config.json").write_text(json.dumps(config))
    adapter = save_variant(base, "llama", "lora", tmp_path / "adapter", seed=4)
    plan = built(base, adapter, tmp_path / "out", "bf16")
    written = json.loads((tmp_path / "out/bf16/config.json").read_text())
    assert written["vision_config"] == {"torch_dtype": "bfloat16", "kept": True}
    assert (written["torch_dtype"], written["mystery"]) == ("bfloat16", 1)
    assert not {"auto_map", "_name_or_path"} & written.keys()
    assert any("auto_map" in note for note in plan.assumptions)


def test_tensors_that_no_model_knows_are_carried(bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    extra = {"mtp.layers.0.proj.weight": torch.randn(8, 8), "counts": torch.arange(5)}
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update(extra))
    adapter = save_variant(bases["llama"], "llama", "lora", tmp_path / "adapter", seed=4)
    plan = built(base, adapter, tmp_path / "out", "bf16", "nf4", merge={"onto": "as-trained"})
    assert any("2 tensors that the model does not have are carried along" in note for note in plan.assumptions)
    for name in ("bf16", "nf4"):
        tensors = load_file(tmp_path / "out" / name / "model.safetensors")
        assert all(torch.equal(tensors[name], tensor) for name, tensor in extra.items())


def test_conv1d_bytes_do_not_depend_on_the_format_beside(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["gpt2"], "gpt2", "dora", tmp_path / "adapter", seed=4)
    built(bases["gpt2"], adapter, tmp_path / "alone", "bf16", merge={"onto": "as-trained"})
    built(bases["gpt2"], adapter, tmp_path / "beside", "bf16", "nf4", "nf4-adapter", merge={"onto": "as-trained"})
    files = [(tmp_path / place / "bf16/model.safetensors").read_bytes() for place in ("alone", "beside")]
    assert files[0] == files[1]


def test_a_lora_that_is_block_diagonal_in_both_is_never_guessed(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["llama"], "llama", "bdlora", tmp_path / "adapter", seed=4)
    config = json.loads((adapter / "adapter_config.json").read_text())
    edit_json(adapter / "adapter_config.json", use_bdlora={**config["use_bdlora"], "nblocks": 4})
    with pytest.raises(PlanRefused, match="the base and r need"):
        built(bases["llama"], adapter, tmp_path / "out", "fp32")


def test_the_rows_of_trained_tokens_are_the_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["llama"], "llama", "trainable_tokens", tmp_path / "adapter", seed=4)
    built(bases["llama"], adapter, tmp_path / "out", "fp32")
    merged = load_file(tmp_path / "out/fp32/model.safetensors")["model.embed_tokens.weight"]
    base = load_file(bases["llama"] / "model.safetensors")["model.embed_tokens.weight"]
    rows = next(t for n, t in load_file(adapter / "adapter_model.safetensors").items() if "trainable_tokens" in n)
    changed = np.flatnonzero((merged != base).any(dim=1).numpy())
    assert changed.tolist() == [3, 5, 17]
    assert torch.equal(merged[changed], rows)


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        ({"modules_to_save": ["lm_head"]}, True),
        ({"trainable_token_indices": [3, 5]}, True),
        ({"modules_to_save": ["mlp"], "target_modules": ["q_proj", "up_proj"]}, "auto"),
        ({"modules_to_save": ["input_layernorm", "norm"]}, "auto"),
        ({"velora_config": peft.tuners.lora.config.VeloraConfig()}, "auto"),
        ({"monteclora_config": peft.tuners.lora.config.MontecloraConfig()}, "auto"),
        ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, True),
    ],
)
def test_what_peft_saves_beside_the_adapter_is_understood(
    bases: dict[str, Path], tmp_path: Path, changes: dict[str, Any], saved: Any
) -> None:
    """Originals, copies under trained tokens, samplers of training: known by name, and the live model is ours."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(model, peft.LoraConfig(**settings))
        for name, parameter in live.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05 if "lora_B" in name else 0.02)
        live.save_pretrained(tmp_path / "adapter", save_embedding_layers=saved)
        expected = live.eval()(input_ids=torch.tensor([TOKENS])).logits.numpy()
    built(bases["llama"], tmp_path / "adapter", tmp_path / "out", "fp32")
    assert np.abs(reload_logits(tmp_path / "out/fp32", "llama", TOKENS) - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [("llama", "dora"), ("qwen3", "embedding_dora"), ("qwen3", "embedding"), ("gpt2", "dora"), ("qwen3", "head")],
)
def test_bytes_depend_on_neither_workers_nor_blocks(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, variant: str
) -> None:
    adapter = save_variant(bases[architecture], architecture, variant, tmp_path / "adapter", seed=4)
    data = {"base": str(bases[architecture]), "adapter": str(adapter), "artifacts": ["bf16", "nf4", "nf4-adapter"]}
    seen = set()
    for number, (workers, block) in enumerate([(1, 1 << 17), (4, 500), (1, 1)]):
        monkeypatch.setattr("qlora_export.merge.base_rows.BLOCK_WEIGHTS", block)
        out = tmp_path / f"out{number}"
        build(make_plan(make_recipe(data, Path(), "test"), out), out, BuildOptions(workers))
        seen.add(tuple(sorted((name, hash(content)) for name, content in folder_bytes(out).items())))
    assert len(seen) == 1


def unpacked_experts(base: Path, adapter: Path, **changes: Any) -> None:
    """An adapter of a transformers that had a module for every expert."""
    torch.manual_seed(4)
    tensors = {}
    for layer, expert, (name, rows, columns) in itertools.product(
        range(2), range(4), [("w1", 88, 48), ("w2", 48, 88), ("w3", 88, 48)]
    ):
        stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4) * 0.1
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["w1", "w2", "w3"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_experts_that_were_modules_of_their_own(tmp_path: Path) -> None:
    base = save_architecture("mixtral", tmp_path / "base", seed=3)
    unpacked_experts(base, tmp_path / "adapter")
    built(base, tmp_path / "adapter", tmp_path / "out", "fp32")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        live = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        expected = live(input_ids=torch.tensor([TOKENS])).logits.numpy()
    assert np.abs(reload_logits(tmp_path / "out/fp32", "mixtral", TOKENS) - expected).max() < 1e-5


@pytest.mark.parametrize("part", [".w3.", "layers.1.block_sparse_moe.experts.2.", "layers.1."])
def test_half_of_the_experts_is_refused(tmp_path: Path, part: str) -> None:
    base = save_architecture("mixtral", tmp_path / "base", seed=3)
    unpacked_experts(base, tmp_path / "adapter")

    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    edit_tensors(tmp_path / "adapter/adapter_model.safetensors", drop)
    with pytest.raises(PlanRefused, match="targeted modules have no tensors"):
        built(base, tmp_path / "adapter", tmp_path / "out", "fp32")


def test_masks_that_are_called_bias_are_none(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["gpt2"], "gpt2", "bias_all", tmp_path / "adapter", seed=4)
    base = Path(shutil.copytree(bases["gpt2"], tmp_path / "base"))
    mask = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update(mask))
    built(base, adapter, tmp_path / "out", "fp32")
    assert torch.equal(
        load_file(tmp_path / "out/fp32/model.safetensors")["transformer.h.0.attn.bias"], torch.ones(1, 1, 8, 8)
    )


def test_a_delta_that_training_never_reached_may_be_kept(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_variant(bases["llama"], "llama", "lora", tmp_path / "adapter", seed=4)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors[name].zero_())
    with pytest.raises(PlanRefused) as caught:
        built(bases["llama"], adapter, tmp_path / "out", "fp32")
    assert name in caught.value.message
    assert "merge.zero_delta=keep" in caught.value.hint
    plan = built(bases["llama"], adapter, tmp_path / "out", "fp32", merge={"onto": "original", "zero_delta": "keep"})
    assert any(f"1 factors are all zero, the first is {name}" in note for note in plan.assumptions)


def test_a_classifier_with_other_labels(tmp_path: Path) -> None:
    base = save_architecture("llama", tmp_path / "plain", seed=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    model.save_pretrained(tmp_path / "base")
    adapter = save_variant(base, "llama_classifier", "lora", tmp_path / "adapter", seed=4)
    built(tmp_path / "base", adapter, tmp_path / "out", "fp32")
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/fp32")
    assert (found.config.num_labels, found.config.vocab_size, found.score.weight.shape[0]) == (3, 211, 3)


@pytest.mark.parametrize(
    ("stated", "says"),
    [("nf4,skip=q_porj", "skip=q_porj matches no linear layer"), ("nf4,skip=q_proj,skip=lm_head", "")],
)
def test_a_skip_that_matches_nothing_is_refused(bases: dict[str, Path], tmp_path: Path, stated: str, says: str) -> None:
    adapter = save_variant(bases["llama"], "llama", "lora", tmp_path / "adapter", seed=4)
    if not says:
        built(bases["llama"], adapter, tmp_path / "out", "fp32", training_quantization=stated)
        return
    with pytest.raises(PlanRefused, match=says):
        built(bases["llama"], adapter, tmp_path / "out", "fp32", training_quantization=stated)


@pytest.mark.parametrize("variant", ["lora", "embedding", "head", "trainable_tokens"])
def test_a_tie_that_the_bytes_contradict(bases: dict[str, Path], tmp_path: Path, variant: str) -> None:
    """transformers leaves such a pair untied; the written model is that one, and says so."""
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    edit_json(base / "config.json", tie_word_embeddings=True)
    adapter = save_variant(base, "llama", variant, tmp_path / "adapter", seed=4)
    if variant == "trainable_tokens":
        with pytest.raises(PlanRefused, match="config.json ties and the bytes do not"):
            built(base, adapter, tmp_path / "out", "fp32")
        return
    expected = oracle(base, adapter, "llama", TOKENS)
    plan = built(base, adapter, tmp_path / "out", "fp32")
    assert any("the stored ones differ" in note for note in plan.assumptions)
    assert json.loads((tmp_path / "out/fp32/config.json").read_text())["tie_word_embeddings"] is False
    assert np.abs(reload_logits(tmp_path / "out/fp32", "llama", TOKENS) - expected.logits).max() < 1e-5
