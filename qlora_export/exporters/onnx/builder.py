"""The GenAI model builder, which makes the graphs: a process of its own, since it can crash and reads a command line.

Nothing is fetched and no remote code runs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from qlora_export.errors import EnvironmentProblem, ExportError, Refused

BUILDER = "qlora_export.exporters.onnx.builder_process"
# What is used here appeared in these versions.
OLDEST = {
    "onnxruntime-genai": (0, 18),
    "onnxruntime": (1, 23),
    "onnx": (1, 21),
    "onnx-ir": (0, 1),
    "onnxscript": (0, 7),
}
# Of memory beside the codes of the largest matrix, measured (docs/onnx.md).
MEMORY_GB = 1
UNSUPPORTED = "is not currently supported"
ARCHITECTURE = re.compile(r"config\.architectures\[0\] == \"(\w+)\"")
INSTALL = "pip install -U 'qlora-export[onnx]'"


@dataclass(frozen=True)
class Order:
    """What the builder is to make: precision, execution provider, and extra options as key=value words."""

    precision: str
    provider: str = "cpu"
    extra: tuple[str, ...] = ()


def require_packages(name: str) -> Mapping[str, str]:
    """The versions of what decides the bytes; raises EnvironmentProblem where one is missing or too old."""
    found = {}
    for package, oldest in OLDEST.items():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            raise EnvironmentProblem(f"{name} needs {package}, which is not installed", INSTALL) from None
        if _numbers(found[package]) < oldest:
            wanted = ".".join(map(str, oldest))
            raise EnvironmentProblem(
                f"{name} needs {package} {wanted} or newer, {found[package]} is installed", INSTALL
            )
    return found


def known_architectures() -> frozenset[str]:
    """The architectures that the installed builder names; empty where its source says nothing of the kind."""
    try:
        path = distribution("onnxruntime-genai").locate_file("onnxruntime_genai/models/builder.py")
        return frozenset(ARCHITECTURE.findall(Path(str(path)).read_text(encoding="utf-8")))
    except (PackageNotFoundError, OSError):
        return frozenset()


def run_builder(name: str, order: Order, source: Path, destination: Path) -> None:
    """Fill `destination` from a dense folder; raises Refused for an architecture it lacks, else EnvironmentProblem."""
    destination.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=destination) as cache:
        words = [sys.executable, "-P", "-m", BUILDER, "-i", str(source), "-o", str(destination)]
        words += ["-p", order.precision, "-e", order.provider, "-c", cache]
        if order.extra:
            words += ["--extra_options", *order.extra]
        code, errors = _run(words)
    if code:
        raise _failure(name, code, errors)
    for file in ("model.onnx", "genai_config.json"):
        if not (destination / file).is_file():
            raise EnvironmentProblem(f"{name}: the model builder ended well but left no {file}")


def _run(words: Sequence[str]) -> tuple[int, str]:
    """Exit code and stderr."""
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
    return found.returncode, found.stderr


def _failure(name: str, code: int, stderr: str) -> ExportError:
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "no message")
    if "No space left on device" in stderr:
        return EnvironmentProblem(f"{name}: the disk is full", "free some disk space, then run again")
    if UNSUPPORTED in last:
        return Refused(f"{name}: {last}", "choose a safetensors format for this architecture")
    if code < 0:
        return EnvironmentProblem(
            f"{name}: the model builder was killed by {signal.Signals(-code).name}",
            f"it needs {MEMORY_GB} GB of memory and a byte for each weight of the largest matrix; run again with more",
        )
    return EnvironmentProblem(f"{name}: the model builder failed: {last}", "see whether the bf16 folder loads")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
