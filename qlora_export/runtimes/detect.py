"""Which runtime opens a folder that no manifest of ours describes, and what is stored in it.

adapter_config.json         a PEFT adapter: as-trained, on the base it was trained on
genai_config.json           ONNX Runtime GenAI's layout: onnxruntime
config.json                 a model of transformers, or a sequence classifier's graph beside it: onnxruntime
a file *.gguf               gguf
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_export.artifact import MANIFEST_NAME, Artifact, read_artifact
from qlora_export.errors import InputError, UsageError
from qlora_export.recipe.config import FOLDER_NAME
from qlora_export.runtimes.onnx.described import classifier_of

ADAPTER_CONFIG, GENAI_CONFIG, CONFIG = "adapter_config.json", "genai_config.json", "config.json"
GGUF = ".gguf"
HINT = "give a folder of transformers, of ONNX Runtime GenAI, of a PEFT adapter, an artifact of ours, or a GGUF file"


def detect_artifact(path: Path) -> Artifact:
    """The folder as an artifact: by our manifest where it has one, else by its files; raises InputError for others."""
    if path.suffix == GGUF and path.is_file():
        facts = {"runtime": "gguf", "files": {path.name: {"bytes": path.stat().st_size}}}
        return Artifact(artifact_name(path), "gguf", path, facts, "")
    if not path.is_dir():
        raise InputError(f"{path}: no such folder", HINT)
    if (path / MANIFEST_NAME).is_file():
        return _ours(path)
    runtime, form = _runtime_and_format(path)
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    files = {name: {"bytes": size} for name, size in sorted(sizes.items())}
    return Artifact(artifact_name(path), form, path, {"runtime": runtime, "files": files}, "")


def artifact_name(path: Path) -> str:
    """A folder's own name, where it can be one in a report."""
    name = path.resolve().name
    return name if FOLDER_NAME.fullmatch(name) else "artifact"


def _ours(path: Path) -> Artifact:
    try:
        return read_artifact(path)
    except UsageError as error:
        raise InputError(error.message, "move that file away, and the folder is measured by its other files") from None


def _runtime_and_format(path: Path) -> tuple[str, str]:
    if (path / ADAPTER_CONFIG).is_file():
        return "as-trained", str(_json(path / ADAPTER_CONFIG).get("peft_type", "adapter")).lower()
    if (path / GENAI_CONFIG).is_file():
        return "onnxruntime", "onnx"
    if (path / CONFIG).is_file():
        config = _json(path / CONFIG)
        if classifier_of(path) is not None:
            return "onnxruntime", "onnx"
        stated = config.get("quantization_config") or {}
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        return "transformers", str(method or config.get("dtype") or config.get("torch_dtype") or "float32")
    if found := sorted(path.glob(f"*{GGUF}")):
        raise InputError(f"{path}: a folder of {len(found)} GGUF files", f"name one of them, such as {found[0]}")
    raise InputError(f"{path}: neither {CONFIG}, nor {GENAI_CONFIG}, nor {ADAPTER_CONFIG} is in it", HINT)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}", HINT) from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: no JSON object", HINT)
    return found
