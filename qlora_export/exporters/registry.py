"""Exporters by name, made only when they are asked for."""

from __future__ import annotations

from typing import cast

from qlora_export.catalog import EXPORTERS, load
from qlora_export.exporters.base import Exporter
from qlora_export.types import Options, Rounding


def load_exporter(name: str, options: Options, rounding: Rounding | None = None) -> Exporter:
    """The exporter of that name with its options; raises UsageError where it takes over no integers so rounded."""
    return cast(Exporter, load(EXPORTERS, "format", name)(options, rounding))
