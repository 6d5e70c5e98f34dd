"""Which artifacts of a ledger are traced, and the order of it: the reference alone, then each of them alone.

A trace explains a verdict: where disk or memory do not suffice for it, the verdict stands without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_export.drift.ledger import Entry
from qlora_export.drift.recording import Recording
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.trace import Trace, record, trace, traced_windows
from qlora_export.errors import EnvironmentProblem
from qlora_export.recipe.config import TraceWhen
from qlora_export.runtimes.base import Session, TracedSession
from qlora_export.types import Track

Opened = AbstractContextManager[Session]
# Those whose sessions are models of torch, so that the reference is not loaded for others.
RUNTIMES = ("transformers", "as-trained")


@dataclass(frozen=True)
class Models:
    """What opens the reference, and the artifact of an entry."""

    reference: Callable[[], Opened]
    artifact: Callable[[Entry], Opened]


def traced_entries(
    entries: Sequence[Entry], tokens: TokenSet, when: TraceWhen, models: Models, folder: Path, track: Track
) -> tuple[Entry, ...]:
    """The entries with their traces, of those that are asked for; what is recorded lies in the folder meanwhile."""
    asked = [entry for entry in entries if _is_asked(entry, when)]
    windows = traced_windows(tokens)
    traces = {entry.artifact.name: Trace((), note=f"{entry.runtime} shows no layers") for entry in asked}
    able = [entry for entry in asked if entry.runtime in RUNTIMES]
    try:
        traces.update(_traces(able, windows, models, folder, track))
    except (EnvironmentProblem, MemoryError) as error:
        traces |= {entry.artifact.name: Trace((), note=str(error)) for entry in able}
    return tuple(
        replace(entry, findings=replace(entry.findings, trace=traces.get(entry.artifact.name))) for entry in entries
    )


def _traces(
    entries: Sequence[Entry], windows: Sequence[tuple[int, ...]], models: Models, folder: Path, track: Track
) -> Iterator[tuple[str, Trace]]:
    """The traces by the names of the artifacts."""
    if not entries:
        return
    with Recording(folder) as recording:
        with track("trace the reference"):
            _record(models, windows, recording)
        for entry in entries:
            with track(f"trace {entry.artifact.name}"), models.artifact(entry) as session:
                if isinstance(session, TracedSession):
                    yield entry.artifact.name, trace(session, windows, recording)


def _is_asked(entry: Entry, when: TraceWhen) -> bool:
    return when == "always" or (when == "failing" and entry.verdict.outcome != "pass")


def _record(models: Models, windows: Sequence[tuple[int, ...]], recording: Recording) -> None:
    """In a function of its own, so that the reference is gone from memory at its end."""
    with models.reference() as session:
        if isinstance(session, TracedSession):
            record(session, windows, recording)
