"""An ONNX graph of the builder with some of its matrix products replaced, and its data written anew, by offsets.

Of the builder's data what stays is copied, and what comes in is written chunk by chunk: neither is held whole. Every
tensor begins at a multiple of 4,096 bytes, so that a runtime can map the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import EnvironmentProblem
from qlora_export.types import Float32

GRAPH_NAME, DATA_NAME = "model.onnx", "model.onnx.data"
DOMAIN = "com.microsoft"
CONTRIBUTED = ("MatMulNBits", "MatMulBnb4")
PAGE_BYTES = 4096
COPY_BYTES = 1 << 22
FLOAT, UINT8, INT32, FLOAT16, BFLOAT16 = 1, 2, 6, 10, 16
ITEM_BYTES = {FLOAT: 4, UINT8: 1, FLOAT16: 2}
FLOATS: dict[int, Any] = {FLOAT: np.float32, FLOAT16: np.float16}
Raw = NDArray[np.uint8]
Floats = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True)
class NewTensor:
    """A tensor to come in: its bytes are made, in order, when they are written."""

    name: str
    type: int
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Raw]]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * ITEM_BYTES[self.type]


@dataclass(frozen=True)
class Replacement:
    """The nodes that stand in for a matrix product, their tensors, and those of them that a run may give others for."""

    nodes: tuple[Any, ...]
    tensors: tuple[NewTensor, ...]
    inputs: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Product:
    """A matrix product of the graph by a float weight [columns, rows]: node, weight, and what goes in and out.

    Where `turned` the weight is stored as [rows, columns]; `bias` is the name of what is added, if anything is; `type`
    is that of the weight.
    """

    node: str
    weight: str
    columns: int
    rows: int
    input: str
    output: str
    turned: bool = False
    bias: str = ""
    type: int = FLOAT


class BuiltGraph:
    """A graph that the builder left in a folder; its data is read where it is needed."""

    def __init__(self, folder: Path) -> None:
        import onnx

        self._folder = folder
        self.model = onnx.load(folder / GRAPH_NAME, load_external_data=False)
        self._stored = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def products(self) -> list[Product]:
        """The matrix products by a float32 weight, in the order of the graph."""
        found = []
        for node in self.model.graph.node:
            weight = self._stored.get(node.input[1]) if node.op_type == "MatMul" else None
            if weight is not None and weight.data_type == FLOAT and len(weight.dims) == 2:
                columns, rows = weight.dims
                found.append(Product(node.name, weight.name, columns, rows, node.input[0], node.output[0]))
        return found

    def first_rows(self, product: Product, count: int) -> Float32:
        """The first rows [count, rows of the weight] of a weight as it lies here."""
        raw = np.concatenate(list(self._chunks(product.weight, 4 * count * product.rows)))
        return raw.view(np.float32).reshape(count, product.rows)

    def slice(self, product: Product, first: int, count: int) -> Floats:
        """Some rows of a product's weight, all of their columns: [columns, count], float32 or float16."""
        place = self._place(product.weight)
        path, offset = self._folder / place["location"], int(place.get("offset", 0))
        values = np.memmap(path, FLOATS[product.type], "r", offset, tuple(self._stored[product.weight].dims))
        part = values[first : first + count].T if product.turned else values[:, first : first + count]
        return np.array(part, order="C")

    def write(self, replacements: Mapping[str, Replacement], destination: Path) -> None:
        """Write graph and data with these products, by their nodes, replaced; tensors of one name are one.

        What only they needed goes: their weights, and nodes that turned these.
        """
        new = {tensor.name: tensor for item in replacements.values() for tensor in item.tensors}.values()
        nodes = _needed([new for old in self.model.graph.node for new in _nodes(old, replacements)], self.model.graph)
        self.model.graph.input.extend(_inputs(replacements))
        gone = _used(self.model.graph.node) - _used(nodes)
        kept = [name for name in self._stored if name not in gone]
        entries = []
        with (destination / DATA_NAME).open("xb") as file:
            for name in kept:
                entries.append(self._entry(name, file.tell()))
                _append(file, self._chunks(name, self._bytes(name)))
            entries += write_tensors(new, file)
        self._finish(nodes, gone, entries, destination)

    def _finish(self, nodes: list[Any], gone: set[str], entries: list[Any], destination: Path) -> None:
        graph = self.model.graph
        values = [value for value in graph.value_info if value.name not in gone]
        for field, items in ((graph.node, nodes), (graph.value_info, values), (graph.initializer, entries)):
            del field[:]
            field.extend(items)
        if all(item.domain != DOMAIN for item in self.model.opset_import):
            self.model.opset_import.add(domain=DOMAIN, version=1)
        (destination / GRAPH_NAME).write_bytes(self.model.SerializeToString(deterministic=True))

    def _entry(self, name: str, offset: int) -> Any:
        stored = self._stored[name]
        return _external(name, stored.data_type, tuple(stored.dims), offset, self._bytes(name))

    def _place(self, name: str) -> dict[str, str]:
        place = {entry.key: entry.value for entry in self._stored[name].external_data}
        if place.get("location") != DATA_NAME:
            raise EnvironmentProblem(
                f"the model builder left tensor {name} outside of {DATA_NAME}", "use onnxruntime-genai 0.18"
            )
        return place

    def _bytes(self, name: str) -> int:
        return int(self._place(name)["length"])

    def _chunks(self, name: str, count: int) -> Iterator[Raw]:
        """The first `count` bytes of a tensor."""
        with (self._folder / DATA_NAME).open("rb", buffering=0) as file:
            file.seek(int(self._place(name).get("offset", 0)))
            while count:
                chunk = np.fromfile(file, np.uint8, min(count, COPY_BYTES))
                if not chunk.size:
                    raise EnvironmentProblem(f"{DATA_NAME} of the model builder ends inside of {name}")
                count -= chunk.size
                yield chunk


