"""However a publication fails, no token is in anything that its process wrote, even where the Hub repeats it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qlora_export.publish.hub.job import Target
from qlora_export.publish.hub.process import QUIET, WORKER
from qlora_export.testing import FAULTS, HubServer
from tests.publish.hub.conftest import client, create, make_release, upload
from tests.publish.hub.test_commit import IDENTITY

# A token as the Hub gives them out, and one that nothing but its value gives away.
TOKEN = "hf_" + "a1B2" * 8
WORD = "wholly.unremarkable.word"
TARGET = vars(Target("acme/model"))
SHORTER = {"put-slow": "put-slow:1"}


def written(hub: HubServer, library: Mapping[str, str], token: str, operation: str, **job: Any) -> str:
    """Everything that the child writes on stdout and stderr."""
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", **library}
    data = {"operation": operation, "endpoint": hub.endpoint, "timeout_seconds": 10, **job}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **QUIET, **variables},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        process.stdin.write(json.dumps(data) + "\n")
        process.stdin.flush()
        told = process.stdout.read()
    process.wait()
    return told


def require_silent(told: str, places: Sequence[Path], token: str) -> None:
    """Neither token, nor half of it, in what was told or lies in the folders."""
    for text in (told, *(path.read_text(errors="replace") for place in places for path in place.rglob("*.ndjson"))):
        assert token not in text
        assert token[len(token) // 2 :] not in text


def fail(fault: str, release: Path) -> None:
    """A publication through one fault, and what was written on the way."""
    with HubServer(token=WORD, faults=["refusals-tell-token", SHORTER.get(fault, fault)]) as hub:
        told = written(hub, {}, WORD, "create", targets=[TARGET])
        if "error" not in told:
            parent = json.loads(told)["result"]["heads"][0]
            told += written(hub, {}, WORD, "publish", uploads=[upload(release, parent)])
        if fault == "tag-409":
            commits = [{"repository": "acme/model", "commit": hub.repositories["acme/model"].head()}]
            told += written(hub, {}, WORD, "name", commits=commits, version="v1", collection=None)
    assert '"result"' in told or '"error"' in told
    require_silent(told, [release.parent], WORD)


OTHERS = {
    "a token that the Hub does not know": {"token": "hf_" + "other" * 6},
    "a token that may only read": {"token": f"read:{TOKEN}"},
    "a token with a line break": {"token": f"{TOKEN}\nX-Header: 1"},
    "a trusted publisher that is not trusted": {"token": "", "HF_OIDC_RESOURCE": "acme/other"},
    "no Hub at all": {"HF_ENDPOINT": "http://127.0.0.1:9"},
    "an endpoint that is no address": {"HF_ENDPOINT": f"ftp://user:{TOKEN}@nowhere"},
    "offline": {"HF_HUB_OFFLINE": "1"},
}


def fail_otherwise(case: str, home: Path) -> None:
    """A failure that is none of the Hub's faults."""
    changes = {"token": TOKEN, **OTHERS[case]}
    token = changes.pop("token")
    identity = {"HF_OIDC_ID_TOKEN": IDENTITY, "HF_HOME": str(home)}
    with HubServer(token=TOKEN, faults=["refusals-tell-token"]) as hub:
        create(client(hub, {"HF_TOKEN": TOKEN}))
        job = {"endpoint": changes["HF_ENDPOINT"]} if "HF_ENDPOINT" in changes else {}
        commits = [{"repository": "acme/model", "commit": "0" * 40}]
        told = written(
            hub, {**identity, **changes}, token, "name", **job, commits=commits, version="v1", collection=None
        )
    assert '"error"' in told
    for secret in {TOKEN, token, IDENTITY} - {""}:
        require_silent(told, [home], secret)


WAYS = [*(name for name in FAULTS if name != "refusals-tell-token"), *OTHERS]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Future[None]]]:
    """Every way to fail, each with a Hub of its own; several at a time, since they mostly wait."""
    with ThreadPoolExecutor(6) as pool:
        started = {}
        for way in WAYS:
            place = tmp_path_factory.mktemp("trial")
            if way in OTHERS:
                started[way] = pool.submit(fail_otherwise, way, place)
            else:
                started[way] = pool.submit(fail, way, make_release(place / "release"))
        yield started


@pytest.mark.parametrize("way", WAYS)
def test_a_failure(trials: Mapping[str, Future[None]], way: str) -> None:
    trials[way].result()


def test_there_are_at_least_twenty_ways() -> None:
    assert len(WAYS) >= 20


def test_a_repetition_reaches_the_message(release: Path) -> None:
    """The Hub of these tests does tell the token, so they can fail."""
    with HubServer(token=TOKEN, faults=["refusals-tell-token"]) as hub:
        told = written(hub, {}, "hf_" + "other" * 6, "look", targets=[TARGET], texts=["README.md"])
    assert "Authorization" in told
    assert "[redacted]" in told
