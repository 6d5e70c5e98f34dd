from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from qlora_export.errors import InputError, Refused
from qlora_export.sources.adapter import open_adapter
from qlora_export.sources.checkpoint import open_checkpoint
from tests.helpers.files import edit_json
from tests.helpers.pico import save_base


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_base(tmp_path / "sharded", seed=1, shard="100KB")


def test_shards_open_as_the_single_file_does(pico_base: Path, sharded: Path) -> None:
    one, many = open_checkpoint(pico_base), open_checkpoint(sharded)
    assert len(many.files) > 2
    assert one.headers_sha256 == many.headers_sha256
    assert set(one.tensors) == set(many.tensors)


def test_another_dtype_is_another_base(pico_base: Path, tmp_path: Path) -> None:
    import torch

    other = save_base(tmp_path / "fp32", seed=1, dtype=torch.float32)
    assert open_checkpoint(other).headers_sha256 != open_checkpoint(pico_base).headers_sha256


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = open_checkpoint(sharded).files[1]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        open_checkpoint(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = open_checkpoint(sharded).files[0]
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(InputError, match=shard.name) as caught:
        open_checkpoint(sharded)
    assert "incomplete" in caught.value.hint


@pytest.mark.parametrize("target", ["../../etc/x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", ".."])
def test_a_weight_map_may_not_lead_out(sharded: Path, target: str) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = target
    path.write_text(json.dumps(index))
    with pytest.raises(Refused, match="weight_map|points to") as caught:
        open_checkpoint(sharded)
    assert target in caught.value.message


def test_a_link_out_of_the_folder_is_refused(base_copy: Path, tmp_path: Path) -> None:
    weights = base_copy / "model.safetensors"
    outside = tmp_path / "outside.safetensors"
    shutil.move(weights, outside)
    weights.symlink_to(outside)
    with pytest.raises(Refused, match="leads out of the folder"):
        open_checkpoint(base_copy)


def test_links_of_a_hub_cache_are_followed(pico_base: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in pico_base.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    assert open_checkpoint(snapshot).headers_sha256 == open_checkpoint(pico_base).headers_sha256


def test_links_of_a_hub_cache_are_followed_in_its_folders(pico_adapter: Path, tmp_path: Path) -> None:
    """Those of a folder within a snapshot; a link to blobs of another cache is one out of the folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    (snapshot / "adapter").mkdir(parents=True)
    for path in pico_adapter.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / "adapter" / path.name).symlink_to(Path("../../../blobs") / f"blob-{path.name}")
    assert open_adapter(snapshot / "adapter").sha256 == open_adapter(pico_adapter).sha256
    other = Path(shutil.copytree(snapshot, tmp_path / "other/snapshots/0123", symlinks=True))
    (other / "adapter/adapter_config.json").unlink()
    (other / "adapter/adapter_config.json").symlink_to(blobs / "blob-adapter_config.json")
    with pytest.raises(Refused, match="leads out of the folder"):
        open_adapter(other / "adapter")


def test_pickles_alone_are_refused_and_never_opened(base_copy: Path) -> None:
    (base_copy / "model.safetensors").unlink()
    (base_copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(Refused, match="pytorch_model.bin"):
        open_checkpoint(base_copy)


def test_a_folder_without_weights_says_so(base_copy: Path) -> None:
    (base_copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no model.safetensors"):
        open_checkpoint(base_copy)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    files = list(weight_map.values())
    first = next(file for file in files if files.count(file) > 1)
    second = next(file for file in files if file != first)
    name = next(name for name, file in weight_map.items() if file == first)
    edit_json(path, weight_map={**weight_map, name: second})
    with pytest.raises(InputError, match=f"tensor {name} is not in {second}"):
        open_checkpoint(sharded)
    edit_json(path, weight_map={key: file for key, file in weight_map.items() if key != name})
    with pytest.raises(InputError, match="is not listed"):
        open_checkpoint(sharded)


def test_one_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = open_checkpoint(sharded).files[:2]
    shutil.copy(first, second)
    with pytest.raises(InputError, match=f"is in both {first.name} and {second.name}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_broken_config_is_named(base_copy: Path, content: str) -> None:
    (base_copy / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json"):
        open_checkpoint(base_copy)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder") as caught:
        open_checkpoint(tmp_path / "meta-llama" / "Llama-3.2-1B")
    assert "hf download" in caught.value.hint
