"""The release of the embedded demo lints clean; each way to break it is found by its own rule."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.contracts import Artifact
from qlora_export.engine import BuildOptions, build, export
from qlora_export.engine.manifest import MANIFEST_NAME, file_facts, manifest_bytes, read_artifact
from qlora_export.errors import ExitCode
from qlora_export.planning import make_plan
from qlora_export.publish.lint import RULES, lint
from qlora_export.publish.staged import Staged
from qlora_export.recipe import make_recipe
from tests.conftest import DEMO, edit_json, edit_tensors

FORMATS = ("bf16", "nf4", "nf4-adapter", "adapter", "onnx-int4")
EMBEDDING = "model.embed_tokens.weight"
LINEAR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's artifacts, every format, unmeasured."""
    out = tmp_path_factory.mktemp("release")
    data = {"base": str(DEMO / "base"), "adapter": str(DEMO / "adapter"), "artifacts": [*FORMATS]}
    plan = make_plan(make_recipe(data, Path(), "test"), out)
    made = {artifact.name: artifact for artifact in build(plan, out, BuildOptions())}
    for item in plan.exports:
        made[item.name] = export(plan, item, made.get(item.source_name), out)
    return out


@pytest.fixture
def stage(release: Path, tmp_path: Path) -> Callable[..., Staged]:
    """Stage artifacts by prefix, with files of the publisher beside them."""

    def make(**artifacts: str) -> Staged:
        folder = tmp_path / "staged"
        for prefix, name in artifacts.items():
            shutil.copytree(release / name, folder / prefix.replace("root", ""), dirs_exist_ok=True)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nUse a token: hf_xxxxxxxxxxxxxxxxxxxxxxxx\n")
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        (folder / "qlora-export").mkdir()
        (folder / "qlora-export/report.json").write_text("{}\n")
        return listed(folder, *("" if prefix == "root" else f"{prefix}/" for prefix in artifacts))

    return make


def listed(folder: Path, *prefixes: str) -> Staged:
    """Everything in the folder on the list, and what changed in the manifests too."""
    artifacts: dict[str, Artifact] = {}
    for prefix in prefixes:
        artifact = read_artifact(folder / prefix)
        names = [name for name in artifact.manifest["files"] if (folder / prefix / name).is_file()]
        manifest = {**artifact.manifest, "files": {name: file_facts(folder / prefix / name) for name in names}}
        (folder / prefix / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
        artifacts[prefix] = read_artifact(folder / prefix)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return Staged(folder, {path.relative_to(folder).as_posix(): file_facts(path) for path in paths}, artifacts)


def again(staged: Staged) -> Staged:
    """The same after its files were changed."""
    return listed(staged.folder, *staged.artifacts)


def found(staged: Staged, stated: str | None = "apache-2.0", base: str | None = None) -> list[str]:
    """The messages of a lint, each with a hint, exit 4 and a known rule."""
    problems = lint(staged, stated, base)
    for problem in problems:
        assert problem.exit_code == ExitCode.REFUSED
        assert problem.hint
        assert problem.message.rpartition("[")[2].rstrip("]") in RULES
        assert str(staged.folder) not in problem.message
    return [problem.message for problem in problems]


def raw_header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + size])
    return header


