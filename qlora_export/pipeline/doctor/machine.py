"""What the machine has: disk, memory and threads as far as this process may use them, a device, a cache to write to.

Of memory see `device/available_memory.py`; a container's share of processors stands in its cgroup's `cpu.max`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_export.pipeline.doctor.checks import Check
from qlora_export.quant.device.available_memory import CGROUP, MEMINFO, container_bytes, machine_bytes, text_of

LEAST_DISK_BYTES = 5_000_000_000
LEAST_MEMORY_BYTES = 2_000_000_000
QUERY_SECONDS = 20


@dataclass(frozen=True)
class Needs:
    """What a run is going to take; None where nobody knows yet."""

    disk_bytes: int | None = None
    memory_bytes: int | None = None


def machine_checks(out: Path, needs: Needs) -> list[Check]:
    """Disk, memory, threads, device and cache."""
    return [disk_check(out, needs), memory_check(needs), threads_check(), device_check(), cache_check()]


def disk_check(out: Path, needs: Needs) -> Check:
    """Free space where the run folder is going to be, and whether it can be written to."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    fix = "free some space, or choose another --out"
    if not _can_write(place):
        return Check("disk", "fail", f"{place} cannot be written to", "choose another --out")
    free = shutil.disk_usage(place).free
    if needs.disk_bytes is not None:
        value = f"{gigabytes(free)} free at {place}, the release takes {gigabytes(needs.disk_bytes)}"
        return Check("disk", "ok", value) if free >= needs.disk_bytes else Check("disk", "fail", value, fix)
    value = f"{gigabytes(free)} free at {place}"
    return Check("disk", "ok", value) if free >= LEAST_DISK_BYTES else Check("disk", "warn", value, fix)


def memory_check(needs: Needs, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> Check:
    """Memory that this process may still take, the container's limit included."""
    machine, container = machine_bytes(meminfo), container_bytes(cgroup)
    known = [number for number in (machine, container) if number is not None]
    if not known:
        return Check("memory", "warn", "unknown on this system", "")
    usable = min(known)
    value = f"{gigabytes(usable)} available" + (", the container's limit" if usable == container else "")
    if needs.memory_bytes is not None:
        value = f"{value}, the build takes about {gigabytes(needs.memory_bytes)}"
        return (
            Check("memory", "ok", value)
            if usable >= needs.memory_bytes
            else Check("memory", "fail", value, "fewer --workers take less; or a machine with more memory")
        )
    fix = "small models only; give a RECIPE to compare with what it takes"
    return Check("memory", "ok", value) if usable >= LEAST_MEMORY_BYTES else Check("memory", "warn", value, fix)


def threads_check(cgroup: Path = CGROUP) -> Check:
    """Threads that --workers takes by default, against the container's share of processors."""
    threads = usable_threads()
    quota = _processors(cgroup)
    if quota is not None and quota < threads:
        fix = f"--workers {max(1, int(quota))}"
        return Check("threads", "warn", f"{threads}, but the container may use {quota:.1f} processors", fix)
    return Check("threads", "ok", str(threads))


def usable_threads() -> int:
    """Threads that may run at once, as the scheduler tells this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_check() -> Check:
    """A CUDA device, and whether torch could use it; nothing needs one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Check("device", "ok", "no CUDA device; nothing needs one")
    words = [program, "--query-gpu=name,memory.free", "--format=csv,noheader"]
    try:
        answer = subprocess.run(words, check=False, capture_output=True, text=True, timeout=QUERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("device", "warn", f"nvidia-smi: {error}", "the driver does not answer; nothing needs it")
    devices = "; ".join(line.strip() for line in answer.stdout.splitlines() if line.strip())
    if answer.returncode or not devices:
        return Check(
            "device", "warn", "nvidia-smi finds no device", "the driver is there without one; nothing needs it"
        )
    if _torch_build() == "cpu":
        return Check("device", "warn", f"{devices} free, but torch is built for the CPU", "install torch with CUDA")
    return Check("device", "ok", f"{devices} free")


def cache_check() -> Check:
    """Whether the Hub's cache can be written to: downloads and read-backs go there."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    named = os.environ.get("HF_HUB_CACHE")
    cache = Path(named).expanduser() if named else home / "hub"
    place = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.exists())
    if _can_write(place):
        return Check("cache", "ok", f"{cache}, {gigabytes(shutil.disk_usage(place).free)} free")
    return Check("cache", "fail", f"{cache} cannot be written to", "set HF_HOME to a folder that can be written")


def gigabytes(count: int) -> str:
    """A number of bytes in GB, or in MB where that reads better."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _can_write(folder: Path) -> bool:
    """Whether a file can be made there, by making one without a name; permissions alone do not tell."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _processors(cgroup: Path) -> float | None:
    words = text_of(cgroup / "cpu.max").split()
    if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
        return int(words[0]) / int(words[1])
    return None


def _torch_build() -> str:
    """What stands behind the plus in torch's version: cpu, cu128, or nothing."""
    try:
        return version("torch").partition("+")[2]
    except PackageNotFoundError:
        return ""
