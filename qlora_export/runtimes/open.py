"""An artifact in the runtime that its manifest names; an adapter on its own runs on the base of its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qlora_export.artifact import Artifact
from qlora_export.planning.plan import Plan
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.registry import load_runtime
from qlora_export.sources.adapter import open_adapter


@contextmanager
def open_artifact(artifact: Artifact, plan: Plan, device: str = "cpu") -> Iterator[Session]:
    """Open it as its consumers would, on a device; raises InputError when it does not load."""
    runtime = artifact.runtime
    if runtime == "as-trained":
        from qlora_export.runtimes.as_trained import open_as_trained

        rows = plan.model.settings.get("vocab_size")
        adapter = open_adapter(artifact.path)
        yield open_as_trained(plan.checkpoint, adapter, plan.live_training, rows, device).tuned()
        return
    with load_runtime(runtime).open(artifact.path, device) as session:
        yield session
