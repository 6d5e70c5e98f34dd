"""Where every byte of the output goes, decided before the first one is written.

A tensor may be written as several parts (codes, scales, state); the parts of one tensor share a file, but for those
that name one of their own, which no index lists. Files are cut when the next tensor would pass the limit, in the order
of the source. Inside a file the parts keep that order while every one of them is aligned to its item size, so that a
file fills from its beginning and can be hashed behind the writers; where sizes are odd, wider dtypes come first. Names:
`model.safetensors`, or `model-0000k-of-0000n.safetensors` and `model.safetensors.index.json`. Sources: the safetensors
format document, transformers' sharding convention.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.types import Part

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """The home of one part: file name, absolute first byte, number of bytes."""

    file: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class ShardLayout:
    """One output file: its name, header with the length prefix and size; `beside` the model's files or one of them."""

    file: str
    header: bytes
    bytes: int
    beside: bool = False


@dataclass(frozen=True)
class Layout:
    """All weight files of an artifact and the place of every part by name."""

    shards: tuple[ShardLayout, ...]
    places: dict[str, Place]

    @property
    def total_bytes(self) -> int:
        """Size of all weight files together."""
        return sum(shard.bytes for shard in self.shards)

    def index(self) -> bytes | None:
        """Content of the model's index file, or None when one shard needs none."""
        files = {shard.file for shard in self.shards if not shard.beside}
        if len(files) < 2:
            return None
        places = {name: place for name, place in sorted(self.places.items()) if place.file in files}
        weight_map = {name: place.file for name, place in places.items()}
        total = sum(place.bytes for place in places.values())
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"


def part_bytes(part: Part) -> int:
    """Size of a part on disk."""
    return math.prod(part.shape) * ITEM_BYTES[part.dtype]


def lay_out(tensors: Iterable[Sequence[Part]], shard_bytes: int, single: str = SINGLE_NAME) -> Layout:
    """Assign the parts of all tensors, given tensor by tensor in source order, to files of about `shard_bytes`.

    `single` is the name of the only file where one is enough.
    """
    groups: list[list[Part]] = [[]]
    beside: dict[str, list[Part]] = {}
    filled = 0
    for parts in tensors:
        own = [part for part in parts if not part.file]
        for part in parts:
            if part.file:
                beside.setdefault(part.file, []).append(part)
        size = sum(part_bytes(part) for part in own)
        if filled and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].extend(own)
        filled += size
    places: dict[str, Place] = {}
    shards = []
    for number, group in enumerate(groups, 1):
        name = single if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        shards.append(_shard(name, group, places))
    shards += [replace(_shard(file, group, places), beside=True) for file, group in beside.items()]
    return Layout(tuple(shards), places)


def _aligned(parts: Sequence[Part]) -> bool:
    """Whether every part begins at a multiple of its item size when they follow each other; headers end at 8."""
    starts = accumulate((part_bytes(part) for part in parts), initial=0)
    return all(start % ITEM_BYTES[part.dtype] == 0 for start, part in zip(starts, parts, strict=False))


def _shard(name: str, parts: list[Part], places: dict[str, Place]) -> ShardLayout:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    ordered = parts if _aligned(parts) else sorted(parts, key=lambda part: -ITEM_BYTES[part.dtype])
    for part in ordered:
        size = part_bytes(part)
        header[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    prefix = struct.pack("<Q", len(encoded)) + encoded
    offset = len(prefix)
    for part in ordered:
        places[part.name] = Place(name, offset, part_bytes(part))
        offset += part_bytes(part)
    return ShardLayout(name, prefix, offset)
