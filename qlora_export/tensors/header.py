"""Safetensors headers, read and checked without touching a weight.

On disk: 8 bytes little-endian header length, a JSON object `{name: {dtype, shape, data_offsets}}` with an optional
`__metadata__`, then the data; offsets count from the first data byte, and the tensors must tile the data without
holes or overlaps. Source: the safetensors format document. Cost: one small read per file.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.errors import InputError
from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.types import TensorSpec

LARGEST_NUMBER = 1 << 63
HEADER_LIMIT_BYTES = 100_000_000
TRUNCATED_HINT = "the file is incomplete or damaged; fetch or save it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where it lies: file and first byte."""

    spec: TensorSpec
    path: Path
    offset: int

    @property
    def bytes(self) -> int:
        """Number of bytes on disk."""
        return self.spec.size * ITEM_BYTES[self.spec.dtype]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file in order of their offsets; raises InputError naming file, tensor and number."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise InputError(f"{path}: {file_bytes} bytes cannot hold a safetensors header", TRUNCATED_HINT)
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > HEADER_LIMIT_BYTES or 8 + header_bytes > file_bytes:
            raise InputError(
                f"{path}: the header claims {header_bytes} bytes, the file has {file_bytes}", TRUNCATED_HINT
            )
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is no valid JSON ({error})", TRUNCATED_HINT) from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is no JSON object", TRUNCATED_HINT)
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    spans = [_tensor(path, name, entry, start) for name, entry in header.items()]
    spans.sort(key=lambda span: (span[1], span[2]))
    _check_tiling(path, spans, file_bytes - start)
    return {info.spec.name: info for info, _, _ in spans}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _tensor(path: Path, name: str, entry: Any, start: int) -> tuple[StoredTensor, int, int]:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: tensor {name} has no dtype, shape and data_offsets", TRUNCATED_HINT) from None
    if not name.isprintable():
        raise InputError(f"{path}: the tensor name {name!r} cannot be printed", TRUNCATED_HINT)
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InputError(f"{path}: tensor {name} has the unknown dtype {dtype}", "save it in a standard dtype")
    numbers = (*shape, first, last)
    if not all(type(number) is int and 0 <= number < LARGEST_NUMBER for number in numbers):
        raise InputError(
            f"{path}: tensor {name} has a shape or offset that is no whole number of 64 bits", TRUNCATED_HINT
        )
    info = StoredTensor(TensorSpec(name, dtype, shape), path, start + first)
    if last - first != info.bytes:
        raise InputError(
            f"{path}: tensor {name} of shape {list(shape)} and dtype {dtype} needs {info.bytes} bytes, "
            f"its offsets span {last - first}",
            TRUNCATED_HINT,
        )
    return info, first, last


def _check_tiling(path: Path, spans: list[tuple[StoredTensor, int, int]], data_bytes: int) -> None:
    position = 0
    for info, first, last in spans:
        if first != position:
            raise InputError(
                f"{path}: tensor {info.spec.name} starts at byte {first} of the data, expected {position}",
                TRUNCATED_HINT,
            )
        position = last
    if position != data_bytes:
        raise InputError(f"{path}: the tensors span {position} bytes, the file holds {data_bytes}", TRUNCATED_HINT)
