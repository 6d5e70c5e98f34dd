"""The process behind the runtime `onnxruntime`: `python -m qlora_export.runtimes.onnxruntime_worker FOLDER`.

Reads a JSON list of token ids a line; answers with their log-probabilities. Imports ONNX Runtime and numpy alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime

from qlora_export.runtimes.onnx.answering import answers, put
from qlora_export.runtimes.onnx.cached_graph import CachedGraph, log_softmax
from qlora_export.runtimes.onnx.label_graph import LabelGraph
from qlora_export.runtimes.onnx.running_graph import graph_path, running_graph

DECODED_TOKENS = 8
LOG_ERRORS_ONLY = 3


def opened(folder: Path) -> CachedGraph | LabelGraph:
    """The graph that the folder's configuration names."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_ERRORS_ONLY
    session = onnxruntime.InferenceSession(str(graph_path(folder)), options, providers=["CPUExecutionProvider"])
    return running_graph(session, folder)


def main() -> None:
    """Answer until stdin ends."""
    stream = answers()
    graph = opened(Path(sys.argv[1]))
    for line in sys.stdin:
        put(stream, log_softmax(graph.rows([json.loads(line)], DECODED_TOKENS)[0]))


if __name__ == "__main__":
    main()
