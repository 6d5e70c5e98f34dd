"""ONNX graphs and the data beside them, checked without loading the data.

A graph names files (`external_data.location`) that a runtime then opens: only a plain name beside the graph may stand
there, and no key that a loader could take for an attribute. Each tensor's bytes follow from its shape and type; they
must lie inside the file, and little may follow the last. Float weights are searched for NaN and infinity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_export.contracts import TensorSpec
from qlora_export.errors import ExitCode, Problem
from qlora_export.publish.lint.contents import Contents, base_of, directory_of
from qlora_export.publish.lint.rules import finding
from qlora_export.publish.lint.values import first_nonfinite
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles

DATA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.onnx(\.data|_data)(_\d+)?")
KNOWN_KEYS = frozenset(("location", "offset", "length", "checksum"))
# ONNX element types by number: bits of one value.
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16, 17: 8,
    18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
FLOAT_TYPES = {1: "F32", 10: "F16", 11: "F64", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2"}
EXPORT_AGAIN = "export the artifact again; do not rename or edit what the exporter wrote"
PAGE_BYTES = 1 << 16


@dataclass(frozen=True)
class Outside:
    """One tensor of a graph whose bytes lie in a file beside it."""

    name: str
    path: str
    type: int
    shape: tuple[int, ...]
    offset: int
    bytes: int


def graph_problems(contents: Contents) -> Iterator[Problem]:
    """Findings about every graph and every data file of a repository."""
    graphs = sorted(name for name in contents.names if name.lower().endswith(".onnx"))
    if not graphs:
        return
    used: dict[str, int] = {}
    complete = True
    for graph in graphs:
        found = _tensors(contents, graph)
        if isinstance(found, Problem):
            yield found
            complete = False
            continue
        good = []
        for tensor in found:
            place = _outside(contents, graph, tensor)
            if isinstance(place, Problem):
                yield place
                complete = False
            else:
                good.append(place)
                used[place.path] = max(used.get(place.path, 0), place.offset + place.bytes)
        yield from _values(contents, graph, good)
    if complete:
        yield from _unused(contents, used)


def _tensors(contents: Contents, graph: str) -> list[Any] | Problem:
    """The tensors of a graph that lie outside of it, or why it cannot be read."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        return finding(
            "onnx", graph, "the onnx package is not installed, so the graph cannot be checked",
            "pip install 'qlora-export[onnx]'", ExitCode.ENVIRONMENT,
        )  # fmt: skip
    try:
        model = onnx.load(contents.path(graph), load_external_data=False)
    except (DecodeError, ValueError) as error:
        return finding("onnx", graph, f"is no ONNX graph ({str(error).splitlines()[0]})", EXPORT_AGAIN)
    if not model.HasField("graph"):
        return finding("onnx", graph, "is no ONNX graph (it is empty)", EXPORT_AGAIN)
    outside = onnx.TensorProto.EXTERNAL
    return [
        tensor
        for tensor in _messages(model, onnx.TensorProto)
        if tensor.data_location == outside or tensor.external_data
    ]


def _messages(message: Any, kind: type) -> Iterator[Any]:
    """Every message of a kind inside another, wherever it hangs: initializers, attributes, subgraphs, functions."""
    waiting = [message]
    while waiting:
        current = waiting.pop()
        if isinstance(current, kind):
            yield current
            continue
        for field, value in current.ListFields():
            if field.type == field.TYPE_MESSAGE:
                waiting.extend([value] if hasattr(value, "ListFields") else value)


def _outside(contents: Contents, graph: str, tensor: Any) -> Outside | Problem:
    """Where a tensor's bytes lie, or the first thing that is wrong with it."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = facts.get("location", "")

    def wrong(what: str) -> Problem:
        return finding("external-data", graph, f"tensor {tensor.name!a} {what}", EXPORT_AGAIN)

    if len(facts) != len(tensor.external_data) or not facts.keys() <= KNOWN_KEYS:
        return wrong(f"has the external data keys {[entry.key for entry in tensor.external_data]!a}")
    if not DATA_NAME.fullmatch(location):
        return wrong(f"lies in {location!a}, which is no plain name of a data file beside the graph")
    path = directory_of(graph) + location
    if path not in contents.names:
        return wrong(f"lies in {location}, which is not published")
    size = contents.path(path).stat().st_size
    shape, bits = tuple(tensor.dims), BITS.get(tensor.data_type)
    if bits is None or any(length < 0 for length in shape):
        return wrong(f"has type {tensor.data_type} and shape {list(shape)}")
    needed = -(-math.prod(shape) * bits // 8)
    try:
        offset, length = int(facts.get("offset", 0)), int(facts.get("length", size))
    except ValueError:
        return wrong(f"has the offset {facts.get('offset')!a} and the length {facts.get('length')!a}")
    if "length" in facts and length != needed:
        return wrong(f"has {length} bytes, its shape {list(shape)} needs {needed}")
    if offset < 0 or offset + needed > size:
        return wrong(f"ends at byte {offset + needed}, {location} has {size}")
    return Outside(tensor.name, path, tensor.data_type, shape, offset, needed)


def _values(contents: Contents, graph: str, tensors: list[Outside]) -> Iterator[Problem]:
    with SourceFiles() as files:
        for tensor in tensors:
            if tensor.type not in FLOAT_TYPES:
                continue
            spec = TensorSpec(tensor.name, FLOAT_TYPES[tensor.type], tensor.shape)
            place = first_nonfinite(files, StoredTensor(spec, contents.path(tensor.path), tensor.offset))
            if place is not None:
                what = f"tensor {tensor.name!a} of {base_of(graph)} is NaN or infinite at value {place}"
                yield finding("non-finite", tensor.path, what, "merge and export again")


def _unused(contents: Contents, used: dict[str, int]) -> Iterator[Problem]:
    """Data files that no graph names, or that go on where the last tensor ended."""
    for name in sorted(contents.names):
        if not DATA_NAME.fullmatch(base_of(name)):
            continue
        size = contents.path(name).stat().st_size
        if name not in used:
            yield finding("external-data", name, "belongs to no graph", EXPORT_AGAIN)
        elif size - used[name] >= PAGE_BYTES:
            what = f"has {size} bytes, its last tensor ends at {used[name]}"
            yield finding("external-data", name, what, EXPORT_AGAIN)
