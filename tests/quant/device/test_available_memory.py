"""What is there to take: of the machine, of a container, of an accelerator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_export.quant.device.available_memory import available_bytes, container_bytes, machine_bytes


def test_the_smaller_of_machine_and_container_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert machine_bytes(meminfo) == available_bytes("cpu", meminfo, tmp_path) == 4_096_000
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_bytes("cpu", meminfo, tmp_path) == 2_000_000
    assert available_bytes("cpu", tmp_path / "none", tmp_path / "none") is None


@pytest.mark.parametrize(
    ("names", "pages"),
    [
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
            "total_inactive_file",
        ),
    ],
)
def test_pages_of_read_files_are_given_up(tmp_path: Path, names: tuple[str, ...], pages: str) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in zip(names, ("9000", "8000", f"anon 500\n{pages} 7000\n"), strict=True):
        (tmp_path / name).write_text(text)
    assert container_bytes(tmp_path) == 8000
    (tmp_path / names[2]).write_text(f"{pages} 8100\n")
    assert container_bytes(tmp_path) == 9000
    (tmp_path / names[2]).unlink()
    assert container_bytes(tmp_path) == 1000


@pytest.mark.gpu
def test_an_accelerator_tells_what_is_free() -> None:
    free = available_bytes("cuda")
    assert free is not None
    assert 0 < free <= torch.cuda.get_device_properties(0).total_memory
