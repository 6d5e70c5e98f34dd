"""The publisher's process is killed before and after each record of its journal; the next one ends with the same."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from qlora_export.errors import ExitCode, ExportError
from qlora_export.publish.hub.job import Target
from qlora_export.publish.hub.process import run_job
from qlora_export.testing import HubServer
from tests.publish.hub.conftest import client, create, publish, upload

Library = Mapping[str, str]
# Each test with one of the two clients.
pytestmark = pytest.mark.sampled(1)
# Python imports a module of this name before anything else. It lets the process kill itself at the chosen record.
KILLING = """
import os, signal
from qlora_export.publish.hub.commit import PublicationJournal

point, note = int(os.environ["KILLED_AT"]), PublicationJournal.note
passed = 0

def step():
    global passed
    if passed == point:
        os.kill(os.getpid(), signal.SIGKILL)
    passed += 1

def noting(self, **event):
    step()
    note(self, **event)
    step()

PublicationJournal.note = noting
"""
FILES = 4
# One record for each file, one before the commit, one after it; each is a point before and a point after.
POINTS = 2 * (FILES + 2)
COMMITTED = POINTS - 2
# A lock ends with its process, even where nobody collects what is left of it.
HOLDING = """
import fcntl, os

if held := os.environ.get("HELD"):
    fcntl.flock(os.open(held, os.O_RDONLY), fcntl.LOCK_EX)
"""
PARENT = """
import json, sys
from pathlib import Path
from qlora_export.publish.hub.process import Client, run_job

endpoint, place = sys.argv[1], Path(sys.argv[2])
variables = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(place), "HELD": str(place / "held")}
run_job(Client(variables), "publish", uploads=[json.loads((place / "job.json").read_text())])
"""


@pytest.fixture
def killing(library: Library, tmp_path: Path) -> Library:
    """The environment of a client that kills itself at KILLED_AT."""
    (tmp_path / "killing").mkdir()
    (tmp_path / "killing" / "sitecustomize.py").write_text(KILLING)
    return {**library, "PYTHONPATH": os.pathsep.join([str(tmp_path / "killing"), *library.values()])}


def sent(hub: HubServer) -> Counter[str]:
    """How often the Hub took the bytes of each upload that it offered."""
    return Counter(record.path for record in hub.requests if record.method == "PUT" and record.status == 200)


def test_a_kill_at_each_record(hub: HubServer, release: Path, library: Library, killing: Library) -> None:
    """One run after the other gets one step further than the last, on what that one left behind."""
    with HubServer() as undisturbed:
        whole = publish(client(undisturbed, library), release, create(client(undisturbed, library)))
        files = undisturbed.repositories["acme/model"].files()
    parent = create(client(hub, library))
    repository = hub.repositories["acme/model"]
    for point in range(POINTS):
        with pytest.raises(ExportError, match="ended by SIGKILL") as raised:
            publish(client(hub, {**killing, "KILLED_AT": str(point)}), release, parent)
        assert raised.value.exit_code == ExitCode.ENVIRONMENT
        assert len(repository.commits()) == (2 if point >= COMMITTED else 1), point
    again = publish(client(hub, library), release, parent)
    assert again["commit"] == whole["commit"]
    assert repository.files() == files
    assert len(repository.commits()) == 2
    assert sorted(sent(hub).values()) == [1, 1]


@pytest.mark.sampled(1, per="point")
@pytest.mark.parametrize("point", [COMMITTED - 1, COMMITTED])
def test_a_kill_around_the_pull_request(
    hub: HubServer, release: Path, library: Library, killing: Library, point: int
) -> None:
    target = Target("acme/model", mode="pull-request")
    parent = create(client(hub, library), target)
    repository = hub.repositories["acme/model"]
    with pytest.raises(ExportError, match="ended by SIGKILL"):
        publish(client(hub, {**killing, "KILLED_AT": str(point)}), release, parent, target=target)
    assert list(repository.pull_requests) == ([1] if point == COMMITTED else [])
    seen = run_job(client(hub, library), "look", targets=[vars(target)], texts=["README.md"])["seen"][0]
    there = {found["revision"]: found["commit"] for found in seen["candidates"]}.get("refs/pr/1", parent)
    again = publish(client(hub, library), release, there, target=target)
    assert again["changed"] == (point < COMMITTED)
    assert list(repository.pull_requests) == [1]
    assert len(repository.commits("refs/pr/1")) == 2
    assert len(repository.commits()) == 1
    assert sorted(sent(hub).values()) == [1, 1]


def test_there_are_as_many_points_as_are_tried(hub: HubServer, release: Path, killing: Library) -> None:
    runner = client(hub, {**killing, "KILLED_AT": str(POINTS)})
    assert publish(runner, release, create(runner))["changed"]


def test_a_child_does_not_outlive_its_parent(release: Path, tmp_path: Path) -> None:
    """The parent is killed while a shard is on its way; the child lets go of its file at once."""
    (tmp_path / "sitecustomize.py").write_text(HOLDING)
    (tmp_path / "held").touch()
    with HubServer(faults=["put-slow:60"]) as hub, (tmp_path / "held").open() as held:
        (tmp_path / "job.json").write_text(json.dumps(upload(release, create(client(hub, {})))))
        words = [sys.executable, "-c", PARENT, hub.endpoint, str(tmp_path)]
        process = subprocess.Popen(words, env={**os.environ, "HF_TOKEN": "hf_rehearsal"})
        while not [record for record in hub.requests if record.path.endswith("/objects/batch")]:
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.kill()
        process.wait()
        began = time.monotonic()
        fcntl.flock(held, fcntl.LOCK_EX)
        assert time.monotonic() - began < 5
