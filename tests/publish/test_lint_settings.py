"""config.json, manifests, adapters and companions that do not fit the weights, one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_export.publish.staged_folder import Staged
from tests.helpers.files import edit_json, edit_tensors
from tests.publish.lint_stage import (
    EMBEDDING,
    LINEAR,
    again,
    edit_manifest,
    found,
)


def quantised(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize(
    ("artifact", "changes", "says"),
    [
        ("bf16", {"dtype": "float16"}, "says float16, most dense values are bfloat16 [config]"),
        ("nf4", {"dtype": "float16"}, f"says float16, the 4-bit weight {LINEAR} is of bfloat16 [config]"),
        ("bf16", {"vocab_size": 2047}, f"says vocab_size 2047, {EMBEDDING} has 2048 rows [vocabulary]"),
        ("bf16", {"text_config": {"vocab_size": 9}}, f"says vocab_size 9, {EMBEDDING} has 2048 rows [vocabulary]"),
        (
            "bf16",
            {"tie_word_embeddings": False},
            "output head has a weight of its own, and none is stored [tied-weights]",
        ),
        ("bf16", {"auto_map": {"AutoModel": "m.Model"}}, "names code to load (auto_map) [code]"),
        ("bf16", {"quantization_config": 4}, "quantization_config is 4, expected a table [config]"),
        (
            "bf16",
            {"quantization_config": {"quant_method": "gptq"}},
            "(gptq), and every weight is stored dense [config]",
        ),
        (
            "nf4",
            {"quantization_config": None},
            f"has no quantization_config, and {LINEAR} is stored quantised [config]",
        ),
        (
            "int8",
            {"quantization_config": None},
            f"has no quantization_config, and {LINEAR} is stored quantised [config]",
        ),
        (
            "w4a16",
            {"quantization_config": None},
            f"has no quantization_config, and {LINEAR}_packed is stored quantised [config]",
        ),
        ("nf4", {"quantization_config": {"quant_method": "gptq"}}, "says gptq, the quantised weights are nf4 [config]"),
    ],
)
def test_a_config_that_does_not_describe_its_tensors(
    stage: Callable[..., Staged], artifact: str, changes: dict[str, Any], says: str
) -> None:
    staged = stage(root=artifact)
    edit_json(staged.folder / "config.json", **changes)
    (message,) = found(again(staged))
    assert message.startswith("config.json: ")
    # The first 4-bit weight in the file stands for all.
    assert says.replace(LINEAR, "") in message.replace("model.layers.0.mlp.down_proj.weight", "").replace(LINEAR, "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "says fp4, the quantised weights are nf4"),
        ({"load_in_8bit": True}, "says int8, the quantised weights are nf4"),
        ({"quant_method": "fp8"}, "says fp8, the quantised weights are nf4"),
        ({"bnb_4bit_use_double_quant": False}, "says bnb_4bit_use_double_quant False, the absmax of"),
        ({"llm_int8_skip_modules": [LINEAR.removesuffix(".weight")]}, "and it is stored quantised"),
    ],
)
def test_a_quantisation_of_another_kind(stage: Callable[..., Staged], changes: dict[str, Any], says: str) -> None:
    staged = stage(root="nf4")
    edit_json(staged.folder / "config.json", quantization_config={**quantised(staged.folder), **changes})
    (message,) = found(again(staged))
    assert says in message


def test_codes_without_their_scales(stage: Callable[..., Staged]) -> None:
    staged = stage(root="nf4")
    edit_tensors(staged.folder / "model.safetensors", lambda tensors: tensors.__delitem__(f"{LINEAR}.absmax"))
    (message,) = found(again(staged))
    assert message.endswith("[config]")
    assert f"{LINEAR}.absmax is missing" in message


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding(stage: Callable[..., Staged], same: bool) -> None:
    staged = stage(root="bf16")

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        tensors["lm_head.weight"][-1, -1] += 0 if same else 1

    edit_tensors(staged.folder / "model.safetensors", untie)
    says = "config.json: ties the output head to the embedding, "
    says += f"the bytes of lm_head.weight and {EMBEDDING} differ [tied-weights]"
    assert found(again(staged)) == ([] if same else [says])
    edit_json(staged.folder / "config.json", tie_word_embeddings=False)
    assert found(again(staged)) == []


def test_a_head_of_other_rows(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    edit_json(staged.folder / "config.json", tie_word_embeddings=False)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.ones(2050, 256, dtype=torch.bfloat16)

    edit_tensors(staged.folder / "model.safetensors", add)
    assert found(again(staged)) == ["config.json: says vocab_size 2048, lm_head.weight has 2050 rows [vocabulary]"]


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff"])
def test_a_config_that_is_no_json_object(stage: Callable[..., Staged], raw: bytes) -> None:
    staged = stage(root="bf16")
    (staged.folder / "config.json").write_bytes(raw)
    (message,) = found(again(staged))
    assert message.startswith("config.json: ")
    assert message.endswith("[config]")


@pytest.mark.parametrize("commit", [False, True])
@pytest.mark.parametrize("lost", ["headers_sha256", "files", "digest"])
def test_a_base_that_is_known_by_its_name_alone(stage: Callable[..., Staged], lost: str, commit: bool) -> None:
    def change(manifest: dict[str, Any]) -> None:
        base = manifest["sources"]["base"]
        base["id"] = "acme/bot@" + "0a" * 20 if commit else "acme/bot@main"
        if lost == "digest":
            base["files"]["model.safetensors"]["sha256"] = "123"
        else:
            del base[lost]

    says = "manifest.json: the base acme/bot@main is known by no digest of its files and by no commit [unpinned-base]"
    assert found(edit_manifest(stage(root="bf16"), change)) == ([] if commit else [says])


def test_an_adapter_without_a_digest(stage: Callable[..., Staged]) -> None:
    def change(manifest: dict[str, Any]) -> None:
        del manifest["sources"]["adapter"]["sha256"]

    assert found(edit_manifest(stage(root="bf16"), change)) == [
        "manifest.json: the adapter adapter has no sha256 [unpinned-base]"
    ]


def test_factors_that_were_not_merged(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")

    def leave(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 256, dtype=torch.bfloat16)
        tensors["model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(256, 4, dtype=torch.bfloat16)

    edit_tensors(staged.folder / "model.safetensors", leave)
    assert found(again(staged)) == [
        (
            "model.safetensors: model.layers.0.self_attn.q_proj.lora_A.weight and 1 more "
            "belong to an adapter that was not merged [adapter-left]"
        )
    ]


def test_an_adapter_beside_merged_weights(stage: Callable[..., Staged], release: Path) -> None:
    staged = stage(root="bf16")
    shutil.copytree(release / "nf4-adapter/adapter", staged.folder / "adapter")
    messages = found(again(staged))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (f"adapter/{name}: belongs to an adapter, and no artifact keeps one here [adapter-left]") in messages


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_kept_adapter_that_is_not_there(stage: Callable[..., Staged], name: str) -> None:
    staged = stage(root="nf4-adapter")
    (staged.folder / "adapter" / name).unlink()
    assert found(again(staged)) == [f"adapter/{name}: is missing, the artifact keeps its adapter here [adapter-left]"]


@pytest.mark.parametrize(
    ("artifact", "place", "base", "clean"),
    [
        ("nf4-adapter", "adapter", "..", True),
        ("nf4-adapter", "adapter", "acme/bot", False),
        ("nf4-lowrank", "adapter", "..", True),
        ("nf4-lowrank", "adapter", "acme/bot", False),
        ("adapter", "", "acme/bot", True),
        ("adapter", "", "/home/jane/models/bot", False),
        ("adapter", "", "C:\\models\\bot", False),
        ("adapter", "", "~/bot", False),
    ],
)
def test_what_an_adapter_calls_its_base(
    stage: Callable[..., Staged], artifact: str, place: str, base: str, clean: bool
) -> None:
    staged = stage(root=artifact)
    edit_json(staged.folder / place / "adapter_config.json", base_model_name_or_path=base)
    messages = found(again(staged))
    assert [message.rpartition(" ")[2] for message in messages] == ([] if clean else ["[base-path]"])


@pytest.mark.parametrize(
    ("artifact", "name", "says"),
    [
        ("bf16", "config.json", "config.json: is missing, nothing can load the weights [companion]"),
        ("nf4", "tokenizer.json", "tokenizer.json: is missing, and no other vocabulary is there [companion]"),
        ("onnx-int4", "genai_config.json", "genai_config.json: is missing, nothing can load the weights [companion]"),
        ("onnx-int4", "tokenizer.json", "tokenizer.json: is missing, and no other vocabulary is there [companion]"),
    ],
)
def test_a_companion_that_is_missing(stage: Callable[..., Staged], artifact: str, name: str, says: str) -> None:
    staged = stage(root=artifact)
    (staged.folder / name).unlink()
    assert says in found(again(staged))


def test_a_generic_tokenizer_needs_its_own_file(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "tokenizer.json").rename(staged.folder / "tokenizer.model")
    assert (
        "tokenizer_config.json: tokenizer_class TokenizersBackend reads tokenizer.json, which is missing [companion]"
    ) in found(again(staged))


def test_graph_settings_name_what_is_there(stage: Callable[..., Staged]) -> None:
    staged = stage(root="onnx-int4")
    path = staged.folder / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["decoder"]["filename"] = "other.onnx"
    settings["model"]["decoder"]["session_options"]["custom_ops_library"] = "evil.so"
    path.write_text(json.dumps(settings))
    assert found(again(staged)) == [
        "genai_config.json: names a library of operators to load [code]",
        "genai_config.json: names 'other.onnx', which does not lie beside it [companion]",
    ]


@pytest.mark.parametrize(
    ("artifact", "changes", "says"),
    [
        ("int8", {"load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}, "says nf4, the quantised weights are int8"),
        ("w4a16", {"format": "int-quantized"}, "has no weight of I8 beside it [config]"),
        ("w8a8", {"format": "float-quantized"}, "has no weight of F8_E4M3 beside it [config]"),
        ("fp8", {"format": "pack-quantized"}, "has no weight_packed of I32 beside it [config]"),
        (
            "fp8",
            {"ignore": ["model.layers.0.mlp.up_proj"]},
            "ignores model.layers.0.mlp.up_proj in quantisation, and it is stored quantised [config]",
        ),
        ("mxfp4a16", {"format": "pack-quantized"}, "has no weight_packed of I32 beside it [config]"),
        ("w4a16", {"format": "nvfp4-pack-quantized"}, "has no weight_packed of U8 beside it [config]"),
        ("gptq", {"group_size": 64}, "says gptq in groups of 64, model.layers.0.mlp.down_proj has qweight ["),
        ("gptq", {"quant_method": "awq"}, "says awq in groups of 128, model.layers.0.mlp.down_proj has qweight ["),
        ("gptq", {"group_size": "all"}, "says group_size 'all', expected a number of columns [config]"),
        ("fp8", {"quant_method": "gptq", "group_size": 128}, "says gptq, and no tensor is a qweight [config]"),
        (
            "gptq",
            {"dynamic": {r"-:^model\.layers\.0\.mlp\.up_proj$": {}}},
            "skips model.layers.0.mlp.up_proj in quantisation, and it is stored quantised [config]",
        ),
        (
            "awq",
            {"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]},
            "skips model.layers.0.mlp.up_proj in quantisation, and it is stored quantised [config]",
        ),
    ],
)
def test_a_table_of_8_bits_or_of_compressed_tensors_that_does_not_fit(
    stage: Callable[..., Staged], artifact: str, changes: dict[str, Any], says: str
) -> None:
    staged = stage(root=artifact)
    assert found(staged) == []
    edit_json(staged.folder / "config.json", quantization_config={**quantised(staged.folder), **changes})
    (problem,) = found(again(staged))
    assert says in problem
