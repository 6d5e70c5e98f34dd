"""Builds each case with the model builder as it is, then with weights kept in files, a few rows at a time.

    python -m tests.exporters.both_builders CASES FOLDER     CASES: JSON, a list of [base, precision, provider, words]

In the second round what would hold a whole matrix raises.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

import onnx_ir
import safetensors
from transformers import modeling_utils

from qlora_export.exporters.onnx import builder_process, mapped_weights, rounded_products, streamed_tensors

FEW_VALUES = 1000


def main() -> None:
    """Fill FOLDER/plain/0 ... and FOLDER/ours/0 ..."""
    cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    build(cases, folder / "plain")
    streamed_tensors.CHUNK_VALUES = rounded_products.CHUNK_VALUES = FEW_VALUES
    for module in (modeling_utils, mapped_weights):
        setattr(module, "safe_open", Uncopied)  # noqa: B010
    for method in ("tobytes", "tofile"):
        setattr(onnx_ir.LazyTensor, method, guarded)
    builder_process.keep_in_files(folder)
    build(cases, folder / "ours")


def build(cases: list[Any], folder: Path) -> None:
    for number, (base, precision, provider, words) in enumerate(cases):
        out = folder / str(number)
        sys.argv = ["builder", "-i", base, "-o", str(out), "-p", precision, "-e", provider, "-c", str(out / "cache")]
        sys.argv += ["--extra_options", *words] if words else []
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            runpy.run_module(builder_process.BUILDER, run_name="__main__", alter_sys=True)


def guarded(tensor: Any, *words: Any) -> Any:
    if len(tensor.shape) > 1:
        raise AssertionError(f"{tensor.name} is held whole")
    raw = tensor.numpy().tobytes()
    return words[0].write(raw) if words else raw


class Uncopied:
    """A safetensors file of which nothing is copied."""

    def __init__(self, *words: Any, **options: Any) -> None:
        self._file: Any = safetensors.safe_open(*words, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> NoReturn:
        raise AssertionError(f"{name} is copied")


main()
