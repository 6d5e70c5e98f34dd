"""What travels with the weights: tokenizer, templates, licences byte for byte, and config.json edited as JSON.

Tokenizer files come from the adapter folder where it has them, else from the base: re-serialising them loses chat
templates and added tokens. config.json keeps every key it has; only the dtype, the quantisation and stale traces of
where it was saved change.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.formats.base import CorrectedFormat, Format
from qlora_export.sources.adapter import CONFIG_NAME, SHARD_INDEX_NAME, Adapter
from qlora_export.sources.checkpoint import Checkpoint, require_contained
from qlora_export.sources.sidecar import SIDECAR_NAME
from qlora_export.types import TORCH_NAMES

TOKENIZER_NAME = re.compile(
    r"tokenizer.*\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|.*\.tiktoken|spiece\.model|sentencepiece.*\.model|chat_template\.(jinja|json)"
)
COMPANION_NAME = re.compile(
    r"generation_config\.json|(pre)?processor_config\.json|video_preprocessor_config\.json"
    r"|(LICEN[CS]E|NOTICE|USE_POLICY)(\.(md|txt))?"
)
ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/{CONFIG_NAME}"
STALE_KEYS = ("quantization_config", "_name_or_path", "auto_map", "_commit_hash")


@dataclass(frozen=True)
class CompanionFile:
    """A file of the artifact that is no weight file of ours: its relative name, and a source path or its content."""

    name: str
    source: Path | None = None
    content: bytes = b""

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.source.stat().st_size if self.source else len(self.content)

    def sha256(self) -> str:
        """Digest of the content."""
        if self.source is None:
            return hashlib.sha256(self.content).hexdigest()
        with self.source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def companion_files(
    checkpoint: Checkpoint, adapter: Adapter | None, form: Format, config: bytes
) -> tuple[CompanionFile, ...]:
    """All files beside the weights, sorted by name."""
    files = {"config.json": CompanionFile("config.json", content=config)}
    for path in checkpoint.folder.iterdir():
        if TOKENIZER_NAME.fullmatch(path.name) or COMPANION_NAME.fullmatch(path.name):
            files[path.name] = CompanionFile(path.name, require_contained(path))
    for path in adapter.folder.iterdir() if adapter else ():
        if TOKENIZER_NAME.fullmatch(path.name):
            files[path.name] = CompanionFile(path.name, require_contained(path))
    if adapter and form.keeps_adapter:
        for file in _kept_adapter(adapter):
            files[file.name] = file
    if isinstance(form, CorrectedFormat):
        settings = json.dumps(form.adapter_config(), indent=2).encode() + b"\n"
        files[ADAPTER_CONFIG] = CompanionFile(ADAPTER_CONFIG, content=settings)
    return tuple(files[name] for name in sorted(files))


def beside_sha256(folder: Path) -> dict[str, str]:
    """Digests of what travels beside the weights of a folder: tokenizer, licence, sidecar."""
    return {
        path.name: CompanionFile(path.name, path).sha256()
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (TOKENIZER_NAME.fullmatch(path.name) or COMPANION_NAME.fullmatch(path.name) or path.name == SIDECAR_NAME)
    }


def differing_tokenizer_files(checkpoint: Checkpoint, adapter: Adapter) -> list[str]:
    """Tokenizer files that adapter and base both have, with other bytes."""
    names = (path.name for path in adapter.folder.iterdir() if TOKENIZER_NAME.fullmatch(path.name))
    return sorted(
        name
        for name in names
        if (checkpoint.folder / name).is_file()
        and (checkpoint.folder / name).read_bytes() != require_contained(adapter.folder / name).read_bytes()
    )


def edited_config(config: Mapping[str, Any], form: Format, kept: tuple[str, ...], settings: Mapping[str, Any]) -> bytes:
    """config.json of an artifact, as bytes; `settings` are keys that changed with the weights."""
    edited = merged_config(config, TORCH_NAMES[form.dense_dtype], settings)
    if quantization := form.quantization_config(kept):
        edited["quantization_config"] = quantization
    return json.dumps(edited, indent=2, ensure_ascii=False).encode() + b"\n"


def merged_config(config: Mapping[str, Any], dtype: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the merged model in a dtype that torch has a name for, without quantisation."""
    edited = _cleaned(config, dtype)
    if not {"dtype", "torch_dtype"} & edited.keys():
        edited["dtype"] = dtype
    text = edited["text_config"] if isinstance(edited.get("text_config"), dict) else edited
    for key, value in settings.items():
        place = text if key == "vocab_size" and key not in edited else edited
        place[key] = value
        if key in text:
            text[key] = value
    return edited


def _cleaned(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config and its sub-configs without stale keys: where it was saved, how it was quantised, whose code it ran."""
    cleaned = {
        key: _cleaned(value, dtype) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in STALE_KEYS
    }
    for key in ("dtype", "torch_dtype"):
        if key in cleaned:
            cleaned[key] = dtype
    return cleaned


def _kept_adapter(adapter: Adapter) -> list[CompanionFile]:
    """The adapter as it is, but for the path of its base, which is now the folder above."""
    config = {**adapter.config, "base_model_name_or_path": ".."}
    files = [
        CompanionFile(ADAPTER_CONFIG, content=json.dumps(config, indent=2).encode() + b"\n"),
        *(CompanionFile(f"{ADAPTER_FOLDER}/{path.name}", path) for path in adapter.files),
    ]
    if (index := adapter.folder / SHARD_INDEX_NAME).exists() and len(adapter.files) > 1:
        files.append(CompanionFile(f"{ADAPTER_FOLDER}/{SHARD_INDEX_NAME}", index))
    if adapter.training.recorded:
        files.append(CompanionFile(f"{ADAPTER_FOLDER}/{SIDECAR_NAME}", adapter.folder / SIDECAR_NAME))
    return files
