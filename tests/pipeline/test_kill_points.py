"""A run is killed at any of its syncs, from the first weight to the last receipt; the next ends with the same bytes."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import sampling
from tests.helpers.files import folder_bytes
from tests.processes import forked

# Builds, exports and publishes; the process kills itself at the chosen sync, or prints how many there are.
CHILD = """
import os, signal, sys
from pathlib import Path
from qlora_export import engine, make_recipe
from qlora_export.publish.base import Account
from qlora_export.drift.results import Drift, Verdict, Verified
from qlora_export.engine import BuildOptions
from qlora_export.planning.make import make_plan
from qlora_export.publish.folder import FolderPublisher

base, adapter, place, point = sys.argv[1:]
syncs = 0
fsync = os.fsync

def counted(descriptor):
    global syncs
    if syncs == int(point):
        os.kill(os.getpid(), signal.SIGKILL)
    syncs += 1
    fsync(descriptor)

os.fsync = counted
out = Path(place) / "out"
artifacts = ["bf16", "nf4-adapter", "adapter"]
recipe = make_recipe({"base": base, "adapter": adapter, "artifacts": artifacts}, Path(), "child")
plan = make_plan(recipe, out)
made = engine.build(plan, out, BuildOptions(workers=1, checkpoint_bytes=100_000))
made += [engine.export(plan, item, None, out) for item in plan.exports]
verified = [Verified(artifact, Verdict("pass"), Drift(*([1.0] * 14))) for artifact in made]
FolderPublisher(str(Path(place) / "registry"), "v1", Path()).publish(verified, Account({}))
print(syncs)
"""


def run(pico: tuple[Path, Path], place: Path, point: int) -> subprocess.CompletedProcess[str]:
    return forked("-c", CHILD, *pico, place, point)


@pytest.fixture(scope="module")
def whole(pico_base: Path, pico_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An undisturbed run, and the number of its syncs."""
    place = tmp_path_factory.mktemp("whole")
    found = run((pico_base, pico_adapter), place, -1)
    assert found.returncode == 0, found.stderr
    return place, int(found.stdout)


def without_places(folder: Path) -> dict[str, Any]:
    """Content of a folder; receipts name where they lie, so their place is left out."""
    return {name: raw.replace(str(folder).encode(), b"PLACE") for name, raw in folder_bytes(folder).items()}


@settings(max_examples=sampling.examples(15))
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_kill_point(
    share: float,
    whole: tuple[Path, int],
    pico_base: Path,
    pico_adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    undisturbed, syncs = whole
    assert syncs > 30
    place = tmp_path_factory.mktemp("killed")
    point = int(share * syncs)
    found = run((pico_base, pico_adapter), place, point)
    # Checkpoints are made by a thread that takes what is finished: a run beside other load may need fewer syncs.
    assert found.returncode == -signal.SIGKILL or int(found.stdout) <= point < syncs
    for latest in place.glob("registry/*/latest"):
        assert folder_bytes(latest.resolve()) == folder_bytes(undisturbed / "registry" / latest.parent.name / "v1")
    again = run((pico_base, pico_adapter), place, -1)
    assert again.returncode == 0, again.stderr
    assert without_places(place) == without_places(undisturbed)
