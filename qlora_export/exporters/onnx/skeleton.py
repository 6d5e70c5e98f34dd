"""A dense folder in which every row of a quantised weight says whose it is, so that the graph tells where rows went.

The builder renames weights, stacks q, k and v into one matrix and cuts fused ones apart. Rather than repeat its rules,
it is given marks for weights, and its graph is read: a marked row begins with eight small integers,

    101, weight (3 digits of base 128), row (4 digits of base 128), then zeros

all of which bf16 and float16 hold exactly. In the graph a weight lies transposed, [in, out], so the marks of a matrix
are its first eight rows, read at once. What is not marked is copied as it is: embeddings, norms, biases, dense layers.
Cost: two bytes a weight of disk, one small write for each row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import Refused
from qlora_export.merge.companion_files import COMPANION_NAME, STALE_KEYS, TOKENIZER_NAME
from qlora_export.tensors.dtypes import ITEM_BYTES, narrow
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.layout import SINGLE_NAME, lay_out
from qlora_export.tensors.reading import SourceFiles
from qlora_export.tensors.writing import ShardWriter
from qlora_export.types import Float32, Part, Piece, TensorSpec

MAGIC = 101
BASE = 128
WEIGHT_DIGITS, ROW_DIGITS = 3, 4
MARK_COLUMNS = 1 + WEIGHT_DIGITS + ROW_DIGITS
COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a weight."""

    weight: str
    first_row: int
    rows: int


def write_skeleton(
    folder: Path, source: Path, config: Mapping[str, Any], dense: Sequence[StoredTensor], marked: Sequence[TensorSpec]
) -> None:
    """Fill an empty folder with what the builder reads of a model; the tokenizer's files come from `source`."""
    cleaned = {key: value for key, value in config.items() if key not in STALE_KEYS}
    (folder / "config.json").write_text(json.dumps(cleaned), encoding="utf-8")
    for path in source.iterdir():
        if path.is_file() and (TOKENIZER_NAME.fullmatch(path.name) or COMPANION_NAME.fullmatch(path.name)):
            (folder / path.name).write_bytes(path.read_bytes())
    parts = [(Part(spec.name, spec.dtype, spec.shape),) for spec in (*(tensor.spec for tensor in dense), *marked)]
    layout = lay_out(parts, sys.maxsize, SINGLE_NAME)
    with ShardWriter(folder, layout) as writer, SourceFiles() as files:
        for tensor in dense:
            for first in range(0, tensor.bytes, COPY_BYTES):
                raw = files.read_bytes(tensor, first, min(COPY_BYTES, tensor.bytes - first))
                writer.write(Piece(tensor.spec.name, first, raw))
        for number, spec in enumerate(marked):
            for piece in _marks(number, spec):
                writer.write(piece)


def _marks(number: int, spec: TensorSpec) -> Iterator[Piece]:
    if spec.columns < MARK_COLUMNS:
        raise Refused(f"{spec.name} has {spec.columns} columns, too few to follow its rows into an ONNX graph")
    marks = np.empty((spec.rows, MARK_COLUMNS), np.float32)
    marks[:, 0] = MAGIC
    marks[:, 1 : 1 + WEIGHT_DIGITS] = _digits(np.array([number]), WEIGHT_DIGITS)
    marks[:, 1 + WEIGHT_DIGITS :] = _digits(np.arange(spec.rows), ROW_DIGITS)
    raw = narrow(marks.reshape(-1), spec.dtype).reshape(spec.rows, -1)
    row_bytes = spec.columns * ITEM_BYTES[spec.dtype]
    for row in range(spec.rows):
        yield Piece(spec.name, row * row_bytes, raw[row])


def _digits(numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Digits [numbers, count], the highest first."""
    places = BASE ** np.arange(count - 1, -1, -1)
    digits: NDArray[np.int64] = numbers[:, None] // places % BASE
    return digits


def runs_of(marks: Float32, marked: Sequence[TensorSpec], where: str) -> tuple[Run, ...] | None:
    """What the first rows [8, out] of a matrix of the graph say: whose rows it has, in its order.

    None where no row is marked; raises MixedRows where only some are.
    """
    is_marked = marks[0] == MAGIC
    if not is_marked.any():
        return None
    digits = marks.astype(np.int64)
    if not is_marked.all() or not np.array_equal(digits, marks) or digits.min() < 0 or digits.max() >= BASE:
        raise MixedRows(f"{where}: holds rows of quantised and of dense layers", "keep both, or neither, dense")
    places = BASE ** np.arange(ROW_DIGITS - 1, -1, -1)
    numbers = places[-WEIGHT_DIGITS:] @ digits[1 : 1 + WEIGHT_DIGITS]
    rows = places @ digits[1 + WEIGHT_DIGITS :]
    starts = [0, *(np.flatnonzero((np.diff(numbers) != 0) | (np.diff(rows) != 1)) + 1), len(rows)]
    return tuple(
        Run(marked[numbers[start]].name, int(rows[start]), int(stop - start)) for start, stop in pairwise(starts)
    )


class MixedRows(Refused):
    """A matrix of the graph holds rows of quantised and of dense layers, or of layers quantised unlike each other."""


def require_all_placed(runs: Sequence[Run], marked: Sequence[TensorSpec], name: str) -> None:
    """Raise Refused unless every row of every marked weight is in the graph exactly once."""
    seen = {spec.name: np.zeros(spec.rows, np.int64) for spec in marked}
    for run in runs:
        seen[run.weight][run.first_row : run.first_row + run.rows] += 1
    for weight, counts in seen.items():
        if (counts != 1).any():
            row = int(np.flatnonzero(counts != 1)[0])
            raise Refused(
                f"{name}: row {row} of {weight} is {counts[row]} times in the matrix products of the builder's graph",
                "choose onnx-fp32 or onnx-int4 without a rounding for this architecture",
            )


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose output head has a weight of its own."""
    text = config.get("text_config")
    nested = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, **nested, "tie_word_embeddings": False}


def renamed(tensor: StoredTensor, name: str) -> StoredTensor:
    """The same bytes under another name."""
    return replace(tensor, spec=replace(tensor.spec, name=name))
