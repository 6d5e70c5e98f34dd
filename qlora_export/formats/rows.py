"""Rows of a tensor on their way to the parts of a format and back, and the errors that all formats share.

A part holds as many rows as its leading dimensions together say, as `TensorSpec` counts them; a vector has rows of one.
Floats go and come as float32, everything else as the integers that it is stored as, e4m3 as its bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import InputError, UsageError
from qlora_export.formats.base import Stored
from qlora_export.quant.device import kernels
from qlora_export.quant.floats import all_finite
from qlora_export.tensors.dtypes import FLOATS, ITEM_BYTES, narrow, widen
from qlora_export.types import Float32, Part, Piece, TensorSpec

GROUP_SIZES = (32, 64, 128)
ANOTHER_FORMAT = "choose another format for this artifact, or `keep` the module dense"
INTEGERS = {"I8": np.int8, "I32": np.int32}


def row_piece(part: Part, values: NDArray[Any], first_row: int) -> Piece:
    """Rows of a part at their place."""
    flat = values.reshape(-1)
    raw = narrow(flat, part.dtype) if part.dtype in FLOATS else flat.view(np.uint8)
    return Piece(part.name, first_row * _row_bytes(part), raw)


def stored_rows(parts: Stored, part: Part, rows: range) -> Any:
    """Some rows of a part [rows, columns]; may share memory with it."""
    size = _row_bytes(part)
    raw = parts[part.name][rows.start * size : rows.stop * size]
    if raw.ctypes.data % ITEM_BYTES[part.dtype]:
        raw = raw.copy()
    values = widen(raw, part.dtype) if part.dtype in FLOATS else raw.view(INTEGERS.get(part.dtype, np.uint8))
    return values.reshape(len(rows), -1)


def rows_in(values: Float32, spec: TensorSpec, dtype: str, hint: str = ANOTHER_FORMAT) -> Float32:
    """Rows [rows, columns] rounded to the dtype; raises InputError for a value that it cannot hold."""
    rounded = widen(narrow(values, dtype), dtype)
    if not all_finite(rounded.view(np.uint32)):
        raise overflow(values, spec, f"which the model's dtype {dtype} cannot", hint)
    return rounded.reshape(-1, spec.columns)


def overflow(values: Float32, spec: TensorSpec, limit: str, hint: str) -> InputError:
    """The error for a tensor with a value beyond what a format can hold."""
    return InputError(f"tensor {spec.name} holds {np.abs(kernels.to_host(values)).max():.6g}, {limit}", hint)


def require_choice(name: str, option: str, value: object, known: tuple[int, ...]) -> None:
    """Raise UsageError for an option of a format that is none of the known numbers."""
    if value not in known or isinstance(value, bool):
        raise UsageError(f"{name}: {option} {value!r}; known: {', '.join(map(str, known))}")


def _row_bytes(part: Part) -> int:
    return (part.shape[-1] if len(part.shape) > 1 else 1) * ITEM_BYTES[part.dtype]
