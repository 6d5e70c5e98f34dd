"""What the headers show to be wrong, before anything is written: every problem, not the first one."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TypeVar

from qlora_export import catalog
from qlora_export.contracts import TrainingQuantization
from qlora_export.errors import ExitCode, ExportError, Problem
from qlora_export.recipe import Recipe
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.tensors.dtypes import FLOATS

SECTOR_BYTES = 512
Source = TypeVar("Source")


def opened(opener: Callable[[Path], Source], folder: Path) -> Source | Problem:
    """What the opener opens, or the problem that keeps it from opening."""
    try:
        return opener(folder)
    except ExportError as error:
        return Problem.of(error)


def base_problems(checkpoint: Checkpoint) -> list[Problem]:
    """A base that cannot be merged onto."""
    sections = {"config.json": checkpoint.config, **checkpoint.config}
    stored = {
        name: section["quantization_config"]
        for name, section in sections.items()
        if isinstance(section, dict) and section.get("quantization_config")
    }
    problems = [
        Problem(
            ExitCode.REFUSED,
            f"{checkpoint.folder}: the base is stored in "
            f"{how.get('quant_method', 'an unnamed method') if isinstance(how, dict) else how} ({name}), "
            "which cannot be merged onto yet",
            "give the 16-bit base",
        )
        for name, how in stored.items()
    ]
    odd = [tensor for tensor in checkpoint.tensors.values() if tensor.spec.dtype[0] == "F"]
    return problems + [
        Problem(
            ExitCode.REFUSED,
            f"{tensor.path}: tensor {tensor.spec.name} has dtype {tensor.spec.dtype}",
            "only 16 and 32-bit floats can be merged yet",
        )
        for tensor in odd
        if tensor.spec.dtype not in FLOATS
    ]


def training_problems(adapter: Adapter, checkpoint: Checkpoint) -> list[Problem]:
    """A base that is not the one of the sidecar, or a training that cannot be reproduced."""
    training = adapter.training
    problems = []
    if training.quant_type != "nf4":
        problems.append(
            Problem(
                ExitCode.REFUSED,
                f"{adapter.folder}: the base was trained on as {training.quant_type}, which cannot be reproduced yet",
                "this version reproduces nf4",
            )
        )
    if training.base_sha256 not in (None, checkpoint.headers_sha256):
        problems.append(
            Problem(
                ExitCode.BAD_INPUT,
                f"{checkpoint.folder}: names, shapes and dtypes have sha256 {checkpoint.headers_sha256[:12]}, "
                f"the adapter was trained on {str(training.base_sha256)[:12]}",
                "give the base that the adapter was trained on",
            )
        )
    missing = [name for name in training.modules if f"{name}.weight" not in checkpoint.tensors]
    if missing:
        problems.append(
            Problem(
                ExitCode.BAD_INPUT,
                f"{checkpoint.folder}: {len(missing)} modules quantised in training are not in the base, "
                f"the first is {missing[0]}",
                "give the base that the adapter was trained on",
            )
        )
    return problems


def place_problems(out: Path, sources: list[Path]) -> list[Problem]:
    """Sources are never written to, so the run folder may not be or lie in one."""
    place = out.absolute().resolve()
    return [
        Problem(ExitCode.USAGE, f"{out}: lies in the source {source}", "choose another --out")
        for source in sources
        if source.resolve() in (place, *place.parents)
    ]


def artifact_problems(recipe: Recipe, training: TrainingQuantization, quantised: AbstractSet[str]) -> list[Problem]:
    """What an artifact is told that its format cannot do."""
    problems = []
    for artifact in recipe.artifacts:
        if artifact.format in catalog.EXPORTERS:
            if artifact.keep:
                problems.append((artifact, f"{artifact.format} is exported whole, nothing can be kept dense"))
            continue
        form = catalog.load_format(artifact.format, training)
        if artifact.options:
            problems.append((artifact, f"{artifact.format} has no options"))
        unmatched = [pattern for pattern in artifact.keep if not fnmatch.filter(quantised, pattern)]
        problems += [(artifact, f"keep {pattern!r} matches no quantised module") for pattern in unmatched]
        if artifact.keep and not form.quantises:
            problems.append((artifact, f"{artifact.format} quantises nothing, so there is nothing to keep"))
        if form.keeps_adapter and not recipe.adapter:
            problems.append((artifact, f"{artifact.format} ships an adapter, the recipe has none"))
        if not recipe.adapter and artifact.onto == "as-trained":
            problems.append((artifact, "there is no training without an adapter"))
        if form.keeps_adapter and (artifact.keep or artifact.onto == "original"):
            problems.append((artifact, f"{artifact.format} ships the base of training as it was"))
    return [
        Problem(
            ExitCode.USAGE, f"artifact {artifact.name}: {message}", "see `keep`, `onto` and `options` of this artifact"
        )
        for artifact, message in problems
    ]


def allocated_bytes(folder: Path) -> int:
    """Disk space that the files below a folder hold; 0 when there is none."""
    return sum(path.lstat().st_blocks * SECTOR_BYTES for path in folder.rglob("*"))


def disk_problems(out: Path, sizes: Mapping[str, int]) -> list[Problem]:
    """A problem when the artifacts that are not finished yet, by name and bytes, do not fit the disk."""
    needed = 0
    for name, size in sizes.items():
        if not (out / name).exists():
            needed += max(0, size - allocated_bytes(out / f"{name}.partial"))
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed <= free:
        return []
    message = f"{out}: the artifacts need {needed} bytes, the disk has {free} free"
    return [Problem(ExitCode.ENVIRONMENT, message, "free some disk space or choose another --out")]
