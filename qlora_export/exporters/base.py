"""What an exporter is: it makes another kind of artifact out of a finished folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from qlora_export.types import Options, Rounding


class Exporter(Protocol):
    """Makes an artifact of another kind from a finished folder, or from the adapter's folder.

    It `takes` a `dense` artifact, the `adapter`, or an artifact of the format that it names.
    """

    name: str
    takes: str
    runtime: str
    bytes_per_weight: float

    def working_bytes_per_weight(self, config: Mapping[str, Any]) -> float:
        """Disk that it takes beside the artifact while it works, for a model of this config.json."""
        ...

    def obstacle(self, config: Mapping[str, Any]) -> str | None:
        """Why no model of this config.json can be exported; None where nothing stands in the way."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """Versions and options that decide the bytes."""
        ...

    def export(self, source: Path, destination: Path) -> None:
        """Fill the destination folder; the caller adds tokenizer and manifest and gives it its name."""
        ...


@runtime_checkable
class FinishingExporter(Exporter, Protocol):
    """An exporter that has the last word on a folder, when its tokenizer is there."""

    def finish(self, source: Path, destination: Path) -> None:
        """Change what it must; the caller adds the manifest."""
        ...


@runtime_checkable
class RoundedExporter(Exporter, Protocol):
    """An exporter that takes over the integers of an artifact with this rounding; `sources` may be asked for them."""

    rounding: Rounding
    sources: tuple[str, ...]

    def accepts(self, options: Options) -> bool:
        """Whether the integers of an artifact with these options are those that it was asked for."""
        ...
