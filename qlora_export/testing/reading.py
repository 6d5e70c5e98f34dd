"""What a client reads: repository facts, listings in pages, history, references, and files by range."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

from qlora_export.testing.card import front_matter
from qlora_export.testing.messages import Answer, FileSpan, Refusal, Request, json_answer
from qlora_export.testing.repository import Commit
from qlora_export.testing.service import USER, Service, readable
from qlora_export.testing.storage import FileEntry

Row = dict[str, Any]


def describe(service: Service, request: Request) -> Answer:
    """A repository at a revision, with its files."""
    repository = readable(service, request)
    newest = repository.commits(request.words.get("revision") or "main")[0]
    sizes = request.query.get("blobs", "").lower() in ("true", "1")
    metadata, _ = front_matter(repository.text(newest.oid, "README.md"))
    name = "/".join(repository.name.split("/")[-2:])
    facts = {
        "_id": hashlib.sha256(repository.name.encode()).hexdigest()[:24],
        "id": name,
        "modelId": name,
        "author": name.split("/")[0],
        "sha": newest.oid,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": timestamp(repository.created),
        "lastModified": timestamp(newest.date),
        "usedStorage": sum(entry.size for entry in newest.files.values()),
        "siblings": [_sibling(path, entry, sizes) for path, entry in newest.files.items()],
    }
    if isinstance(metadata, dict):
        facts["cardData"] = metadata
    return json_answer(facts)


def list_tree(service: Service, request: Request) -> Answer:
    """Files and folders below a path, in pages."""
    repository = readable(service, request)
    newest = repository.commits(request.words["revision"])[0]
    folder = (request.words.get("path") or "").strip("/")
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    rows = _tree_rows(newest.files, f"{folder}/" if folder else "", recursive)
    if folder and not rows:
        raise Refusal(404, f"{folder} does not exist on {request.words['revision']}", "EntryNotFound")
    rows, headers = _page(service, request, rows, lambda row: str(row["path"]))
    shards = [row for row in rows if row["path"].endswith(".safetensors")]
    if newest.parent and shards and service.faults.strikes("tree-missing-shard"):
        rows.remove(shards[-1])
    return json_answer(_expanded(request, rows, newest), headers=headers)


def list_paths(service: Service, request: Request) -> Answer:
    """The rows of named paths; missing ones are left out."""
    repository = readable(service, request)
    newest = repository.commits(request.words["revision"])[0]
    asked = request.form().get("paths", [])
    rows = {row["path"]: row for row in _tree_rows(newest.files, "", recursive=True)}
    return json_answer([rows[path] for path in asked if path in rows])


def list_commits(service: Service, request: Request) -> Answer:
    """History, newest first, in pages."""
    commits = readable(service, request).commits(request.words["revision"])
    rows = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "date": timestamp(commit.date),
            "authors": [{"user": USER}],
        }
        for commit in commits
    ]
    rows, headers = _page(service, request, rows, lambda row: str(row["id"]))
    return json_answer(rows, headers=headers)


def list_references(service: Service, request: Request) -> Answer:
    """Branches and tags, and pull requests when asked for."""
    repository = readable(service, request)
    found: dict[str, list[Row]] = {
        "branches": [_reference(name, f"refs/heads/{name}", oid) for name, oid in repository.branches.items()],
        "converts": [],
        "tags": [_reference(name, f"refs/tags/{name}", oid) for name, oid in repository.tags.items()],
    }
    if request.query.get("include_prs"):
        pulls = repository.pull_requests
        found["pullRequests"] = [_reference(str(n), item.ref, str(item.head)) for n, item in pulls.items()]
    return json_answer(found)


def resolve(service: Service, request: Request) -> Answer:
    """A file's content, whole or the part its Range header asks for."""
    repository = readable(service, request)
    oid = repository.head(request.words["revision"])
    entry = repository.files(oid).get(request.words["path"])
    origin = {"X-Repo-Commit": oid}
    if entry is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", origin)
    headers = {**origin, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream" if entry.sha256 else "text/plain; charset=utf-8"
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    start, end = 0, entry.size
    if (span := request.headers.get("Range")) is not None:
        start, end = _range(span, entry.size, origin)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{entry.size}"
    return Answer(206 if span else 200, FileSpan(service.store.path(entry), start, end - start), headers)


def timestamp(moment: datetime) -> str:
    """A time as the Hub writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def _range(span: str, size: int, headers: Mapping[str, str]) -> tuple[int, int]:
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", span.strip())
    start, end = 0, 0
    if found and found[1]:
        start, end = int(found[1]), min(int(found[2] or size), size - 1) + 1
    elif found and found[2]:
        start, end = max(size - int(found[2]), 0), size
    if start >= end:
        raise Refusal(416, "Range not satisfiable", headers={**headers, "Content-Range": f"bytes */{size}"})
    return start, end


def _sibling(path: str, entry: FileEntry, sizes: bool) -> Row:
    row: Row = {"rfilename": path}
    if sizes:
        row |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256:
            row["lfs"] = {"size": entry.size, "sha256": entry.sha256, "pointerSize": entry.pointer_bytes}
    return row


def _tree_rows(files: Mapping[str, FileEntry], prefix: str, recursive: bool) -> list[Row]:
    rows: dict[str, Row] = {}
    folders: dict[str, list[str]] = {}
    for path, entry in files.items():
        if not path.startswith(prefix):
            continue
        inner = path.removeprefix(prefix).split("/")
        for depth in range(1, len(inner) if recursive else min(2, len(inner))):
            folders.setdefault(prefix + "/".join(inner[:depth]), []).append(entry.oid)
        if recursive or len(inner) == 1:
            rows[path] = _file_row(path, entry)
    for path, oids in folders.items():
        oid = hashlib.sha1("".join(oids).encode(), usedforsecurity=False).hexdigest()
        rows[path] = {"type": "directory", "oid": oid, "size": 0, "path": path}
    return [rows[path] for path in sorted(rows)]


def _file_row(path: str, entry: FileEntry) -> Row:
    row: Row = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256:
        row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_bytes}
    return row


def _expanded(request: Request, rows: list[Row], newest: Commit) -> list[Row]:
    if request.query.get("expand", "").lower() not in ("true", "1"):
        return rows
    last = {"id": newest.oid, "title": newest.title, "date": timestamp(newest.date)}
    return [{**row, "lastCommit": last} for row in rows]


def _reference(name: str, ref: str, oid: str) -> Row:
    return {"name": name, "ref": ref, "targetCommit": oid}


def _page(
    service: Service, request: Request, rows: list[Row], name: Callable[[Row], str]
) -> tuple[list[Row], dict[str, str]]:
    """The rows after the cursor, and a Link header when more are left."""
    count = min(int(request.query.get("limit", service.rules.limits.page_rows)), service.rules.limits.page_rows)
    names = [name(row) for row in rows]
    cursor = request.query.get("cursor")
    start = names.index(cursor) + 1 if cursor in names else 0
    page = rows[start : start + count]
    if start + count >= len(rows):
        return page, {}
    query = urlencode({**request.query, "cursor": name(page[-1])})
    return page, {"Link": f'<{service.endpoint}{quote(request.path, safe="/%")}?{query}>; rel="next"'}
