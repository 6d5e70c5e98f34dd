"""`torch.onnx.export` in place of the model builder: a process of its own traces, then the weights are filled in.

A trace depends on the configuration alone, so artifacts of one model share it: the graph without weights is kept in
memory, some hundred kilobytes for each of the last few.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_export.errors import EnvironmentProblem, Refused
from qlora_export.exporters.onnx.traced.filling import TracedWeight, fill
from qlora_export.exporters.transformers_js import GENAI_CONFIG
from qlora_export.merge.companion_files import STALE_KEYS
from qlora_export.sources.architecture import read_architecture
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.sources.model_config import is_classifier

TRACING = "qlora_export.exporters.onnx.traced.tracing"
GRAPH_NAME, FACTS_NAME = "traced.onnx", "traced.json"
CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
INSTEAD = "choose a safetensors format for this architecture"


@dataclass(frozen=True)
class _Traced:
    """A graph without weights, and what the process knows of it."""

    graph: bytes
    facts: str


def trace(name: str, dtype: str, source: Path, destination: Path) -> None:
    """Fill `destination` with graph, data and, for a decoder, `genai_config.json`, from a dense folder.

    Raises Refused for an architecture that cannot be traced, InputError for weights that are not those of config.json.
    """
    import onnx

    destination.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(source)
    generation = source / GENERATION_NAME
    stated = generation.read_text(encoding="utf-8") if generation.is_file() else ""
    try:
        traced = _trace(dtype, _plain(checkpoint.config), stated)
    except Refused as error:
        raise Refused(f"{name}: {error}", INSTEAD) from None
    facts = json.loads(traced.facts)
    architecture = read_architecture(checkpoint, is_classifier(checkpoint.config))
    weights = [TracedWeight(item["name"], item["turned"]) for item in facts["weights"]]
    fill(onnx.load_from_string(traced.graph), weights, checkpoint, architecture, destination)
    if facts["genai_config"]:
        text = json.dumps(facts["genai_config"], indent=4)
        (destination / GENAI_CONFIG).write_text(text, encoding="utf-8")


def outline(config: Mapping[str, Any]) -> None:
    """Trace as few layers of this config.json as there are kinds; raises Refused with what stands in the way."""
    kinds = list(config.get("layer_types") or ())
    depth = max((kinds.index(kind) + 1 for kind in set(kinds)), default=1)
    fewer = {key: depth for key in DEPTHS if key in config}
    shortened = {"layer_types": kinds[:depth]} if kinds else {}
    _trace("fp32", _plain({**config, **fewer, **shortened}), "")


def _plain(config: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in config.items() if key not in STALE_KEYS}, sort_keys=True)


@lru_cache(maxsize=4)
def _trace(dtype: str, config: str, generation: str) -> _Traced:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / CONFIG_NAME).write_text(config, encoding="utf-8")
        if generation:
            (work / GENERATION_NAME).write_text(generation, encoding="utf-8")
        _run(work, dtype)
        return _Traced((work / GRAPH_NAME).read_bytes(), (work / FACTS_NAME).read_text(encoding="utf-8"))


def _run(work: Path, dtype: str) -> None:
    found = subprocess.run(
        [sys.executable, "-P", "-m", TRACING, str(work), dtype],
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        close_fds=False,
    )
    if found.returncode:
        last = next((line.strip() for line in reversed(found.stderr.splitlines()) if line.strip()), "no message")
        if found.returncode == 1:
            raise Refused(last)
        raise EnvironmentProblem(f"torch.onnx.export ended with {found.returncode}: {last}")
