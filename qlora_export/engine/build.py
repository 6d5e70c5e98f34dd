"""Build all artifacts of a plan in one pass over the base.

    OUT/NAME.partial/  files at full size, written in any order, .journal   ->   OUT/NAME/  with manifest.json

Nothing final is on the disk before everything is right: data and manifest are synced, then the folder is renamed. A
killed run leaves NAME.partial, which the next run of the same plan completes to the same bytes. A finished folder of
the same plan is verified and kept. Cost: the base is read once from the disk and again from the page cache, for the
digest of the file and for the absmax of the tensor.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from qlora_export.artifact import Artifact, read_artifact, require_same_sources, verify_artifact
from qlora_export.engine.build_pass import run_pass
from qlora_export.engine.journal import JOURNAL_NAME
from qlora_export.engine.options import BuildOptions
from qlora_export.engine.partial_folder import PartialFolder
from qlora_export.engine.ray.cluster import require_ray
from qlora_export.engine.source_digests import SourceDigests
from qlora_export.errors import UsageError
from qlora_export.planning.memory import workers_within
from qlora_export.planning.plan import ArtifactPlan, Plan
from qlora_export.quant.device.accelerator import Accelerator
from qlora_export.tensors.reading import SourceFiles
from qlora_export.tensors.writing import disk_full


def build(plan: Plan, out: Path, options: BuildOptions) -> list[Artifact]:
    """Build what is missing and verify what is there; the artifacts in the recipe's order."""
    require_accelerator(options)
    options = within_memory(plan, options)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file", "--out names a folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        finished = {item.name: finished_artifact(item, out) for item in plan.artifacts}
        kept = [artifact for artifact in finished.values() if artifact is not None]
        missing = [item for item in plan.artifacts if finished[item.name] is None]
        digests = SourceDigests(plan.checkpoint.files)
        if missing:
            with disk_errors(out, sum(item.bytes for item in missing)):
                _build_missing(plan, missing, kept, out, options, digests)
        else:
            digests.hash_all([path.name for path in digests.paths], options.threads)
            require_same_sources(kept, digests.facts)
        return [finished[item.name] or read_artifact(out / item.name) for item in plan.artifacts]


def require_accelerator(options: BuildOptions) -> None:
    """Raise where the accelerator is not there, or what else is asked of the build does not go with it."""
    if options.accelerator is None:
        return
    if options.engine != "threads":
        hint = "workers on a cluster compute on their processors"
        raise UsageError(f"--device {options.accelerator} and --engine {options.engine}", hint)
    if options.memory_limit_bytes is not None:
        hint = "what the device's driver maps cannot be known beforehand"
        raise UsageError(f"--device {options.accelerator} and --memory-limit", hint)
    Accelerator(options.accelerator)


def within_memory(plan: Plan, options: BuildOptions) -> BuildOptions:
    """As many threads as the limit of memory allows; on a cluster it is a limit for each process."""
    if options.engine == "ray":
        require_ray()
        workers_within(plan, 1, options.memory_limit_bytes)
        return options
    return replace(options, workers=workers_within(plan, options.workers, options.memory_limit_bytes))


def _build_missing(
    plan: Plan,
    missing: Sequence[ArtifactPlan],
    kept: Sequence[Artifact],
    out: Path,
    options: BuildOptions,
    digests: SourceDigests,
) -> None:
    with ExitStack() as stack:
        files = stack.enter_context(SourceFiles())
        folders = []
        for item in missing:
            folders.append(PartialFolder(item, out))
            stack.callback(folders[-1].writer.close)
        _restart_unless_same_sources(folders, digests, options.threads)
        run_pass(plan, folders, options, digests, files)
        require_same_sources(kept, digests.facts)
        for folder in folders:
            folder.finish(plan, digests.sorted())


def _restart_unless_same_sources(folders: Sequence[PartialFolder], digests: SourceDigests, workers: int) -> None:
    """Trust what a killed run left only while the base still holds the bytes it was made from."""
    digests.hash_all([name for folder in folders for name in folder.journal.sources], workers)
    for folder in folders:
        if any(digests.facts[name]["sha256"] != sha256 for name, sha256 in folder.journal.sources.items()):
            folder.journal.restart()


def finished_artifact(item: ArtifactPlan, out: Path) -> Artifact | None:
    """The verified artifact of this plan when its folder is there; raises when the folder is anything else."""
    folder = out / item.name
    if not os.path.lexists(folder):
        return None
    artifact = read_artifact(folder)
    if artifact.manifest["plan_digest"] != item.digest:
        raise UsageError(
            f"{folder}: an artifact of another plan "
            f"({str(artifact.manifest['plan_digest'])[:12]}, this one is {item.digest[:12]})",
            "choose another --out, or remove the folder to build it again",
        )
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    verify_artifact(artifact, item.files)
    return replace(artifact, reused=True)


@contextmanager
def disk_errors(out: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk into its own error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(out, needed_bytes) from None
        raise


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the same folder."""
    descriptor = os.open(out, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"{out}: another run is at work here", "wait for it, or choose another --out") from None
    finally:
        os.close(descriptor)
