"""Where the graph of a folder lies, and what must be known to run it.

A decoder has `genai_config.json`, as ONNX Runtime GenAI reads it: `model.decoder` names graph, heads and head size. A
sequence classifier has `config.json`, which states the token that pads, and `model.onnx`, or the one graph in `onnx/`
that transformers.js reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.sources.model_config import is_classifier

GENAI_CONFIG, CONFIG = "genai_config.json", "config.json"
ADAPTER_FILE = "adapter.onnx_adapter"
GRAPH_NAME, SUBFOLDER = "model.onnx", "onnx"


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier's graph within its folder, and the token that pads a text."""

    graph: str
    padding: int


def classifier_of(folder: Path) -> Classifier | None:
    """What a folder's config.json says of a classifier with a graph; None where it is none."""
    if (folder / GENAI_CONFIG).is_file() or not (folder / CONFIG).is_file():
        return None
    config = json.loads((folder / CONFIG).read_bytes())
    if not isinstance(config, dict) or not is_classifier(config):
        return None
    graphs = [folder / GRAPH_NAME, *sorted((folder / SUBFOLDER).glob("*.onnx"))]
    found = next((str(path.relative_to(folder)) for path in graphs if path.is_file()), None)
    padding = config.get("pad_token_id")
    return Classifier(found, padding if isinstance(padding, int) else 0) if found else None


def decoder_of(folder: Path) -> Mapping[str, Any]:
    """What genai_config.json says of a decoder that was looked over."""
    decoder: Mapping[str, Any] = json.loads((folder / GENAI_CONFIG).read_bytes())["model"]["decoder"]
    return decoder
