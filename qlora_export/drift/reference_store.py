"""The reference's distributions on disk: written once, shared by every artifact that is compared with it, and kept.

    OUT/references/KEY/   rows.f32         float32 [tokens, vocabulary], little-endian, in the order of the windows
                          measured.npz     per-token numbers of the reference and its kin, as NAME.COLUMN
                          reference.json   version, what the key is a digest of, a CRC-32 of each window's rows

A later run with the same key (the models' bytes, the tokens, dtype, device, versions of the libraries that compute)
loads no reference at all. A folder appears whole or not at all; while it is written it is called KEY.partial. Beyond a
limit the references that were not used for longest make room; one that is larger by itself is not kept. Cost: 4 bytes
an entry, and one CRC of what is read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from qlora_export.drift.results import Measurement
from qlora_export.drift.tokens import TokenSet
from qlora_export.errors import EnvironmentProblem, InputError
from qlora_export.types import Float32

VERSION = 2
FOLDER = "references"
ROWS, MEASURED, FACTS = "rows.f32", "measured.npz", "reference.json"
PARTIAL = ".partial"
WORDS = ("name", "runtime", "nonfinite")
COLUMNS = [item.name for item in fields(Measurement) if item.name not in WORDS]
Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ReferenceStore:
    """The kept references of a run folder, and how many bytes they may have together."""

    out: Path
    limit_bytes: int

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.out / FOLDER


class ReferenceProbabilities:
    """The log-probabilities of one reference, a float32 file [tokens, vocabulary]: stored once, read by window."""

    def __init__(self, file: IO[bytes], tokens: TokenSet, stored: Mapping[int, int] | None = None) -> None:
        self.tokens = tokens
        self.checksums = dict(stored or {})
        self._file = file
        counts = [len(window.scored) for window in tokens.windows]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._rows: NDArray[np.float32] | None = None
        self._doubted = set(self.checksums)
        if stored is not None:
            self._rows = np.memmap(file, np.float32, "r").reshape(tokens.count, -1)

    def put(self, number: int, rows: Float32) -> None:
        """Store the rows of a window; raises EnvironmentProblem when the disk has no room for all of them."""
        if self._rows is None:
            shape = (int(self._starts[-1]), rows.shape[1])
            try:
                os.posix_fallocate(self._file.fileno(), 0, 4 * shape[0] * shape[1])
            except OSError as error:
                message = f"no room for {4 * shape[0] * shape[1]} bytes of reference probabilities ({error.strerror})"
                raise EnvironmentProblem(message, "free some disk space, or set drift.tokens lower") from None
            self._rows = np.memmap(self._file, np.float32, "r", shape=shape)
        # Written by its offset: stores to fresh pages of a mapping take ten times as long, a fault each.
        self._file.seek(4 * int(self._starts[number]) * rows.shape[1])
        self._file.write(np.ascontiguousarray(rows).data)
        self._file.flush()
        self.checksums[number] = _checksum(rows)

    def get(self, number: int) -> Float32:
        """The rows of a window; raises InputError where they are no longer those that were stored."""
        if self._rows is None:
            raise InputError("no reference was measured")
        rows: Float32 = self._rows[self._starts[number] : self._starts[number + 1]]
        if number in self._doubted:
            if _checksum(rows) != self.checksums[number]:
                raise InputError(f"{self.name}: window {number + 1} is damaged", "remove its folder, run again")
            self._doubted.remove(number)
        return rows

    @property
    def name(self) -> str:
        """Where the rows lie."""
        return str(self._file.name)

    def flush(self) -> None:
        """Bring everything to the disk."""
        os.fsync(self._file.fileno())


@dataclass
class Reference:
    """One reference in the store, or on its way there: rows, and the columns of numbers kept beside them."""

    rows: ReferenceProbabilities
    columns: Columns = field(default_factory=dict)
    known: bool = False
    _keep: _Place | None = None

    def keep(self, columns: Columns) -> None:
        """Finish it: with these columns a later run finds it."""
        self.columns, self.known = columns, True
        if self._keep is not None:
            self._keep.finish(self.rows, columns)


@contextmanager
def open_reference(store: ReferenceStore, key: Mapping[str, Any], tokens: TokenSet) -> Iterator[Reference]:
    """The reference of this key where it was kept, else an empty one to fill and `keep`."""
    store.folder.mkdir(parents=True, exist_ok=True)
    facts = {"version": VERSION, **key, "tokens": tokens.sha256}
    place = _Place(store, facts)
    if (found := place.load(tokens)) is not None:
        with found.rows._file:
            yield found
        return
    with place.writing() as file:
        keeps = place if file.name == str(place.partial / ROWS) else None
        yield Reference(ReferenceProbabilities(file, tokens), _keep=keeps)


@dataclass(frozen=True)
class _Place:
    """Where a reference of some facts lies."""

    store: ReferenceStore
    facts: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        return self.store.folder / digest[:16]

    @property
    def partial(self) -> Path:
        return self.folder.with_suffix(PARTIAL)

    def load(self, tokens: TokenSet) -> Reference | None:
        """What was kept here; None where there is nothing, or something else than expected."""
        try:
            kept = json.loads((self.folder / FACTS).read_bytes())
            if kept["facts"] != self.facts or len(kept["checksums"]) != len(tokens.windows):
                return None
            with (self.folder / MEASURED).open("rb") as raw, np.load(raw, allow_pickle=False) as columns:
                found = dict(columns)
            file = (self.folder / ROWS).open("rb")
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile):
            return None
        try:
            rows = ReferenceProbabilities(file, tokens, dict(enumerate(kept["checksums"])))
        except ValueError:
            file.close()
            return None
        os.utime(self.folder / FACTS)
        return Reference(rows, found, known=True)

    @contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        """A file for the rows: in our partial folder, or without a name while another run fills that one."""
        self.partial.mkdir(exist_ok=True)
        folder = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)
        if not self._owns(folder):
            os.close(folder)
            with tempfile.TemporaryFile(dir=self.store.folder) as unnamed:
                yield unnamed
            return
        try:
            with (self.partial / ROWS).open("w+b") as file:
                yield file
        finally:
            # Finished or not kept, the partial folder is no more; a killed run leaves it to the next one. Where this
            # one was finished and then made room, the name may be that of another run's by now.
            if self._owns(folder):
                shutil.rmtree(self.partial, ignore_errors=True)
            os.close(folder)

    def _owns(self, folder: int) -> bool:
        """Whether an open folder is the partial one by name, and no other run's."""
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(folder), self.partial.stat())
        except (BlockingIOError, FileNotFoundError):
            return False

    def finish(self, rows: ReferenceProbabilities, columns: Columns) -> None:
        """Give the folder its name, where it may stay."""
        rows.flush()
        np.savez(self.partial / MEASURED, allow_pickle=False, **columns)
        checksums = [rows.checksums[number] for number in range(len(rows.tokens.windows))]
        text = json.dumps({"facts": self.facts, "checksums": checksums})
        (self.partial / FACTS).write_text(text, encoding="utf-8")
        for name in (MEASURED, FACTS):
            with (self.partial / name).open("rb") as file:
                os.fsync(file.fileno())
        size = _folder_bytes(self.partial)
        self._make_room(self.store.limit_bytes - size)
        if size > self.store.limit_bytes:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.partial.rename(self.folder)

    def _make_room(self, limit_bytes: int) -> None:
        found = []
        for path in kept_references(self.store.out):
            # Another run may make room, too.
            with suppress(FileNotFoundError):
                if path.suffix != PARTIAL:
                    found.append(((path / FACTS).stat().st_mtime_ns, _folder_bytes(path), path))
        total = 0
        for _, size, path in sorted(found, reverse=True):
            total += size
            if total > limit_bytes:
                shutil.rmtree(path, ignore_errors=True)


def kept_references(out: Path) -> list[Path]:
    """The folders of references in a run folder, those of dead runs included."""
    found = []
    for path in sorted((out / FOLDER).glob("*")) if not (out / FOLDER).is_symlink() else []:
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink() and ((path / FACTS).is_file() or path.suffix == PARTIAL):
                found.append(path)
    return found


def columns_of(measured: Mapping[str, Measurement]) -> dict[str, NDArray[Any]]:
    """Measurements as columns to keep."""
    found: dict[str, NDArray[Any]] = {}
    for key, item in measured.items():
        found |= {f"{key}.{column}": np.asarray(getattr(item, column)) for column in (*COLUMNS, *WORDS)}
    return found


def measurement_in(columns: Columns, key: str) -> Measurement | None:
    """The measurement that was kept under this key."""
    if f"{key}.nll" not in columns:
        return None
    words: dict[str, Any] = {word: columns[f"{key}.{word}"].item() for word in WORDS}
    words |= {column: columns[f"{key}.{column}"] for column in COLUMNS}
    return Measurement(**words)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _checksum(rows: Float32) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).view(np.uint8).data)
