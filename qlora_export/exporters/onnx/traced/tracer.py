"""`torch.onnx.export` in place of the model builder: a process of its own traces, then the weights are filled in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_export.errors import EnvironmentProblem, Refused
from qlora_export.exporters.onnx.traced.filling import TracedWeight, fill
from qlora_export.sources.architecture import read_architecture
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.tensors.external_data import read_graph

TRACING = "qlora_export.exporters.onnx.traced.tracing"
GRAPH_NAME, FACTS_NAME = "traced.onnx", "traced.json"
SHORTENED = "--shortened"
CLASSIFIER = "ForSequenceClassification"
INSTEAD = "choose a safetensors format for this architecture"


def trace(name: str, dtype: str, source: Path, destination: Path) -> None:
    """Fill `destination` with graph, data and, for a decoder, `genai_config.json`, from a dense folder.

    Raises Refused for an architecture that cannot be traced, InputError for weights that are not those of config.json.
    """
    destination.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(source)
    with tempfile.TemporaryDirectory(prefix=".traced-", dir=destination) as work:
        try:
            facts = _follow(dtype, source, Path(work))
        except Refused as error:
            raise Refused(f"{name}: {error}", INSTEAD) from None
        model = read_graph(Path(work) / GRAPH_NAME)
    architecture = read_architecture(checkpoint, is_classifier(checkpoint.config))
    weights = [TracedWeight(item["name"], item["turned"]) for item in facts["weights"]]
    fill(model, weights, checkpoint, architecture, destination)
    if facts["genai_config"]:
        text = json.dumps(facts["genai_config"], indent=4)
        (destination / "genai_config.json").write_text(text, encoding="utf-8")


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a sequence classifier."""
    stated = config.get("architectures")
    return isinstance(stated, list) and bool(stated) and str(stated[0]).endswith(CLASSIFIER)


def outline(folder: Path) -> None:
    """Trace as few layers of a folder's config.json as there are kinds; raises Refused with what stands in the way."""
    with tempfile.TemporaryDirectory(prefix=".traced-", dir=folder) as work:
        _follow("fp32", folder, Path(work), SHORTENED)


def _follow(dtype: str, source: Path, work: Path, *words: str) -> Mapping[str, Any]:
    """Leave the graph of a folder's config.json, without weights, in `work`; what is known of it."""
    found = subprocess.run(
        [sys.executable, "-P", "-m", TRACING, str(source), str(work), dtype, *words],
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
    facts: Mapping[str, Any] = json.loads((work / FACTS_NAME).read_text(encoding="utf-8"))
    return facts
