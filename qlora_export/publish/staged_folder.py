"""What lies ready to be uploaded: one folder, the files that may leave it, and the artifacts they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.artifact import Artifact


@dataclass(frozen=True)
class Staged:
    """A repository as it will be, laid out in a local folder.

    `files` is the allow-list: path in the repository to `{"bytes", "sha256"}`; nothing else is uploaded. `artifacts`
    maps a prefix, `""` or `onnx-int4/`, to the artifact whose files lie there.
    """

    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    artifacts: Mapping[str, Artifact]
