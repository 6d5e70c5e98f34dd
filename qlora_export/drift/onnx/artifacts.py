"""Artifacts whose runtime is ONNX Runtime, validated against what their manifest says that they were made from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qlora_export.artifact import MANIFEST_NAME, Artifact, read_artifact
from qlora_export.drift.onnx.validation import Source, validate
from qlora_export.drift.onnx.variants import GraphFindings
from qlora_export.drift.tokens import TokenSet
from qlora_export.runtimes.onnx.folder import open_graph
from qlora_export.runtimes.registry import load_runtime
from qlora_export.sources.checkpoint import read_json
from qlora_export.types import Track

RUNTIME = "onnxruntime"
TORCH_RUNTIME = "transformers"
# Where an exporter of integers leaves the output head as its source has it.
FLOAT_HEAD = "float32"


def validated(artifact: Artifact, tokens: TokenSet, track: Track, model: Path | None = None) -> GraphFindings | None:
    """What running its graph in every way comes to; None for an artifact of another runtime.

    `model` is the dense folder that a folder without a manifest should be.
    """
    if artifact.runtime != RUNTIME:
        return None
    source = source_of(artifact)
    if source is None and model is not None and not artifact.manifest_sha256:
        source = _source("the model", model, False)
    with track(f"validate {artifact.name}"):
        return validate(artifact.path, tokens, source)


def look_over(artifact: Artifact) -> None:
    """Raise at once, for an artifact of ONNX Runtime, what opening it would raise after everything else is measured."""
    if artifact.runtime == RUNTIME:
        open_graph(artifact.path)


def source_of(artifact: Artifact) -> Source | None:
    """The artifact that it was made from, where that still lies beside it and torch opens it."""
    made_from = artifact.manifest.get("sources", {}).get("artifact")
    folder = artifact.path.parent / str(made_from["name"]) if made_from else None
    if folder is None or not (folder / MANIFEST_NAME).is_file():
        return None
    found = read_artifact(folder)
    same = found.manifest_sha256 == made_from["manifest_sha256"]
    if not same or found.runtime != TORCH_RUNTIME:
        return None
    options = artifact.manifest.get("exporter", {}).get("options", {})
    rounded_head = options.get("last_matrix", FLOAT_HEAD) != FLOAT_HEAD
    quantised = bool(read_json(folder / "config.json").get("quantization_config"))
    return _source(found.name, folder, quantised and not rounded_head)


def _source(name: str, folder: Path, same_integers: bool) -> Source:
    return Source(name, partial(load_runtime(TORCH_RUNTIME).open, folder), same_integers)
