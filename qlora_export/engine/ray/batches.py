"""The subjects of a pass in batches, so large that asking for one costs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_export.engine.work_items import WorkItem
from qlora_export.sources.weights import weight_bytes

# So many for each worker, where a model is small, keep all of them at work until the end.
BATCHES_EACH = 8

Batch = tuple[int, ...]


def cut(subjects: Sequence[WorkItem], most_bytes: int, workers: int) -> list[Batch]:
    """Numbers of subjects, in order: a file alone, and weights until they are about `most_bytes` of the source."""
    sizes = [0 if isinstance(subject, Path) else weight_bytes(subject) for subject in subjects]
    enough = min(most_bytes, sum(sizes) // (BATCHES_EACH * workers))
    batches: list[Batch] = []
    gathered: list[int] = []
    gathered_bytes = 0
    for number, subject in enumerate(subjects):
        if isinstance(subject, Path):
            batches.append((number,))
            continue
        gathered.append(number)
        gathered_bytes += sizes[number]
        if gathered_bytes >= enough:
            batches.append(tuple(gathered))
            gathered, gathered_bytes = [], 0
    return batches + ([tuple(gathered)] if gathered else [])
