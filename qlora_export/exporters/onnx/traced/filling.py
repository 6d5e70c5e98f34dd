"""The weights of a traced graph: each from the tensor of a folder that holds it, some rows at a time.

On disk: as the model builder's graphs, `model.onnx` and `model.onnx.data` by offsets; constants stand in the graph.
Cost: reading the folder and writing the data, of memory some rows, or columns of a weight that is stored turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qlora_export.errors import InputError, Refused
from qlora_export.exporters.onnx.graph import DATA_NAME, FLOAT, FLOAT16, GRAPH_NAME, NewTensor, Raw, write_tensors
from qlora_export.sources.architecture import Architecture
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.tensors.dtypes import widen
from qlora_export.tensors.header import StoredTensor

ONE_MODEL = "are config.json and weights of one model?"
CHUNK_VALUES = 1 << 22
NUMPY: dict[str, Any] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
WRITTEN: dict[int, Any] = {FLOAT: "<f4", FLOAT16: "<f2"}


@dataclass(frozen=True)
class TracedWeight:
    """A weight of a traced graph by its live name; `turned` where it is declared [in, out]."""

    name: str
    turned: bool


def fill(
    model: Any, weights: Sequence[TracedWeight], checkpoint: Checkpoint, architecture: Architecture, folder: Path
) -> None:
    """Write graph and data; raises InputError for a weight that the folder lacks or has in another shape."""
    declared = {value.name: value.type.tensor_type for value in model.graph.input}
    tensors = []
    for weight in weights:
        kind = declared[weight.name]
        shape = tuple(dim.dim_value for dim in kind.shape.dim)
        stored = _stored(weight, shape, checkpoint, architecture)
        read = partial(_columns if weight.turned else _rows, stored, WRITTEN[kind.elem_type])
        tensors.append(NewTensor(weight.name, kind.elem_type, shape, read))
    kept = [value for value in model.graph.input if value.name not in {weight.name for weight in weights}]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    with (folder / DATA_NAME).open("xb") as file:
        model.graph.initializer.extend(write_tensors(tensors, file))
    (folder / GRAPH_NAME).write_bytes(model.SerializeToString(deterministic=True))


def _stored(
    weight: TracedWeight, shape: tuple[int, ...], checkpoint: Checkpoint, architecture: Architecture
) -> StoredTensor:
    places = architecture.places.get(weight.name) or architecture.places.get(architecture.tied.get(weight.name, ""), ())
    if len(places) > 1 or any(place.window for place in places) or weight.name in architecture.rearranged:
        raise Refused(
            f"{checkpoint.folder}: {weight.name} is put together from several stored tensors",
            "a traced graph takes weights that are stored one by one",
        )
    stored = checkpoint.tensors.get(places[0].tensor) if places else None
    if stored is None:
        raise InputError(
            f"{checkpoint.folder}: has no weight {weight.name}, which config.json's architecture has", ONE_MODEL
        )
    found = tuple(reversed(stored.spec.shape)) if weight.turned else tuple(stored.spec.shape)
    if found != shape or stored.spec.dtype not in NUMPY:
        raise InputError(
            f"{stored.path}: tensor {stored.spec.name} is {stored.spec.dtype} {list(stored.spec.shape)}, "
            f"the graph of config.json has {list(shape)}",
            ONE_MODEL,
        )
    return stored


def _rows(stored: StoredTensor, kind: str) -> Iterator[Raw]:
    """The values in their order."""
    values = _mapped(stored).reshape(-1)
    for first in range(0, values.size, CHUNK_VALUES):
        yield _written(stored, values[first : first + CHUNK_VALUES], kind)


def _columns(stored: StoredTensor, kind: str) -> Iterator[Raw]:
    """The values column by column, as many columns at once as a chunk holds."""
    values = _mapped(stored)
    rows, columns = values.shape
    width = max(1, CHUNK_VALUES // rows)
    for first in range(0, columns, width):
        yield _written(stored, np.ascontiguousarray(values[:, first : first + width].T).reshape(-1), kind)


def _mapped(stored: StoredTensor) -> np.ndarray[Any, Any]:
    shape = tuple(stored.spec.shape)
    if not math.prod(shape):
        return np.empty(shape, NUMPY[stored.spec.dtype])
    mapped: np.ndarray[Any, Any] = np.memmap(stored.path, NUMPY[stored.spec.dtype], "r", stored.offset, shape)
    return mapped


def _written(stored: StoredTensor, values: np.ndarray[Any, Any], kind: str) -> Raw:
    wide = widen(np.ascontiguousarray(values).view(np.uint8), stored.spec.dtype)
    with np.errstate(over="ignore"):
        narrow = wide.astype(kind, copy=False)
    if not np.isfinite(narrow).all() and np.isfinite(wide).all():
        worst = float(np.abs(wide).max())
        raise Refused(f"{stored.path}: tensor {stored.spec.name} has {worst:g}, float16 ends at 65504", "onnx-fp32")
    return narrow.view(np.uint8)
