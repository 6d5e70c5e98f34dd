"""One commit: its lines read one by one, then applied whole or not at all."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from qlora_export.testing.messages import Answer, HangUp, Refusal, Request, json_answer
from qlora_export.testing.repository import Change, Repository
from qlora_export.testing.service import Service, writable
from qlora_export.testing.storage import BlobStore, FileEntry

Line = Mapping[str, Any]


def receive_commit(service: Service, request: Request) -> Answer:
    """Apply one commit to a branch, or as a new pull request."""
    repository = writable(service, request)
    revision = request.words["revision"]
    _fail_before(service, repository, revision)
    change = _read_change(service.store, request)
    address = f"{service.endpoint}/{repository.name}"
    if request.query.get("create_pr") in ("1", "true"):
        commit, pull = repository.propose(change, revision)
        extra = {"pullRequestUrl": f"{address}/discussions/{pull.number}"}
    else:
        commit, extra = repository.commit(change, revision), {}
    if service.faults.strikes("commit-applied-then-closed"):
        raise HangUp
    facts = {"success": True, "commitOid": commit.oid, "commitUrl": f"{address}/commit/{commit.oid}", "hookOutput": ""}
    return json_answer({**facts, **extra})


def _fail_before(service: Service, repository: Repository, revision: str) -> None:
    if service.faults.strikes("commit-closed-before"):
        raise HangUp
    if service.faults.strikes("commit-503") or service.faults.strikes("commit-503-always"):
        raise Refusal(503, "Service Unavailable")
    if service.faults.strikes("commit-412"):
        note = service.store.keep(b"Another publisher was here.\n")
        repository.commit(Change("Another publisher's commit", writes={"ANOTHER-PUBLISHER.md": note}), revision)


@dataclass
class _Draft:
    header: Mapping[str, Any] = field(default_factory=dict)
    writes: dict[str, FileEntry] = field(default_factory=dict)
    removed_files: list[str] = field(default_factory=list)
    removed_folders: list[str] = field(default_factory=list)


def _read_change(store: BlobStore, request: Request) -> Change:
    draft = _Draft()
    for number, raw in enumerate(request.body.lines()):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
            take, value = _LINES[line["key"]], line["value"]
        except (ValueError, KeyError, TypeError):
            raise Refusal(400, f"Line {number + 1} of the commit is not understood") from None
        take(store, draft, value)
    if not draft.header.get("summary"):
        raise Refusal(400, "A commit needs a summary")
    return Change(
        str(draft.header["summary"]),
        str(draft.header.get("description") or ""),
        draft.header.get("parentCommit"),
        draft.writes,
        tuple(draft.removed_files),
        tuple(draft.removed_folders),
    )


def _take_header(_store: BlobStore, draft: _Draft, value: Line) -> None:
    draft.header = value


def _take_file(store: BlobStore, draft: _Draft, value: Line) -> None:
    path = _safe_path(value)
    content = str(value.get("content", ""))
    try:
        data = base64.b64decode(content, validate=True) if value.get("encoding") == "base64" else content.encode()
    except binascii.Error:
        raise Refusal(400, f"The content of {path} is no base64") from None
    draft.writes[path] = store.keep(data)


def _take_large_file(store: BlobStore, draft: _Draft, value: Line) -> None:
    path = _safe_path(value)
    entry = store.large(str(value.get("oid")), int(value.get("size") or 0))
    if entry is None:
        raise Refusal(400, f"The LFS object of {path} was not uploaded: {value.get('oid')}")
    draft.writes[path] = entry


def _take_removed_file(_store: BlobStore, draft: _Draft, value: Line) -> None:
    draft.removed_files.append(_safe_path(value))


def _take_removed_folder(_store: BlobStore, draft: _Draft, value: Line) -> None:
    draft.removed_folders.append(_safe_path(value))


_LINES: Mapping[str, Callable[[BlobStore, _Draft, Line], None]] = {
    "header": _take_header,
    "file": _take_file,
    "lfsFile": _take_large_file,
    "deletedFile": _take_removed_file,
    "deletedFolder": _take_removed_folder,
}


def _safe_path(value: Line) -> str:
    path = str(value.get("path", ""))
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or {"..", ".git"} & set(parts):
        raise Refusal(400, f"{path!r} is no path of a file in a repository")
    return path
