from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qlora_export.errors import EnvironmentProblem
from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.tensors.header import read_header
from qlora_export.tensors.layout import lay_out, part_bytes
from qlora_export.tensors.writing import ShardWriter
from qlora_export.types import Part, Piece
from tests import sampling

parts = st.lists(
    st.lists(st.tuples(st.sampled_from(["U8", "F32", "BF16", "I64"]), st.lists(st.integers(0, 4), max_size=2))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=sampling.examples(40))
@given(drawn=parts, shard_bytes=st.integers(1, 200))
def test_any_layout_is_a_valid_aligned_file(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[tuple[str, list[int]]]], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    tensors = [
        [Part(f"t{number}.p{index}", dtype, tuple(shape)) for index, (dtype, shape) in enumerate(group)]
        for number, group in enumerate(drawn)
    ]
    layout = lay_out(tensors, shard_bytes)
    rng = np.random.default_rng(0)
    contents = {part.name: rng.integers(0, 256, part_bytes(part), np.uint8) for group in tensors for part in group}
    with ShardWriter(folder, layout) as writer:
        for name, data in reversed(contents.items()):
            half = len(data) // 2
            writer.write(Piece(name, half, data[half:]))
            writer.write(Piece(name, 0, data[:half]))
    found = {}
    for shard in layout.shards:
        path = folder / shard.file
        assert path.stat().st_size == shard.bytes
        with safe_open(path, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = set(opened.keys())
        stored = read_header(path)
        assert names == set(stored)
        for tensor in stored.values():
            assert tensor.offset % ITEM_BYTES[tensor.spec.dtype] == 0
            raw = path.read_bytes()[tensor.offset : tensor.offset + tensor.bytes]
            assert raw == contents[tensor.spec.name].tobytes()
            found[tensor.spec.name] = shard.file
    assert set(found) == set(contents)
    for group in tensors:
        assert len({found[part.name] for part in group}) <= 1
    index = layout.index()
    assert (index is None) == (len(layout.shards) == 1)
    if index is not None:
        assert json.loads(index)["weight_map"] == found


def test_parts_beside_the_model_have_a_file_of_their_own_that_no_index_lists(tmp_path: Path) -> None:
    tensors = [
        [Part(f"t{number}", "F32", (5,)), Part(f"t{number}.a", "BF16", (3,), "beside/own.safetensors")]
        for number in range(3)
    ]
    layout = lay_out(tensors, 20)
    assert [(shard.file, shard.beside) for shard in layout.shards] == [
        *((f"model-0000{number}-of-00003.safetensors", False) for number in (1, 2, 3)),
        ("beside/own.safetensors", True),
    ]
    index = json.loads(layout.index() or b"")
    assert index["weight_map"] == {f"t{number}": f"model-0000{number + 1}-of-00003.safetensors" for number in range(3)}
    assert index["metadata"]["total_size"] == 60
    with ShardWriter(tmp_path, layout) as writer:
        for number in range(3):
            writer.write(Piece(f"t{number}.a", 0, np.full(6, number, np.uint8)))
    with safe_open(tmp_path / "beside/own.safetensors", "pt") as opened:
        assert {name: opened.get_tensor(name).view(torch.uint8).tolist() for name in opened.keys()} == {  # noqa: SIM118
            f"t{number}.a": [number] * 6 for number in range(3)
        }
    assert lay_out(tensors, 1000).index() is None


def test_a_piece_beyond_its_part_is_a_bug_not_a_write(tmp_path: Path) -> None:
    layout = lay_out([[Part("a", "U8", (4,)), Part("b", "U8", (4,))]], 100)
    with ShardWriter(tmp_path, layout) as writer, pytest.raises(ValueError, match="pass its 4 bytes"):
        writer.write(Piece("a", 2, np.zeros(3, np.uint8)))


def test_a_file_beyond_the_disk_is_an_environment_problem(tmp_path: Path) -> None:
    layout = lay_out([[Part("a", "U8", (1 << 60,))]], 1)
    with pytest.raises(EnvironmentProblem, match="no space for"):
        ShardWriter(tmp_path, layout)
