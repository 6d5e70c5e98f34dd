"""Matrices of the model builder's graph that are made while they are written, some rows of their weight at a time.

The builder turns most weights, so some of their rows are a part of each row in the graph's file and written by offsets.
Where there are only zeros nothing is written and the file keeps a hole: a graph of marks costs no disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import onnx_ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from qlora_export.exporters.onnx.graph import Raw
from qlora_export.tensors.writing import write_at

CHUNK_VALUES = 1 << 22


class StreamedMatrix(onnx_ir.LazyTensor):
    """A matrix of torch in the type that the graph has it in."""

    def __init__(self, lazy: onnx_ir.LazyTensor, source: torch.Tensor) -> None:
        super().__init__(lazy.raw, lazy.dtype, lazy.shape, name=lazy.name)
        self._source, self._kind = source.detach(), to_torch_dtype(lazy.dtype)

    @property
    def lengths(self) -> tuple[int, int]:
        """Rows and columns of the graph's matrix."""
        rows, columns = self._source.shape
        return rows, columns

    def columns(self, first: int, count: int) -> torch.Tensor:
        """Some columns of the graph's matrix, which are rows of a weight."""
        return self._converted(self._source[:, first : first + count])

    def tofile(self, file: BinaryIO) -> None:
        """Write all of it at the position of the file."""
        start = file.tell()
        turned = self._source.stride(0) < self._source.stride(1)
        for offset, raw in self._column_parts() if turned else self._row_parts():
            write_at(file.fileno(), raw.data, start + offset)
        end_at(file, start + self.nbytes)

    def _row_parts(self) -> Iterator[tuple[int, Raw]]:
        rows, columns = self.lengths
        height = max(1, CHUNK_VALUES // columns)
        for first in range(0, rows, height):
            raw = _raw(self._converted(self._source[first : first + height]))
            if raw.any():
                yield first * columns * self._kind.itemsize, raw.reshape(-1)

    def _column_parts(self) -> Iterator[tuple[int, Raw]]:
        rows, columns = self.lengths
        width = max(1, CHUNK_VALUES // rows)
        for first in range(0, columns, width):
            raw = _raw(self.columns(first, width))
            for row in np.flatnonzero(raw.any(axis=1)):
                yield (int(row) * columns + first) * self._kind.itemsize, raw[row]

    def _converted(self, part: torch.Tensor) -> torch.Tensor:
        # Into new memory: what torch calls contiguous, a single column, say, may have the strides of its whole.
        return torch.empty(part.shape, dtype=self._kind).copy_(part)


def stream_matrices(model_class: Any) -> None:
    """Have the builder's class keep matrices that it converts until they are written."""
    make = model_class.make_initializer

    def make_initializer(self: Any, tensor: Any, /, name: str, **options: Any) -> None:
        make(self, tensor, name, **options)
        value = self.values[name]
        if isinstance(value.const_value, onnx_ir.LazyTensor) and isinstance(tensor, torch.Tensor) and tensor.ndim == 2:
            value.const_value = StreamedMatrix(value.const_value, tensor)

    model_class.make_initializer = make_initializer


def end_at(file: BinaryIO, position: int) -> None:
    """Go on behind what was written by offsets, which may have ended before."""
    file.seek(0, 2)
    file.truncate(max(file.tell(), position))
    file.seek(position)


def _raw(matrix: torch.Tensor) -> Raw:
    raw: Raw = matrix.view(torch.uint8).numpy()
    return raw
