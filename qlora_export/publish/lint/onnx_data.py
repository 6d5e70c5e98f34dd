"""ONNX graphs and the data beside them, checked without loading the data.

Where a tensor may lie is decided in `tensors/external_data.py`, as when a folder is opened. Here also: little may
follow the last tensor of a file, every data file belongs to a graph, and float weights are searched for NaN and
infinity.
"""

from __future__ import annotations

from collections.abc import Iterator

from qlora_export.errors import EnvironmentProblem, ExitCode, InputError, Problem
from qlora_export.publish.lint.contents import Contents, base_of, directory_of
from qlora_export.publish.lint.rules import finding
from qlora_export.publish.lint.values import first_nonfinite
from qlora_export.tensors.external_data import (
    DATA_NAME,
    EXPORT_AGAIN,
    Outside,
    outside_tensors,
    place_of,
    read_graph,
)
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import TensorSpec

FLOAT_TYPES = {1: "F32", 10: "F16", 11: "F64", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2"}
PAGE_BYTES = 1 << 16


def graph_problems(contents: Contents) -> Iterator[Problem]:
    """Findings about every graph and every data file of a repository."""
    graphs = sorted(name for name in contents.names if name.lower().endswith(".onnx"))
    if not graphs:
        return
    used: dict[str, int] = {}
    complete = True
    for graph in graphs:
        good = []
        for found in _places(contents, graph):
            if isinstance(found, Problem):
                yield found
                complete = False
                continue
            good.append(found)
            path = directory_of(graph) + found.location
            used[path] = max(used.get(path, 0), found.offset + found.bytes)
        yield from _values(contents, graph, good)
    if complete:
        yield from _unused(contents, used)


def _places(contents: Contents, graph: str) -> Iterator[Outside | Problem]:
    """Where the tensors of a graph lie that are outside of it, and what is wrong with others, or with the graph."""
    try:
        model = read_graph(contents.path(graph))
    except EnvironmentProblem as error:
        yield finding("onnx", graph, error.message.partition(": ")[2], error.hint, ExitCode.ENVIRONMENT)
        return
    except InputError as error:
        yield contents.finding("onnx", graph, error)
        return

    def size_of(location: str) -> int | None:
        path = directory_of(graph) + location
        return contents.path(path).stat().st_size if path in contents.names else None

    for tensor in outside_tensors(model):
        place = place_of(tensor, size_of, "is not published")
        if isinstance(place, str):
            yield finding("external-data", graph, f"tensor {tensor.name!a} {place}", EXPORT_AGAIN)
        else:
            yield place


def _values(contents: Contents, graph: str, tensors: list[Outside]) -> Iterator[Problem]:
    with SourceFiles() as files:
        for tensor in tensors:
            if tensor.type not in FLOAT_TYPES:
                continue
            spec = TensorSpec(tensor.name, FLOAT_TYPES[tensor.type], tensor.shape)
            path = directory_of(graph) + tensor.location
            place = first_nonfinite(files, StoredTensor(spec, contents.path(path), tensor.offset))
            if place is not None:
                what = f"tensor {tensor.name!a} of {base_of(graph)} is NaN or infinite at value {place}"
                yield finding("non-finite", path, what, "merge and export again")


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
