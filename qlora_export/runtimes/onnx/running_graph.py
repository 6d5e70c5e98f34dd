"""The graph of a folder that was looked over, ready to run. Imports ONNX Runtime and numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from qlora_export.runtimes.onnx.cached_graph import CachedGraph
from qlora_export.runtimes.onnx.described import classifier_of, decoder_of
from qlora_export.runtimes.onnx.label_graph import LabelGraph


class WithAdapter:
    """A session that takes its adapter from a file in every run, instead of the one that is its default."""

    def __init__(self, session: Any, file: Path) -> None:
        self._session, self._adapter, self._options = session, onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        self._adapter.Load(str(file))
        self._options.add_active_adapter(self._adapter)

    def get_inputs(self) -> Any:
        """The session's own."""
        return self._session.get_inputs()

    def run(self, outputs: list[str], inputs: Mapping[str, Any]) -> Any:
        """These outputs."""
        return self._session.run(outputs, inputs, self._options)


def graph_path(folder: Path) -> Path:
    """The file of a folder's graph."""
    classifier = classifier_of(folder)
    return folder / (classifier.graph if classifier else str(decoder_of(folder)["filename"]))


def running_graph(session: Any, folder: Path, grows: bool = False) -> CachedGraph | LabelGraph:
    """A session of it as what it is; `grows` as in CachedGraph."""
    classifier = classifier_of(folder)
    return LabelGraph(session, classifier.padding) if classifier else CachedGraph(session, decoder_of(folder), grows)
