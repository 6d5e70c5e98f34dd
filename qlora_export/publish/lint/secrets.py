"""Tokens and keys in what is about to be published: every file but the weights themselves.

Of a safetensors file the header is searched, whose metadata is free text; of an ONNX graph everything; raw weights
beside a graph are not. Files are mapped, so a large one takes no memory. A finding names file, line and kind.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from qlora_export.errors import Problem
from qlora_export.publish.lint.contents import Contents
from qlora_export.publish.lint.rules import finding
from qlora_export.publish.redaction import SecretFound, find_secrets
from qlora_export.tensors.header import HEADER_LIMIT_BYTES

RAW_WEIGHTS = (".onnx.data", ".onnx_data")
REVOKE = "revoke it at its issuer, then remove it from the file"


def secret_problems(contents: Contents) -> Iterator[Problem]:
    """One finding for each kind of secret in each file."""
    for name in sorted(contents.names):
        if not name.endswith(RAW_WEIGHTS):
            for found in _search(contents.path(name)):
                yield finding("secret", name, f"line {found.line} holds what looks like {found.what}", REVOKE)


def _search(path: Path) -> list[SecretFound]:
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            return list(find_secrets(file.read(min(header_bytes, HEADER_LIMIT_BYTES))))
    if path.stat().st_size == 0:
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return list(find_secrets(content))