def write_raw(path: Path, header: dict[str, Any], data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def split(folder: Path, count: int = 2) -> dict[str, str]:
    """model.safetensors as shards with an index; where each tensor went."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    homes = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        homes |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_index(folder, homes, total)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    del manifest["files"]["model.safetensors"]
    manifest["files"] |= {name: {} for name in {*homes.values(), "model.safetensors.index.json"}}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return homes


def write_index(folder: Path, homes: dict[str, str], total: int) -> None:
    table = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


@pytest.mark.parametrize("name", FORMATS)
def test_every_artifact_of_the_demo_is_clean(stage: Callable[..., Staged], name: str) -> None:
    assert found(stage(root=name)) == []


def test_artifacts_side_by_side_are_clean(stage: Callable[..., Staged]) -> None:
    assert found(stage(root="bf16", **{"onnx-int4": "onnx-int4", "kept": "nf4-adapter", "lora": "adapter"})) == []


def test_shards_are_clean(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    split(staged.folder, 3)
    assert found(again(staged)) == []


def test_all_findings_come_at_once(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "model.safetensors").write_bytes(b"short")
    (staged.folder / "tokenizer.json").unlink()
    (staged.folder / "evil.py").write_text("")
    rules = {message.rpartition("[")[2] for message in found(again(staged), None)}
    assert rules == {"header]", "companion]", "code]", "foreign-file]", "licence]"}


# Foreign files.


@pytest.mark.parametrize(
    "name", ["notes.txt", "qlora-export/.env", ".env", "optimizer.pt", ".tmpAbCd12", "README.md.tmp"]
)
def test_a_file_that_is_not_on_the_list(stage: Callable[..., Staged], name: str) -> None:
    staged = stage(root="bf16")
    (staged.folder / name).write_text("x")
    assert f"{name}: is not on the list of what is published [foreign-file]" in found(staged)


def test_a_listed_file_that_no_manifest_names(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "notes.txt").write_text("x")
    assert found(again(staged)) == ["notes.txt: is in no manifest, and none of ours [foreign-file]"]


def test_a_listed_file_that_is_missing(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "generation_config.json").unlink()
    assert found(staged) == ["generation_config.json: is listed and missing [foreign-file]"]


def test_a_listed_file_of_another_size(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "chat_template.jinja").write_text("{{ 1 }}")
    assert "chat_template.jinja: has 7 bytes, 163 are listed [foreign-file]" in found(staged)


def test_a_file_of_the_manifest_that_is_left_out(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "chat_template.jinja").unlink()
    rest = {name: facts for name, facts in staged.files.items() if name != "chat_template.jinja"}
    assert found(replace(staged, files=rest)) == [
        "chat_template.jinja: is in its manifest, and not published [foreign-file]"
    ]


def test_facts_that_are_not_those_of_the_manifest(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    files = {**staged.files, "config.json": {**staged.files["config.json"], "sha256": "0" * 64}}
    assert found(replace(staged, files=files)) == [
        "config.json: has other facts on the list than in its manifest [foreign-file]"
    ]


def test_a_manifest_that_is_not_the_verified_one(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / MANIFEST_NAME).write_bytes((staged.folder / MANIFEST_NAME).read_bytes() + b" ")
    files = {**staged.files, MANIFEST_NAME: file_facts(staged.folder / MANIFEST_NAME)}
    assert found(replace(staged, files=files)) == [
        "manifest.json: is not the manifest of the artifact that was verified [foreign-file]"
    ]


def test_links_pipes_and_sockets_are_no_files(stage: Callable[..., Staged], tmp_path: Path) -> None:
    staged = stage(root="bf16")
    for name in ("config.json", "tokenizer.json", "generation_config.json", "qlora-export/report.json"):
        (staged.folder / name).unlink()
    (tmp_path / "outside").write_text("{}")
    (staged.folder / "config.json").symlink_to(tmp_path / "outside")
    (staged.folder / "generation_config.json").symlink_to(staged.folder / "chat_template.jinja")
    os.mkfifo(staged.folder / "tokenizer.json")
    before = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(staged.folder / "qlora-export")
        try:
            server.bind("report.json")
        finally:
            os.chdir(before)
        messages = found(staged)
    for name, what in (("config", "a link"), ("generation_config", "a link"), ("tokenizer", "a pipe")):
        assert f"{name}.json: is {what}, expected a regular file [hostile-path]" in messages
    assert "qlora-export/report.json: is a socket, expected a regular file [hostile-path]" in messages


def test_a_pickle_by_another_name(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    torch.save({"a": 1}, staged.folder / "generation_config.json")
    assert "generation_config.json: begins as a pickle or an archive does [pickle]" in found(again(staged))


# Weights.


def test_a_header_that_leaves_a_hole(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    entry = {"dtype": "BF16", "shape": [2]}
    header = {"a": {**entry, "data_offsets": [0, 4]}, "b": {**entry, "data_offsets": [6, 10]}}
    write_raw(staged.folder / "model.safetensors", header, bytes(10))
    assert found(again(staged)) == [
        "model.safetensors: tensor b starts at byte 6 of the data, expected 4 [header]",
    ]


def test_a_header_that_is_too_long(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    path = staged.folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)
    assert found(again(staged)) == [
        "model.safetensors: the header claims 100000001 bytes, the file has 100000100 [header]"
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EMBEDDING, "model.norm.weight"])
def test_a_value_that_is_not_finite(stage: Callable[..., Staged], name: str, bad: float) -> None:
    staged = stage(root="bf16")

    def harm(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-3] = bad

    edit_tensors(staged.folder / "model.safetensors", harm)
    place = torch.Size((2048, 256)).numel() - 3 if name == EMBEDDING else 253
    assert found(again(staged)) == [
        f"model.safetensors: tensor {name} is NaN or infinite at value {place} [non-finite]"
    ]


def test_a_scale_that_is_not_finite(stage: Callable[..., Staged]) -> None:
    staged = stage(root="nf4")

    def harm(tensors: dict[str, torch.Tensor]) -> None:
        for number in (0, 1):
            tensors[f"model.layers.{number}.mlp.up_proj.weight.nested_absmax"][1] = float("nan")

    edit_tensors(staged.folder / "model.safetensors", harm)
    assert found(again(staged)) == [
        f"model.safetensors: tensor {LINEAR}.nested_absmax is NaN or infinite at value 1, "
        "and 1 more tensors are somewhere [non-finite]"
    ]


def harmed_index(folder: Path, homes: dict[str, str], harm: str) -> str:
    first, other = sorted(set(homes.values()))
    total = 6_555_136
    changed = dict(homes)
    if harm == "no such tensor":
        changed["ghost"] = first
        says = "names tensor ghost, which is in no shard"
    elif harm == "not named":
        del changed[EMBEDDING]
        says = f"does not name tensor {EMBEDDING} of {homes[EMBEDDING]}"
    elif harm == "other shard":
        changed[EMBEDDING] = other if homes[EMBEDDING] == first else first
        says = f"says that tensor {EMBEDDING} is in {changed[EMBEDDING]}, it is in {homes[EMBEDDING]}"
    elif harm == "total":
        total += 1
        says = f"says total_size {total}, the tensors have {total - 1} bytes"
    else:
        changed[EMBEDDING] = "../../outside.safetensors"
        says = f"tensor {EMBEDDING} points to '../../outside.safetensors'"
    write_index(folder, changed, total)
    return f"model.safetensors.index.json: {says} [index]"


@pytest.mark.parametrize("harm", ["no such tensor", "not named", "other shard", "total", "outside"])
def test_an_index_that_is_not_that_of_the_shards(stage: Callable[..., Staged], harm: str) -> None:
    staged = stage(root="bf16")
    says = harmed_index(staged.folder, split(staged.folder), harm)
    assert found(again(staged)) == [says]


def test_shards_without_an_index(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    split(staged.folder)
    (staged.folder / "model.safetensors.index.json").unlink()
    assert found(again(staged)) == [
        "model-00001-of-00002.safetensors: is one of several shards that no index names [index]"
    ]


def test_a_shard_that_is_missing(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    homes = split(staged.folder)
    (staged.folder / "model-00002-of-00002.safetensors").unlink()
    messages = found(again(staged))
    assert sum("which is in no shard" in message for message in messages) == sum(
        "2-of" in home for home in homes.values()
    )
    assert (
        "model-00001-of-00002.safetensors: is one of 2 shards by its name, there are numbers [1] [index]"
    ) in messages


def test_a_tensor_in_two_shards(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    homes = split(staged.folder)
    other = next(home for home in homes.values() if home != homes["model.norm.weight"])

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(256, dtype=torch.bfloat16)

    edit_tensors(staged.folder / other, double)
    assert any("tensor model.norm.weight is in model-0000" in message for message in found(again(staged)))


def test_a_stale_index_beside_a_whole_file(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    whole = (staged.folder / "model.safetensors").read_bytes()
    split(staged.folder)
    for path in staged.folder.glob("model-*.safetensors"):
        path.unlink()
    (staged.folder / "model.safetensors").write_bytes(whole)
    assert ("model.safetensors.index.json: is not the only way to the weights: loaders do not agree [index]") in found(
        again(staged)
    )


def test_weights_that_no_loader_looks_for(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    shutil.copy(staged.folder / "model.safetensors", staged.folder / "consolidated.safetensors")
    assert "consolidated.safetensors: no loader looks for weights by this name [index]" in found(again(staged))


# What config.json says.


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
    edit_tensors(staged.folder / "model.safetensors", lambda tensors: tensors.pop(f"{LINEAR}.absmax") and None)
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


# Origin, adapters, companions.


def edit_manifest(staged: Staged, change: Callable[[dict[str, Any]], None]) -> Staged:
    path = staged.folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_bytes(manifest_bytes(manifest))
    return again(staged)


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
        "model.safetensors: model.layers.0.self_attn.q_proj.lora_A.weight and 1 more "
        "belong to an adapter that was not merged [adapter-left]"
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


# Licence and secrets.


def test_a_licence_there_must_be(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    assert found(staged, None) == ["README.md: no licence is stated, and there is no LICENSE file [licence]"]
    (staged.folder / "LICENSE").write_text("All rights reserved.")
    assert found(again(staged), None) == []


def test_a_licence_that_promises_too_much(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    assert found(staged, "apache-2.0", "llama3.1") == [
        "README.md: the licence apache-2.0 is not known to be as strict as the base's, llama3.1 [licence]"
    ]
    assert found(staged, "llama3.1", "llama3.1") == []


def test_a_token_in_a_template(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    token = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz"
    (staged.folder / "chat_template.jinja").write_text("{# first #}\n{{ call('" + token + "') }}")
    (message,) = found(again(staged))
    assert message == "chat_template.jinja: line 2 holds what looks like a token of the Hub [secret]"


def test_a_token_in_the_metadata_of_a_weight_file(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    path = staged.folder / "model.safetensors"
    header = raw_header(path)
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    data = path.read_bytes()[8 + size :]
    header["__metadata__"] = {"trained_with": "ghp_" + "a1B2c3D4e5F6" * 3}
    write_raw(path, header, data)
    assert found(again(staged)) == ["model.safetensors: line 1 holds what looks like a GitHub token [secret]"]


def test_memory_does_not_grow_with_a_tensor(stage: Callable[..., Staged], tmp_path: Path) -> None:
    """400 MB of zeros, of which the disk holds none."""
    import tracemalloc

    staged = stage(root="bf16")
    path = staged.folder / "model.safetensors"
    header = raw_header(path)
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    data = path.read_bytes()[8 + size :]
    values = 100_000_000
    header["buffer"] = {"dtype": "F32", "shape": [values], "data_offsets": [end, end + 4 * values]}
    write_raw(path, header, data)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 4 * values)
        file.seek(-4, 2)
        file.write(np.float32(np.nan).tobytes())
    facts = {"bytes": path.stat().st_size, "sha256": "0" * 64}
    staged = replace(staged, files={**staged.files, "model.safetensors": facts})
    tracemalloc.start()
    messages = found(staged)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"model.safetensors: tensor buffer is NaN or infinite at value {values - 1} [non-finite]" in messages
    assert peak < 40_000_000
