"""The whole matrix of what goes wrong between here and the Hub, with real clients over real sockets."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_export.errors import ExitCode, ExportError
from qlora_export.publish.hub.job import Target
from qlora_export.publish.hub.process import Client, run_job
from qlora_export.testing import HubServer
from tests.publish.hub.conftest import CLIENTS, client, create, library_of, make_release, publish, upload
from tests.sampling import cases_of

Library = Mapping[str, str]
# Each test with one of the two clients.
pytestmark = pytest.mark.sampled(1)
# An unsigned identity token: header, claims and signature of a JSON web token.
IDENTITY = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b'{"alg":"none"}', b'{"sub":"ci"}', b"none")
)


def commits_of(hub: HubServer, reference: str = "main") -> list[str]:
    return [commit.oid for commit in hub.repositories["acme/model"].commits(reference)]


def require_whole(hub: HubServer, folder: Path, reference: str = "main") -> None:
    """Every file of the folder lies there byte for byte."""
    repository = hub.repositories["acme/model"]
    names = {path.name for path in folder.iterdir()}
    assert names <= set(repository.files(reference)) <= names | {".gitattributes"}
    for name in names:
        assert repository.read(reference, name) == (folder / name).read_bytes()


def tag(runner: Client, commit: str) -> None:
    commits = [{"repository": "acme/model", "commit": commit}]
    run_job(runner, "name", commits=commits, version="v1", collection=None)


def test_one_commit_holds_everything(hub: HubServer, release: Path, library: Library) -> None:
    runner = client(hub, library)
    parent = create(runner)
    made = publish(runner, release, parent)
    assert commits_of(hub) == [made["commit"], parent]
    assert made["changed"]
    require_whole(hub, release)
    assert hub.repositories["acme/model"].private


def test_again_makes_no_commit_and_sends_nothing(hub: HubServer, release: Path, library: Library) -> None:
    runner = client(hub, library)
    made = publish(runner, release, create(runner))
    before = len([record for record in hub.requests if record.method == "PUT"])
    again = publish(runner, release, made["commit"])
    assert (again["commit"], again["changed"]) == (made["commit"], False)
    assert len(commits_of(hub)) == 2
    assert len([record for record in hub.requests if record.method == "PUT"]) == before


def test_stale_shards_leave_in_the_same_commit(hub: HubServer, release: Path, library: Library) -> None:
    runner = client(hub, library)
    first = publish(runner, release, create(runner))
    for path in release.glob("*.safetensors"):
        path.rename(release / path.name.replace("of-00002", "of-00009"))
    second = publish(runner, release, first["commit"])
    assert len(commits_of(hub)) == 3
    require_whole(hub, release)
    assert commits_of(hub)[0] == second["commit"]


RECOVERED = [
    "preupload-429-retry-after",
    "preupload-429-ratelimit",
    "put-500",
    "verify-502",
    "commit-503",
    "commit-closed-before",
    "commit-applied-then-closed",
    "tree-missing-shard",
]
REFUSED = {
    "commit-503-always": (ExitCode.REMOTE, "503"),
    "commit-412": (ExitCode.REMOTE_CONFLICT, "main moved from"),
    "put-truncated": (ExitCode.VERIFY_MISMATCH, "has other content"),
    "token-401-mid-run": (ExitCode.NOT_AUTHORISED, "401"),
}


def recover(fault: str, library: Library, release: Path) -> None:
    """What passes by itself leaves exactly one commit."""
    with HubServer(faults=[fault]) as hub:
        runner = client(hub, library)
        made = publish(runner, release, create(runner))
        assert commits_of(hub)[0] == made["commit"]
        assert len(commits_of(hub)) == 2
        require_whole(hub, release)


def fail(fault: str, library: Library, release: Path) -> None:
    """What does not pass has its own exit code, and leaves nothing of ours."""
    code, text = REFUSED[fault]
    with HubServer(faults=[fault]) as hub:
        runner = client(hub, library)
        parent = create(runner)
        with pytest.raises(ExportError, match=text) as raised:
            publish(runner, release, parent)
        assert raised.value.exit_code == code
        ours = [commit for commit in hub.repositories["acme/model"].commits("main") if "Release" in commit.title]
        assert len(ours) == (fault == "put-truncated")


@pytest.fixture(scope="module")
def trials(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[tuple[str, str], Future[None]]]:
    """Each fault and client that is tried, with a Hub of its own; several at a time, since they mostly wait."""
    cases = [tuple(drawn[key] for key in ("name", "fault")) for drawn in cases_of("test_a_fault", request)]
    with ThreadPoolExecutor(6) as pool:
        yield {
            (name, fault): pool.submit(
                recover if fault in RECOVERED else fail,
                fault,
                library_of(name),
                make_release(tmp_path_factory.mktemp("trial") / "release"),
            )
            for name, fault in cases
        }


@pytest.mark.sampled(1, per="fault")
@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("fault", [*RECOVERED, *REFUSED])
def test_a_fault(trials: Mapping[tuple[str, str], Future[None]], name: str, fault: str) -> None:
    trials[name, fault].result()


def test_a_repository_that_turns_public_gets_no_byte(release: Path, library: Library) -> None:
    with HubServer(faults=["repository-turns-public"]) as hub:
        with pytest.raises(ExportError, match="the repository is public, the recipe asks for private") as raised:
            create(client(hub, library))
        assert raised.value.exit_code == ExitCode.REMOTE_CONFLICT
        assert not [record for record in hub.requests if record.method == "PUT"]


def test_a_forbidden_repository(library: Library) -> None:
    with HubServer(faults=["create-403"]) as hub:
        with pytest.raises(ExportError, match="403") as raised:
            create(client(hub, library))
        assert raised.value.exit_code == ExitCode.NOT_AUTHORISED
        assert "create it first" in raised.value.hint


def test_a_server_that_stalls_is_left_after_the_timeout(release: Path) -> None:
    with HubServer(faults=["put-slow:30"]) as hub:
        runner = client(hub, {}, timeout_seconds=1.0)
        made = publish(runner, release, create(runner))
        assert commits_of(hub)[0] == made["commit"]


def test_the_deadline_ends_the_child(release: Path) -> None:
    with HubServer(faults=["put-slow:30"]) as hub:
        parent = create(client(hub, {}))
        runner = client(hub, {}, deadline=time.monotonic() + 2)
        with pytest.raises(ExportError, match="deadline") as raised:
            publish(runner, release, parent)
        assert raised.value.exit_code == ExitCode.REMOTE
        assert len(commits_of(hub)) == 1


def test_a_file_that_changes_on_the_way(hub: HubServer, release: Path) -> None:
    runner = client(hub, {})
    parent = create(runner)
    path = release / "model-00001-of-00002.safetensors"
    job = upload(release, parent)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ExportError, match="has sha256 .* now") as raised:
        run_job(runner, "publish", uploads=[job])
    assert raised.value.exit_code == ExitCode.VERIFY_MISMATCH
    assert len(commits_of(hub)) == 1


def test_a_card_that_the_hub_refuses_sends_nothing(hub: HubServer, release: Path, library: Library) -> None:
    (release / "README.md").write_text("---\nlicense: no-such-licence\n---\n")
    runner = client(hub, library)
    parent = create(runner)
    with pytest.raises(ExportError, match="license") as raised:
        publish(runner, release, parent)
    assert raised.value.exit_code == ExitCode.REFUSED
    assert not [record for record in hub.requests if record.method == "PUT"]


def test_a_pull_request_is_made_once(hub: HubServer, release: Path, library: Library) -> None:
    target = Target("acme/model", mode="pull-request")
    runner = client(hub, library)
    parent = create(runner, target)
    made = publish(runner, release, parent, target=target)
    assert made["revision"] == "refs/pr/1"
    assert made["url"].endswith("/acme/model/discussions/1")
    assert commits_of(hub) == [parent]
    require_whole(hub, release, "refs/pr/1")
    seen = run_job(runner, "look", targets=[vars(target)], texts=["README.md"])["seen"][0]
    assert [found["revision"] for found in seen["candidates"]] == ["main", "refs/pr/1"]


def test_a_pull_request_whose_answer_is_lost_is_found(release: Path, library: Library) -> None:
    target = Target("acme/model", mode="pull-request")
    with HubServer(faults=["commit-applied-then-closed"]) as hub:
        runner = client(hub, library)
        made = publish(runner, release, create(runner, target), target=target)
        assert made["revision"] == "refs/pr/1"
        assert list(hub.repositories["acme/model"].pull_requests) == [1]


def test_a_branch_of_its_own(hub: HubServer, release: Path, library: Library) -> None:
    target = Target("acme/model", branch="next/8-bit")
    runner = client(hub, library)
    made = publish(runner, release, create(runner, target), target=target)
    assert commits_of(hub, "next/8-bit")[0] == made["commit"]
    assert len(commits_of(hub)) == 1


def test_tags_name_one_commit_for_ever(hub: HubServer, release: Path, library: Library) -> None:
    runner = client(hub, library)
    made = publish(runner, release, create(runner))
    for _ in range(2):
        tag(runner, made["commit"])
    assert hub.repositories["acme/model"].tags == {"v1": made["commit"]}
    (release / "config.json").write_text('{"a": 1}')
    second = publish(runner, release, made["commit"])
    with pytest.raises(ExportError, match="the tag v1 names") as raised:
        tag(runner, second["commit"])
    assert raised.value.exit_code == ExitCode.REMOTE_CONFLICT


def test_a_tag_that_somebody_else_made_meanwhile(release: Path, library: Library) -> None:
    with HubServer(faults=["tag-409"]) as hub:
        runner = client(hub, library)
        made = publish(runner, release, create(runner))
        with pytest.raises(ExportError, match="the tag v1 names") as raised:
            tag(runner, made["commit"])
        assert raised.value.exit_code == ExitCode.REMOTE_CONFLICT


def test_a_wrong_token_is_told_without_the_token(release: Path, library: Library) -> None:
    with HubServer(token="hf_rightrightrightrightright") as hub:
        wrong = {**library, "HF_TOKEN": "hf_wrongwrongwrongwrongwrong"}
        with pytest.raises(ExportError) as raised:
            run_job(client(hub, wrong), "authorise")
    assert raised.value.exit_code == ExitCode.NOT_AUTHORISED
    assert "hf_wrong" not in raised.value.message + raised.value.hint


def test_a_trusted_publisher_needs_no_stored_token(release: Path, tmp_path: Path) -> None:
    with HubServer(token="hf_rightrightrightrightright") as hub:
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "README.md").write_text("# here\n")
        parent = hub.add_repository("acme/model", tmp_path / "there", private=True)
        oidc = {"HF_TOKEN": "", "HF_OIDC_RESOURCE": "acme/model", "HF_OIDC_ID_TOKEN": IDENTITY}
        runner = client(hub, {**oidc, "HF_HOME": str(tmp_path / "home")})
        assert create(runner) == parent
        made = publish(runner, release, parent)
        assert commits_of(hub) == [made["commit"], parent]


def test_a_trusted_publisher_that_the_hub_does_not_trust(tmp_path: Path) -> None:
    with HubServer(token="hf_rightrightrightrightright") as hub:
        oidc = {"HF_TOKEN": "", "HF_OIDC_RESOURCE": "acme/other", "HF_OIDC_ID_TOKEN": IDENTITY}
        with pytest.raises(ExportError, match="invalid_grant") as raised:
            run_job(client(hub, {**oidc, "HF_HOME": str(tmp_path)}), "authorise")
    assert raised.value.exit_code == ExitCode.NOT_AUTHORISED


def test_a_hub_that_nobody_serves() -> None:
    with HubServer() as hub:
        runner = client(hub, {}, timeout_seconds=2.0)
    with pytest.raises(ExportError, match="no answer from the Hub") as raised:
        run_job(runner, "authorise")
    assert raised.value.exit_code == ExitCode.REMOTE


def test_a_client_that_is_offline(hub: HubServer) -> None:
    with pytest.raises(ExportError, match="offline") as raised:
        run_job(client(hub, {"HF_HUB_OFFLINE": "1"}), "look", targets=[vars(Target("acme/model"))], texts=["README.md"])
    assert raised.value.exit_code == ExitCode.ENVIRONMENT


def test_the_journal_tells_what_was_sent(hub: HubServer, release: Path) -> None:
    journal = release.parent / "journal.ndjson"
    journal.write_text('{"uploaded": "torn')
    runner = client(hub, {})
    made = publish(runner, release, create(runner))
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [event["path"] for event in events if "uploaded" in event] == sorted(p.name for p in release.iterdir())
    assert events[-1]["committed"] == made["commit"]


def test_a_journal_that_cannot_be_written_commits_nothing(hub: HubServer, release: Path) -> None:
    runner = client(hub, {})
    parent = create(runner)
    with pytest.raises(ExportError) as raised:
        publish(runner, release, parent, journal="/dev/full")
    assert raised.value.exit_code == ExitCode.ENVIRONMENT
    assert len(commits_of(hub)) == 1


def test_no_client_in_the_parent() -> None:
    """The client reads its environment at import, so the publisher itself never imports it."""
    code = "import sys, qlora_export.publish.hub.process as p; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
