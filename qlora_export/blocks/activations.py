"""Hidden states of all calibration tokens between two decoder blocks, in memory or, past a limit, on the disk.

Windows of like lengths form a batch, filled up on the right: in a causal model nothing looks to the right, so that the
filling changes no token. Cost: tokens * width * 4 bytes, once for the trained model and once for the rounded one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlora_export.errors import EnvironmentProblem

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Token ids [sequences, length], and which of them are no filling."""

    tokens: Tensor
    valid: Tensor


def batches_of(windows: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Batches of about so many tokens, the longest windows first."""
    ordered = sorted(windows, key=len, reverse=True)
    found, first = [], 0
    while first < len(ordered):
        length = len(ordered[first])
        count = max(1, batch_tokens // length)
        found.append(_batch(ordered[first : first + count], length))
        first += count
    return found


def _batch(windows: Sequence[Sequence[int]], length: int) -> Batch:
    tokens = torch.zeros(len(windows), length, dtype=torch.int64)
    valid = torch.zeros(len(windows), length, dtype=torch.bool)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = torch.tensor(window)
        valid[row, : len(window)] = True
    return Batch(tokens, valid)


class Activations:
    """One float32 tensor [sequences, length, width] for every batch; more than `limit_bytes` lie in a nameless file."""

    def __init__(self, batches: Sequence[Batch], width: int, folder: Path, limit_bytes: int) -> None:
        shapes = [(*batch.tokens.shape, width) for batch in batches]
        sizes = [int(np.prod(shape)) for shape in shapes]
        self.spilled = 4 * sum(sizes) > limit_bytes
        whole = _on_disk(folder, sum(sizes)) if self.spilled else np.empty(sum(sizes), np.float32)
        starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._parts = [
            whole[start : start + size].reshape(shape)
            for start, size, shape in zip(starts[:-1], sizes, shapes, strict=True)
        ]

    def __getitem__(self, number: int) -> Tensor:
        return torch.from_numpy(self._parts[number])

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        self._parts[number][...] = hidden.detach().float().cpu().numpy()


def _on_disk(folder: Path, size: int) -> np.memmap[tuple[int], np.dtype[np.float32]]:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 4 * size)
        except OSError as error:
            raise EnvironmentProblem(
                f"{folder}: no room for {4 * size} bytes of activations ({error.strerror})",
                "free some disk space, or calibrate with fewer sequences",
            ) from None
        return np.memmap(file, np.float32, "r+", shape=(size,))
