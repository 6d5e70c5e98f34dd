"""ONNX for ONNX Runtime and ONNX Runtime GenAI, made by the GenAI model builder from a dense folder.

On disk: `model.onnx`, `model.onnx.data` (the name is written into the graph: never rename it), `genai_config.json`, and
the source's tokenizer files, byte for byte: the builder rewrites them. The builder runs as a process of its own, since
it can crash and reads its options from a command line; nothing is fetched and no remote code runs.
`onnx-int4`: MatMulNBits, round-to-nearest in blocks of 32 with the last matrix in int8; embeddings stay float32.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from qlora_export.contracts import Options, Takes
from qlora_export.errors import EnvironmentProblem, Refused, UsageError

BUILDER = "onnxruntime_genai.models.builder"
PACKAGES = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir")
BLOCK_SIZES = (16, 32, 64, 128, 256)
ALGORITHMS = ("default", "rtn", "k_quant")
UNSUPPORTED = "is not currently supported"


@dataclass(frozen=True)
class Int4Options:
    """What decides the integers: values in a block, rounding, dtype of the last matrix, accuracy of activations.

    `accuracy_level` 4 rounds activations to int8 (the builder's default on a CPU), 1 keeps float32.
    """

    block_size: int = 32
    algorithm: str = "default"
    last_matrix: str = "int8"
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        _require("block_size", self.block_size, BLOCK_SIZES)
        _require("algorithm", self.algorithm, ALGORITHMS)
        _require("last_matrix", self.last_matrix, ("int4", "int8"))
        _require("accuracy_level", self.accuracy_level, (1, 2, 3, 4))

    def arguments(self) -> list[str]:
        """The builder's key=value words."""
        # The builder shares a tied embedding with the last matrix, and loses it when that one is int8 (0.18.0).
        shared = ["shared_embeddings=false"] if self.last_matrix == "int8" else []
        return [
            *shared,
            f"block_size={self.block_size}",
            f"algo_config={self.algorithm}",
            f"accuracy_level={self.accuracy_level}",
            f"matmul_mixed_precision=last_matmul:{self.last_matrix}",
        ]


@dataclass(frozen=True)
class OnnxExporter:
    """Runs the builder with one precision."""

    name: str
    precision: str
    bytes_per_weight: float
    options: Int4Options | None = None
    takes: Takes = "dense"
    runtime: str = "onnxruntime"

    def facts(self) -> Mapping[str, Any]:
        """Versions and options that decide the bytes; raises EnvironmentProblem when the builder is not installed."""
        try:
            versions = {package: version(package) for package in PACKAGES}
        except PackageNotFoundError as error:
            raise EnvironmentProblem(
                f"{self.name} needs {error.name}, which is not installed", "pip install 'qlora-export[onnx]'"
            ) from None
        return {"versions": versions, "options": asdict(self.options) if self.options else {}}

    def export(self, source: Path, destination: Path) -> None:
        """Fill `destination`; raises Refused for an architecture that the builder lacks, else EnvironmentProblem."""
        destination.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cache-", dir=destination) as cache:
            words = [sys.executable, "-P", "-m", BUILDER, "-i", str(source), "-o", str(destination)]
            words += ["-p", self.precision, "-e", "cpu", "-c", cache]
            if self.options is not None:
                words += ["--extra_options", *self.options.arguments()]
            # The builder writes the git commit it finds around itself into the graph: let it find none.
            quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "GIT_DIR": os.devnull}
            # The run folder's lock is inherited, so that a builder that outlives us still holds it.
            found = subprocess.run(
                words,
                check=False,
                env={**os.environ, **quiet},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                close_fds=False,
            )
        if found.returncode:
            raise self._failure(found.returncode, found.stderr)
        for name in ("model.onnx", "genai_config.json"):
            if not (destination / name).is_file():
                raise EnvironmentProblem(f"{self.name}: the model builder ended well but left no {name}")

    def _failure(self, code: int, stderr: str) -> Exception:
        last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "no message")
        if "No space left on device" in stderr:
            return EnvironmentProblem(f"{self.name}: the disk is full", "free some disk space, then run again")
        if UNSUPPORTED in last:
            return Refused(f"{self.name}: {last}", "choose a safetensors format for this architecture")
        if code < 0:
            return EnvironmentProblem(
                f"{self.name}: the model builder was killed by {signal.Signals(-code).name}",
                "it needs about 8 bytes of memory a weight; run again with more",
            )
        return EnvironmentProblem(f"{self.name}: the model builder failed: {last}", "see whether the bf16 folder loads")


def int4(options: Options) -> OnnxExporter:
    """4-bit integers with float32 activations, rounded to int8 inside the matrix products."""
    known = {field.name for field in fields(Int4Options)}
    if unknown := sorted(set(options) - known):
        raise UsageError(f"onnx-int4 has no option {unknown[0]!r}", f"its options: {', '.join(sorted(known))}")
    return OnnxExporter("onnx-int4", "int4", 0.8, Int4Options(**cast(dict[str, Any], options)))


def fp32(options: Options) -> OnnxExporter:
    """Float32 weights and activations."""
    if options:
        raise UsageError(f"onnx-fp32 has no option {next(iter(options))!r}", "it has none")
    return OnnxExporter("onnx-fp32", "fp32", 4.1)


def _require(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise UsageError(f"onnx-int4: {name} is {value!r}", f"choose one of {', '.join(map(str, known))}")
