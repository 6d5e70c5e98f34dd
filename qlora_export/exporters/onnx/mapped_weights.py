"""Weights of torch that lie in files: those of a checkpoint as they are there, stacked ones in a file of their own.

Mapped pages are the system's to drop and read again, so a model can be larger than the memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from transformers import modeling_utils

LARGE_BYTES = mmap.PAGESIZE
Stack = Callable[..., torch.Tensor]


class _MappedFile:
    """A safetensors file whose slices are mapped, where safetensors would copy them."""

    def __init__(self, *words: Any, **options: Any) -> None:
        self._file: Any = safe_open(*words, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_slice(self, name: str) -> _MappedSlice:
        return _MappedSlice(self._file, name)


class _MappedSlice:
    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file.get_slice(self._name), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(self._name)[index]
        return tensor


def map_weights() -> None:
    """Have transformers map the checkpoints that it loads."""
    modeling_utils.safe_open = _MappedFile


def stack_in_files(folder: Path) -> None:
    """Have torch stack large tensors into files without a name in a folder."""
    torch.cat = _in_file(torch.cat, folder)
    torch.stack = _in_file(torch.stack, folder)


def _in_file(stack: Stack, folder: Path) -> Stack:
    def run(tensors: Sequence[torch.Tensor], dim: int = 0, **options: Any) -> torch.Tensor:
        kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors}
        large = sum(tensor.nbytes for tensor in tensors) >= LARGE_BYTES
        if options or not large or kinds != {("cpu", tensors[0].dtype)}:
            return stack(tensors, dim, **options)
        shape = stack([tensor.to("meta") for tensor in tensors], dim).shape
        with torch.no_grad():
            return stack(tensors, dim, out=empty_in_file(shape, tensors[0].dtype, folder))

    return run


def empty_in_file(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """A tensor whose bytes lie in a file that goes with it."""
    size = torch.Size(shape).numel() * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        # A full disk is an error now, and a dead process where a page has no room.
        os.posix_fallocate(file.fileno(), 0, size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).reshape(shape)
