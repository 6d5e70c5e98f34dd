"""ONNX tensors whose bytes lie in a file beside their graph: where, checked before anything opens that file.

A graph names files (`external_data.location`) that a runtime then opens: only a plain name beside the graph may stand
there, and no key that a loader could take for an attribute. Each tensor's bytes follow from its shape and type; they
must lie inside the file. Cost: parsing the graph, without its data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.errors import EnvironmentProblem, InputError

DATA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.onnx(\.data|_data)(_\d+)?")
KNOWN_KEYS = frozenset(("location", "offset", "length", "checksum"))
# ONNX element types by number: bits of one value.
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16, 17: 8,
    18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
EXPORT_AGAIN = "export the artifact again; do not rename or edit what the exporter wrote"


@dataclass(frozen=True)
class Outside:
    """One tensor of a graph whose bytes lie in the file `location` beside it."""

    name: str
    location: str
    type: int
    shape: tuple[int, ...]
    offset: int
    bytes: int


def read_graph(path: Path) -> Any:
    """The onnx.ModelProto of a file, without external data; raises InputError where it is none."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise EnvironmentProblem(
            f"{path}: the onnx package is not installed, so the graph cannot be checked",
            "pip install 'qlora-export[onnx]'",
        ) from None
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise InputError(f"{path}: is no ONNX graph ({str(error).splitlines()[0]})", EXPORT_AGAIN) from None
    if not model.HasField("graph"):
        raise InputError(f"{path}: is no ONNX graph (it is empty)", EXPORT_AGAIN)
    return model


def outside_tensors(model: Any) -> list[Any]:
    """The tensors of a graph that lie outside of it, wherever they hang, and those that name a file without need."""
    import onnx

    return [
        tensor
        for tensor in _messages(model, onnx.TensorProto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data
    ]


def place_of(tensor: Any, size_of: Callable[[str], int | None], missing: str = "is not there") -> Outside | str:
    """Where a tensor's bytes lie, or the first thing that is wrong with it.

    `size_of` knows the bytes of a file beside the graph, None where there is none: it is `missing`.
    """
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = facts.get("location", "")
    if len(facts) != len(tensor.external_data) or not facts.keys() <= KNOWN_KEYS:
        return f"has the external data keys {[entry.key for entry in tensor.external_data]!a}"
    if not DATA_NAME.fullmatch(location):
        return f"lies in {location!a}, which is no plain name of a data file beside the graph"
    size = size_of(location)
    if size is None:
        return f"lies in {location}, which {missing}"
    shape, bits = tuple(tensor.dims), BITS.get(tensor.data_type)
    if bits is None or any(length < 0 for length in shape):
        return f"has type {tensor.data_type} and shape {list(shape)}"
    needed = -(-math.prod(shape) * bits // 8)
    try:
        offset, length = int(facts.get("offset", 0)), int(facts.get("length", size))
    except ValueError:
        return f"has the offset {facts.get('offset')!a} and the length {facts.get('length')!a}"
    if "length" in facts and length != needed:
        return f"has {length} bytes, its shape {list(shape)} needs {needed}"
    if offset < 0 or offset + needed > size:
        return f"ends at byte {offset + needed}, {location} has {size}"
    return Outside(tensor.name, location, tensor.data_type, shape, offset, needed)


def is_hostile(tensor: Any) -> bool:
    """Whether the file that a tensor names could be any on the machine."""
    return any(entry.key == "location" and not DATA_NAME.fullmatch(entry.value) for entry in tensor.external_data)


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
