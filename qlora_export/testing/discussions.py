"""Discussions and pull requests."""

from __future__ import annotations

from typing import Any

from qlora_export.testing.messages import Answer, Refusal, Request, json_answer
from qlora_export.testing.reading import timestamp
from qlora_export.testing.repository import Discussion, Repository
from qlora_export.testing.service import USER, Service, readable, writable

_PAGE_ROWS = 50


def start_discussion(service: Service, request: Request) -> Answer:
    """A new discussion, or a pull request that proposes nothing yet."""
    repository = writable(service, request)
    asked = request.json()
    head = repository.head() if asked.get("pullRequest") else None
    item = repository.discuss(str(asked.get("title")), str(asked.get("description") or ""), head, head)
    return json_answer({"num": item.number, "pullRequest": item.is_pull_request})


def list_discussions(service: Service, request: Request) -> Answer:
    """All of a kind and status, newest first, in pages."""
    repository = readable(service, request)
    kind, status = request.query.get("type", "all"), request.query.get("status", "all")
    found = [
        _row(repository, item)
        for item in reversed(repository.discussions.values())
        if kind in ("all", "pull_request" if item.is_pull_request else "discussion")
        and (status == "all" or (status == "open") == (item.status in ("open", "draft")))
        and request.query.get("author", USER) == USER
    ]
    start = int(request.query.get("p", 0)) * _PAGE_ROWS
    return json_answer({"discussions": found[start : start + _PAGE_ROWS], "count": len(found), "start": start})


def describe_discussion(service: Service, request: Request) -> Answer:
    """One discussion."""
    repository = readable(service, request)
    return json_answer(_details(repository, _item(repository, request)))


def merge_pull_request(service: Service, request: Request) -> Answer:
    """Bring a pull request's changes to the main branch."""
    repository = writable(service, request)
    request.json()
    commit = repository.merge(int(request.words["number"]))
    return json_answer({"mergeCommitId": commit.oid})


def change_status(service: Service, request: Request) -> Answer:
    """Open or close."""
    repository = writable(service, request)
    item, status = _item(repository, request), str(request.json().get("status"))
    if status not in ("open", "closed") or item.status == "merged":
        raise Refusal(400, f"Discussion {item.number} is {item.status} and cannot become {status}")
    item.status = status
    event = {"id": f"{item.number}-{status}", "type": "status-change", "createdAt": timestamp(item.date)}
    return json_answer({"newStatus": {**event, "author": {"name": USER}, "data": {"status": status}}})


def _item(repository: Repository, request: Request) -> Discussion:
    item = repository.discussions.get(int(request.words["number"]))
    if item is None:
        raise Refusal(404, f"Discussion {request.words['number']} not found")
    return item


def _row(repository: Repository, item: Discussion) -> dict[str, Any]:
    prefix, _, name = f"models/{repository.name}".rpartition("/")
    kind, owner = prefix.split("/")[-2].rstrip("s"), prefix.split("/")[-1]
    return {
        "num": item.number,
        "title": item.title,
        "status": item.status,
        "isPullRequest": item.is_pull_request,
        "author": {"name": USER},
        "createdAt": timestamp(item.date),
        "repo": {"name": f"{owner}/{name}", "type": kind},
    }


def _details(repository: Repository, item: Discussion) -> dict[str, Any]:
    details = {**_row(repository, item), "events": [], "filesWithConflicts": [], "diff": ""}
    if item.is_pull_request:
        details["changes"] = {"base": "refs/heads/main", "mergeCommitId": item.merged_as}
    return details
