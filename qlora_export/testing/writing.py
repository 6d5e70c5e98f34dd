"""What a client changes besides files: repositories, their settings, tags and branches; and what it announces."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_export.testing.attributes import ATTRIBUTES_NAME, is_ignored, is_large
from qlora_export.testing.messages import Answer, Refusal, Request, json_answer
from qlora_export.testing.service import USER, Limits, Service, repository_name, writable


def create_repository(service: Service, request: Request) -> Answer:
    """A new repository with the Hub's own first commit."""
    asked = request.json()
    owner = asked.get("organization") or USER
    _may_create(service, request, owner)
    kind = f"{asked.get('type') or 'model'}s"
    name = repository_name({"kind": kind, "owner": owner, "name": str(asked.get("name"))})
    private = asked.get("visibility") == "private" or asked.get("private") is True
    if private and service.faults.strikes("repository-turns-public"):
        private = False
    repository = service.new_repository(name, private)
    repository.begin({})
    return json_answer({"url": f"{service.endpoint}/{name}", "name": name, "id": repository.head()[:24]})


def delete_repository(service: Service, request: Request) -> Answer:
    """Forget a repository."""
    asked = request.json()
    words = {"kind": f"{asked.get('type') or 'model'}s", "name": str(asked.get("name"))}
    owned = {**words, "owner": str(asked.get("organization") or USER)}
    repository = writable(service, replace(request, words=owned))
    with service.lock:
        del service.repositories[repository.name]
    return json_answer({})


def change_settings(service: Service, request: Request) -> Answer:
    """Visibility and gating."""
    repository = writable(service, request)
    asked = request.json()
    if "visibility" in asked or "private" in asked:
        repository.private = asked.get("visibility") == "private" or asked.get("private") is True
    if "gated" in asked:
        repository.gated = asked["gated"] if asked["gated"] in ("auto", "manual") else False
    return json_answer({"private": repository.private, "gated": repository.gated})


def announce_files(service: Service, request: Request) -> Answer:
    """How each file is to be uploaded and which of it is there already; changes nothing."""
    repository = writable(service, request)
    if service.faults.strikes("preupload-429-retry-after"):
        raise Refusal(429, "Too Many Requests", headers={"Retry-After": "1"})
    if service.faults.strikes("preupload-429-ratelimit"):
        policy = {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
        raise Refusal(429, "Too Many Requests", headers=policy)
    asked = request.json()
    revision = request.words["revision"]
    head, present = repository.head(revision), repository.files(revision)
    attributes = repository.text(head, ATTRIBUTES_NAME)
    ignore = asked.get("gitIgnore") or repository.text(head, ".gitignore")
    rows = []
    for file in asked.get("files", []):
        path = str(file["path"])
        large = _goes_large(service.rules.limits, attributes, file)
        row: dict[str, Any] = {"path": path, "uploadMode": "lfs" if large else "regular"}
        row["shouldIgnore"] = is_ignored(ignore, path)
        if path in present:
            row["oid"] = present[path].etag
        rows.append(row)
    return json_answer({"files": rows, "commitOid": head})


def put_tag(service: Service, request: Request) -> Answer:
    """A new tag on a revision."""
    repository = writable(service, request)
    tag = str(request.json().get("tag", ""))
    if not tag:
        raise Refusal(400, "A tag needs a name")
    if service.faults.strikes("tag-409"):
        history = repository.commits(request.words["revision"])
        repository.tags[tag] = history[-1].oid
    repository.put_tag(tag, request.words["revision"])
    return json_answer({})


def delete_tag(service: Service, request: Request) -> Answer:
    """Forget a tag."""
    return _forget(writable(service, request).tags, request.words["revision"])


def put_branch(service: Service, request: Request) -> Answer:
    """A new branch."""
    repository = writable(service, request)
    repository.put_branch(request.words["revision"], request.json().get("startingPoint") or "main")
    return json_answer({})


def delete_branch(service: Service, request: Request) -> Answer:
    """Forget a branch."""
    repository = writable(service, request)
    if request.words["revision"] == "main":
        raise Refusal(403, "The main branch cannot be deleted")
    return _forget(repository.branches, request.words["revision"])


def _forget(references: dict[str, str], name: str) -> Answer:
    if references.pop(name, None) is None:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return json_answer({})


def _may_create(service: Service, request: Request, owner: str) -> None:
    role = request.caller.role
    if role == "anonymous" or request.caller.repository is not None:
        raise Refusal(401, "Invalid username or password.")
    allowed = not service.rules.organisations or owner in (USER, *service.rules.organisations)
    if role == "read" or not allowed or service.faults.strikes("create-403"):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')


def _goes_large(limits: Limits, attributes: str, file: Mapping[str, Any]) -> bool:
    sample = base64.b64decode(file.get("sample") or "")
    too_big = int(file.get("size", 0)) > limits.regular_bytes
    return is_large(attributes, str(file["path"])) or too_big or b"\0" in sample
