"""Headers, indexes and values that are wrong, one at a time."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_export.publish.staged_folder import Staged
from tests.helpers.files import edit_tensors
from tests.publish.lint_stage import (
    EMBEDDING,
    LINEAR,
    again,
    found,
    raw_header,
    split,
    write_index,
    write_raw,
)


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
        (
            f"model.safetensors: tensor {LINEAR}.nested_absmax is NaN or infinite at value 1, "
            "and 1 more tensors are somewhere [non-finite]"
        )
    ]


def harmed_index(folder: Path, homes: dict[str, str], harm: str) -> str:
    first, other = sorted(set(homes.values()))
    total = 6_558_208
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
