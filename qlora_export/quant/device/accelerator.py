"""A device that computes on row blocks: bytes go there from pinned memory, on a stream of the thread that sends them.

Every worker has its own stream and its own staging buffer, so that one worker's copies, another's arithmetic and a
third one's reads and writes run at the same time. torch is imported when an accelerator is opened, not before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from qlora_export.errors import EnvironmentProblem
from qlora_export.quant.floats import UInt16

# What a kernel call should have to do: launching costs some microseconds, whatever it does.
BLOCK_WEIGHTS = 1 << 24


class Accelerator:
    """A torch device by its name, as in `cuda` or `cuda:1`; `cpu` runs the same code where there is none."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._torch = _torch_with(name)
        self._own = threading.local()

    @contextmanager
    def working(self) -> Iterator[None]:
        """The thread's kernels and copies go to its own stream, and are done at the end."""
        if self.name == "cpu":
            yield
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = self._torch.cuda.Stream(self.name)
        with self._torch.cuda.stream(self._own.stream):
            yield
            self._own.stream.synchronize()

    def send(self, bits: UInt16) -> Any:
        """Flat bf16 bits as a tensor there."""
        if self.name == "cpu":
            return self._torch.from_numpy(bits.view(np.int16)).view(self._torch.bfloat16)
        staging = self._staging(bits.size)
        staging.numpy()[: bits.size] = bits.view(np.int16)
        sent = staging[: bits.size].to(self.name, non_blocking=True)
        self._own.stream.synchronize()
        return sent.view(self._torch.bfloat16)

    def _staging(self, count: int) -> Any:
        """The thread's pinned buffer, which only grows."""
        if not hasattr(self._own, "staging") or self._own.staging.numel() < count:
            self._own.staging = self._torch.empty(count, dtype=self._torch.int16, pin_memory=True)
        return self._own.staging


def _torch_with(name: str) -> Any:
    """torch, if it has the device; raises EnvironmentProblem otherwise."""
    try:
        import torch
    except ImportError:
        raise EnvironmentProblem("torch is not installed", "install torch, or use --device cpu") from None
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentProblem(f"--device {name}: {reason}", "`qlora-export doctor` tells what is there") from None
    return torch
