"""What the layers of a model get and give, kept in a nameless file: memory holds no more than one layer's numbers.

Cost on the disk: 4 bytes an entry; the inputs that several layers share are kept once.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from qlora_export.errors import EnvironmentProblem
from qlora_export.types import Float32


@dataclass(frozen=True)
class _Place:
    offset: int
    shape: tuple[int, ...]


class Recording:
    """Calls of layers by window, name, and how many calls of that layer came before in the window."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed at the end of the with statement
        self._places: dict[tuple[int, str], list[tuple[_Place | None, _Place]]] = {}
        self._last: tuple[Float32, _Place] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # Where the disk was full, so it is for what is still in a buffer.
        with suppress(OSError):
            self._file.close()

    def add(self, window: int, name: str, inputs: Float32 | None, outputs: Float32) -> None:
        """Keep a call; raises EnvironmentProblem when the disk is full."""
        place = None if inputs is None else self._place_of(inputs)
        self._places.setdefault((window, name), []).append((place, self._write(outputs)))

    def inputs(self, window: int, name: str, call: int) -> Float32 | None:
        """What a layer got, [rows, columns]; None for token ids, and where there was no such call."""
        place, _ = self._call(window, name, call)
        return None if place is None else self._read(place)

    def outputs(self, window: int, name: str, call: int) -> Float32 | None:
        """What a layer gave, [rows, width]; None where there was no such call."""
        _, place = self._call(window, name, call)
        return None if place is None else self._read(place)

    def _call(self, window: int, name: str, call: int) -> tuple[_Place | None, _Place | None]:
        calls = self._places.get((window, name), [])
        return calls[call] if call < len(calls) else (None, None)

    def _place_of(self, inputs: Float32) -> _Place:
        if self._last is None or not np.array_equal(self._last[0], inputs):
            self._last = (inputs, self._write(inputs))
        return self._last[1]

    def _write(self, values: Float32) -> _Place:
        try:
            place = _Place(self._file.seek(0, 2), values.shape)
            self._file.write(np.ascontiguousarray(values, np.float32).data)
        except OSError as error:
            raise EnvironmentProblem(
                f"no room for what the layers of the reference compute ({error.strerror})",
                "free some disk space, or set drift.trace to never",
            ) from None
        return place

    def _read(self, place: _Place) -> Float32:
        self._file.seek(place.offset)
        values = np.frombuffer(self._file.read(4 * int(np.prod(place.shape))), np.float32)
        return values.reshape(place.shape)
