"""The runtime `gguf`: a GGUF file decoded to float32 by the gguf package, run by transformers on its own architecture.

What llama.cpp multiplies with are these very weights; it also rounds activations to 8 bits on the way, which is not
measured here. transformers knows the architectures that it can read this way and refuses the others.
Memory: the decoded model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers

from qlora_export.errors import EnvironmentProblem
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.loading import placed, quietly_loading, require_stored
from qlora_export.runtimes.session import ModelSession


class GgufRuntime:
    """Opens a GGUF file."""

    name = "gguf"

    @contextmanager
    def open(self, folder: Path, device: str = "cpu") -> Iterator[Session]:
        """Decode the file onto a device; raises InputError when it does not load."""
        if find_spec("gguf") is None:
            raise EnvironmentProblem("the gguf package is not installed", "pip install 'qlora-export[gguf]'")
        yield ModelSession(placed(_load(folder), device))


def _load(path: Path) -> Any:
    options = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    with quietly_loading(path), redirect_stderr(StringIO()):
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    require_stored(path, model, loaded)
    return model.eval()
