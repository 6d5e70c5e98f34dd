"""The child process of the Hub's publisher: one job on stdin, progress and the answer on stdout as NDJSON.

It alone imports huggingface_hub, after its environment was set. Whatever it writes has tokens taken out of it. It ends
when its parent is gone, however that went: nobody is left who would hear of a commit.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from huggingface_hub import HfApi, constants, get_session, get_token, snapshot_download
from huggingface_hub.utils import hf_raise_for_status

from qlora_export.errors import ExitCode, RemoteConflict
from qlora_export.publish.hub import commit
from qlora_export.publish.hub.failures import NOT_SPOKEN, status_of, translated
from qlora_export.publish.hub.job import Target, TargetState, as_data, target_from, upload_from
from qlora_export.publish.hub.remote import Remote, asked, connect
from qlora_export.publish.redaction import redact

Job = Mapping[str, Any]
Tell = Callable[[Mapping[str, Any]], None]


def look(api: HfApi, job: Job, tell: Tell) -> dict[str, Any]:
    """What is at every target now; nothing is created."""
    texts = tuple(job["texts"])
    seen = []
    for data in job["targets"]:
        remote = Remote(api, target_from(data))
        there = remote.exists()
        found = tuple(remote.candidates(texts)) if there else ()
        seen.append(as_data(TargetState(remote.target, remote.head() if there else None, found)))
    return {"seen": seen}


def authorise(api: HfApi, job: Job, tell: Tell) -> dict[str, Any]:
    """Who this token is; an endpoint that does not tell is not an error, a token that it refuses is one.

    A collection that the release is to be listed in must be there.
    """
    if collection := job.get("collection"):
        asked(collection, lambda: api.get_collection(collection))
    try:
        return {"name": str(api.whoami()["name"])}
    except Exception as error:
        if status_of(error) in NOT_SPOKEN:
            return {"name": None}
        raise


def create(api: HfApi, job: Job, tell: Tell) -> dict[str, Any]:
    """Create the repositories that are missing; answers the heads of their branches, and whether xet is spoken."""
    remotes = [Remote(api, target_from(data)) for data in job["targets"]]
    for remote in remotes:
        remote.create()
    return {"heads": [remote.head() for remote in remotes], "xet": _may_use_xet() and remotes[0].speaks_xet()}


def publish(api: HfApi, job: Job, tell: Tell) -> dict[str, Any]:
    """Send all objects of all repositories, then make their commits, then read the trees back."""

    def progress(done: int, total: int, what: str) -> None:
        tell({"progress": [done, total, what]})

    uploads = [upload_from(data) for data in job["uploads"]]
    for upload in uploads:
        card = Path(upload.folder) / "README.md"
        _require_valid_card(api, upload.target.repository, card)
        Remote(api, upload.target).exists()
    prepared = [commit.prepare(Remote(api, upload.target), upload, progress) for upload in uploads]
    committed = []
    for item in prepared:
        made = commit.commit(item)
        commit.require_arrived(item, made)
        committed.append(as_data(made))
    return {"committed": committed}


def name(api: HfApi, job: Job, tell: Tell) -> dict[str, Any]:
    """Tag commits with the version, and list the repositories in the collection."""
    for item in job["commits"]:
        repository = item["repository"]
        if job["version"] is not None:
            _tag(Remote(api, Target(repository)), job["version"], item["commit"])
        if job["collection"]:
            _list(api, job["collection"], repository)
    return {}


def pull(api: HfApi, job: Job, tell: Tell) -> dict[str, Any]:
    """Download a commit into a cache of its own."""
    repository, revision = job["repository"], job["revision"]
    folder = asked(
        repository,
        lambda: snapshot_download(
            repository,
            revision=revision,
            cache_dir=job["cache"],
            endpoint=api.endpoint,
            allow_patterns=job.get("files"),
        ),
    )
    return {"folder": str(folder), "commit": Path(folder).name}


def listing(api: HfApi, job: Job, tell: Tell) -> dict[str, Any]:
    """The commit that a revision names, and the digests of its tree."""
    remote = Remote(api, Target(job["repository"]))
    head = asked(remote.name, lambda: str(api.repo_info(remote.name, revision=job["revision"]).sha))
    return {"commit": head, "files": {path: as_data(file) for path, file in remote.tree(head).items()}}


OPERATIONS: dict[str, Callable[[HfApi, Job, Tell], dict[str, Any]]] = {
    "authorise": authorise,
    "look": look,
    "create": create,
    "publish": publish,
    "name": name,
    "pull": pull,
    "listing": listing,
}


def main() -> None:
    """Do one job and leave."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    place = job.get("repository") or ", ".join(target["repository"] for target in job.get("targets", ())) or "the Hub"
    try:
        api = connect(job["endpoint"], job["timeout_seconds"])
        _tell(answers, {"result": OPERATIONS[job["operation"]](api, job, lambda event: _tell(answers, event))})
    except Exception as error:  # noqa: BLE001  every failure has an exit code, which the parent raises
        failure = translated(error, place)
        if failure.exit_code == ExitCode.BUG:
            traceback.print_exc()
        _tell(
            answers,
            {"error": {"exit_code": int(failure.exit_code), "message": failure.message, "hint": failure.hint}},
        )


def _leave_with_parent() -> None:
    """End this process when the parent's end of stdin is closed, which a kill does, too."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(ExitCode.REMOTE)


def _may_use_xet() -> bool:
    """Whether the client has its library for xet, and the user has not switched it off."""
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _list(api: HfApi, collection: str, repository: str) -> None:
    asked(collection, lambda: api.add_collection_item(collection, repository, "model", exists_ok=True))


def _tag(remote: Remote, version: str, commit_oid: str) -> None:
    found = remote.tags().get(version)
    if found is None:
        try:
            asked(remote.name, lambda: remote.api.create_tag(remote.name, tag=version, revision=commit_oid))
        except RemoteConflict:
            found = remote.tags().get(version)
        else:
            return
    if found != commit_oid:
        raise RemoteConflict(
            f"{remote.name}: the tag {version} names {str(found)[:12]}, this release is {commit_oid[:12]}",
            "a version never changes: publish under another version",
        )


def _require_valid_card(api: HfApi, place: str, card: Path) -> None:
    """Have the Hub judge the card before anything is sent; raises Refused with its words."""
    if not card.is_file():
        return
    body = {"content": card.read_bytes().decode("utf-8"), "repoType": "model"}
    address = f"{api.endpoint}/api/validate-yaml"
    asked(f"{place}: {card.name}", lambda: hf_raise_for_status(get_session().post(address, json=body)))


def _tell(answers: TextIO, event: Mapping[str, Any]) -> None:
    answers.write(redact(json.dumps(event), _tokens()) + "\n")
    answers.flush()


def _tokens() -> list[str]:
    """The token in use, unless getting one is what fails."""
    try:
        return [token] if (token := get_token()) else []
    except Exception:  # noqa: BLE001  an exchange that fails has no token to hide
        return []


if __name__ == "__main__":
    main()
