"""Memory that this process may still take, on the machine or on an accelerator.

Linux tells it in /proc/meminfo and, for a container, in its cgroup: `memory.max` and `memory.current` of version 2,
`memory.limit_in_bytes` and `memory.usage_in_bytes` of version 1. A container's limit is what kills, so the smaller
number counts. Pages of files that were read count as used in a cgroup, although they are given up when memory is asked
for; `memory.stat` says how many.
"""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
# No limit is a number close to 2^63 in version 1.
NO_LIMIT = 2**62


def available_bytes(device: str, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Free memory for a device named as torch names it; None where nothing tells."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else None
    known = [number for number in (machine_bytes(meminfo), container_bytes(cgroup)) if number is not None]
    return min(known) if known else None


def machine_bytes(meminfo: Path = MEMINFO) -> int | None:
    """What the machine has available; None on a system that does not tell."""
    for line in text_of(meminfo).splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def container_bytes(cgroup: Path = CGROUP) -> int | None:
    """What the container may still take; None without a limit."""
    for folder, limit_name, used_name, pages_name in (
        (cgroup, "memory.max", "memory.current", "inactive_file"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = text_of(folder / limit_name).strip(), text_of(folder / used_name).strip()
        if limit.isdigit() and used.isdigit() and int(limit) < NO_LIMIT:
            pages = dict(line.split() for line in text_of(folder / "memory.stat").splitlines()).get(pages_name, "0")
            return max(0, int(limit) - max(0, int(used) - int(pages)))
    return None


def text_of(path: Path) -> str:
    """The text of a file, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
