"""The graph of a folder that was looked over, ready to run. Imports ONNX Runtime and numpy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_export.runtimes.onnx.cached_graph import CachedGraph
from qlora_export.runtimes.onnx.described import classifier_of, decoder_of
from qlora_export.runtimes.onnx.label_graph import LabelGraph


def graph_path(folder: Path) -> Path:
    """The file of a folder's graph."""
    classifier = classifier_of(folder)
    return folder / (classifier.graph if classifier else str(decoder_of(folder)["filename"]))


def running_graph(session: Any, folder: Path, grows: bool = False) -> CachedGraph | LabelGraph:
    """A session of it as what it is; `grows` as in CachedGraph."""
    classifier = classifier_of(folder)
    return LabelGraph(session, classifier.padding) if classifier else CachedGraph(session, decoder_of(folder), grows)
