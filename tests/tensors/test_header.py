from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qlora_export.errors import InputError
from qlora_export.tensors.header import read_header
from qlora_export.tensors.reading import SourceFiles
from tests import sampling

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=sampling.examples(40))
@given(tensors=st.dictionaries(st.text("abc.é", min_size=1, max_size=6), st.tuples(shapes, st.sampled_from([*DTYPES]))))
def test_any_file_of_the_library_is_read(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    saved = {name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(d) for name, (shape, d) in tensors.items()}
    save_file(saved, path)
    found = read_header(path)
    assert set(found) == set(saved)
    with SourceFiles() as files:
        for name, tensor in saved.items():
            stored = found[name]
            assert stored.spec.shape == tuple(tensor.shape)
            assert stored.spec.dtype == DTYPES[tensor.dtype]
            raw = files.read(stored, 0, stored.spec.rows)
            assert raw.tobytes() == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(first: int, last: int, shape: Any = (4,), dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{not json", b"", "no valid JSON"),
        ([1, 2], b"", "no JSON object"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', b"", "a key occurs twice"),
        ({"a": {"dtype": "U8"}}, b"", "tensor a has no dtype, shape and data_offsets"),
        ({"a": 3}, b"", "tensor a has no dtype, shape and data_offsets"),
        ({"a": entry(0, 4, dtype="Q7")}, b"0123", "tensor a has the unknown dtype Q7"),
        ({"a": entry(0, 4, (-4,))}, b"0123", "tensor a has a shape or offset that is no whole number"),
        ({"a": entry(0, 4, (2.0, 2))}, b"0123", "tensor a has a shape or offset that is no whole number"),
        ({"a": entry(0, 3)}, b"012", "needs 4 bytes, its offsets span 3"),
        ({"a": entry(0, 4), "b": entry(5, 9)}, b"012345678", "tensor b starts at byte 5 of the data, expected 4"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"012345", "tensor b starts at byte 2 of the data, expected 4"),
        ({"a": entry(0, 4)}, b"01", "the tensors span 4 bytes, the file holds 2"),
        ({"a": entry(0, 4)}, b"012345", "the tensors span 4 bytes, the file holds 6"),
    ],
)
def test_a_broken_header_is_refused_by_name(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    path = write(tmp_path / "broken.safetensors", header, data)
    with pytest.raises(InputError, match="broken.safetensors") as caught:
        read_header(path)
    assert says in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("length", "data"), [(1 << 40, b""), (500, b"{}")])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int, data: bytes) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", data, length)
    with pytest.raises(InputError, match=f"claims {length} bytes"):
        read_header(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="0 bytes cannot hold"):
        read_header(path)


@settings(max_examples=sampling.examples(150))
@given(raw=st.binary(max_size=80))
def test_random_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    try:
        found = read_header(path)
    except InputError:
        return
    assert found == {}
