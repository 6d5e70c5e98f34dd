"""What of a staged repository may be opened: the listed names that are plain and are regular files on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_export.errors import ExportError, InputError, Problem
from qlora_export.publish.lint.rules import finding
from qlora_export.sources.checkpoint import read_json

RESTORE = "build and stage the artifact again"


@dataclass(frozen=True)
class Contents:
    """The files that later rules look into; findings about their JSON are gathered while they are read."""

    folder: Path
    names: frozenset[str]
    problems: list[Problem] = field(default_factory=list)
    _tables: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Where a name lies on the disk."""
        return self.folder / name

    def beside(self, directory: str) -> list[str]:
        """The names directly in a directory (`""` or `onnx-int4/`), sorted."""
        return sorted(name for name in self.names if directory_of(name) == directory)

    def table(self, name: str, rule: str = "config") -> Mapping[str, Any] | None:
        """A JSON object; None where there is no such file, or none that can be read, which is a finding."""
        if name not in self._tables:
            self._tables[name] = None
            if name in self.names:
                try:
                    self._tables[name] = read_json(self.path(name))
                except InputError as error:
                    self.problems.append(self.finding(rule, name, error))
        return self._tables[name]

    def finding(self, rule: str, name: str, error: ExportError) -> Problem:
        """An error as a finding about a file, without the folder that it was staged in."""
        what = error.message.replace(f"{self.folder}/", "").removeprefix(f"{name}: ")
        return finding(rule, name, what, error.hint or RESTORE)


def directory_of(name: str) -> str:
    """The directory of a path in the repository, with its slash; empty at the root."""
    head, slash, _ = name.rpartition("/")
    return head + slash


def base_of(name: str) -> str:
    """The last part of a path in the repository."""
    return name.rpartition("/")[2]