def node(op: str, inputs: list[str], output: str, name: str, **attributes: int | list[int]) -> Any:
    """A node of ONNX's own operators, or of those of com.microsoft that are used here."""
    from onnx import helper

    made = helper.make_node(op, inputs, [output], name=name, domain=DOMAIN if op in CONTRIBUTED else None)
    made.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
    return made


def write_tensors(tensors: Iterable[NewTensor], file: BinaryIO) -> list[Any]:
    """Append tensors to a data file; their entries in a graph."""
    entries = []
    for tensor in tensors:
        entries.append(_entry(tensor, file.tell()))
        if (count := _append(file, tensor.chunks())) != tensor.bytes:
            raise ValueError(f"{tensor.name}: {count} bytes, its shape {tensor.shape} says {tensor.bytes}")
    return entries


def array(name: str, values: Float32) -> NewTensor:
    """A small float32 tensor that is at hand."""
    raw = np.ascontiguousarray(values, np.float32)
    return NewTensor(name, FLOAT, raw.shape, lambda: iter((raw.reshape(-1).view(np.uint8),)))


def numbers(name: str, values: list[int]) -> Any:
    """A node that is a small int64 tensor: a shape must stand in the graph itself."""
    return node("Constant", [], name, name, value_ints=values)


def _nodes(old: Any, replacements: Mapping[str, Replacement]) -> tuple[Any, ...]:
    return replacements[old.name].nodes if old.name in replacements else (old,)


def _inputs(replacements: Mapping[str, Replacement]) -> Iterable[Any]:
    return {value.name: value for item in replacements.values() for value in item.inputs}.values()


def _used(nodes: Iterable[Any]) -> set[str]:
    """The names that nodes and the graphs inside of them read."""
    names: set[str] = set()
    for item in nodes:
        names.update(item.input)
        for attribute in item.attribute:
            for graph in (*attribute.graphs, attribute.g):
                names |= _used(graph.node) | {value.name for value in graph.output}
    return names


def _needed(nodes: list[Any], graph: Any) -> list[Any]:
    """Nodes without those that turn a weight which nobody reads any more."""
    read = _used(nodes) | {value.name for value in graph.output}
    return [item for item in nodes if item.op_type != "Transpose" or not read.isdisjoint(item.output)]


def _entry(tensor: NewTensor, offset: int) -> Any:
    return _external(tensor.name, tensor.type, tensor.shape, offset, tensor.bytes)


def _external(name: str, kind: int, shape: tuple[int, ...], offset: int, count: int) -> Any:
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", DATA_NAME), ("offset", str(offset)), ("length", str(count))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _append(file: BinaryIO, chunks: Iterator[Raw]) -> int:
    """Write chunks, then zeros up to the next page; the bytes of the chunks."""
    first = file.tell()
    file.writelines(chunk.data for chunk in chunks)
    written = file.tell() - first
    file.write(bytes(-file.tell() % PAGE_BYTES))
    return written
