"""Collections: named lists of repositories."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from qlora_export.testing.messages import Answer, Refusal, Request, json_answer
from qlora_export.testing.service import Service

_MADE = "2024-01-01T00:00:00.000Z"


def create_collection(service: Service, request: Request) -> Answer:
    """A new, empty collection."""
    _require_writer(request)
    asked = request.json()
    title, owner = str(asked.get("title")), str(asked.get("namespace"))
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    slug = f"{owner}/{words}-{hashlib.sha256(title.encode()).hexdigest()[:24]}"
    with service.lock:
        if slug in service.collections:
            raise Refusal(409, "Collection already exists", slug=slug)
        service.collections[slug] = []
    return _describe(service, slug)


def describe_collection(service: Service, request: Request) -> Answer:
    """A collection and its items."""
    return _describe(service, _slug(service, request))


def add_item(service: Service, request: Request) -> Answer:
    """Put a repository into a collection; refused when it is there or does not exist."""
    _require_writer(request)
    slug, asked = _slug(service, request), request.json()
    item = {"id": str(asked["item"]["id"]), "type": str(asked["item"]["type"]), "note": asked.get("note")}
    name = item["id"] if item["type"] == "model" else f"{item['type']}s/{item['id']}"
    if name not in service.repositories:
        raise Refusal(404, f"{name} does not exist")
    with service.lock:
        if any((old["id"], old["type"]) == (item["id"], item["type"]) for old in service.collections[slug]):
            raise Refusal(409, "Item is already in the collection")
        service.collections[slug].append(item)
    return _describe(service, slug)


def remove_item(service: Service, request: Request) -> Answer:
    """Take an item out of a collection."""
    _require_writer(request)
    slug = _slug(service, request)
    with service.lock:
        left = [item for item in service.collections[slug] if _identity(item) != request.words["item"]]
        if len(left) == len(service.collections[slug]):
            raise Refusal(404, "No such item")
        service.collections[slug] = left
    return json_answer({})


def _describe(service: Service, slug: str) -> Answer:
    items: Sequence[dict[str, Any]] = service.collections[slug]
    rows = [
        {
            "_id": _identity(item),
            "id": item["id"],
            "type": item["type"],
            "position": position,
            **({"note": {"text": item["note"]}} if item.get("note") else {}),
        }
        for position, item in enumerate(items)
    ]
    owner, _, title = slug.partition("/")
    facts = {"slug": slug, "title": title.rpartition("-")[0], "owner": {"name": owner, "type": "org"}, "items": rows}
    shown = {"lastUpdated": _MADE, "position": 0, "private": False, "theme": "blue", "upvotes": 0}
    return json_answer({**facts, **shown})


def _identity(item: dict[str, Any]) -> str:
    return hashlib.sha256(f"{item['type']}:{item['id']}".encode()).hexdigest()[:24]


def _slug(service: Service, request: Request) -> str:
    slug = f"{request.words['owner']}/{request.words['name']}"
    if slug not in service.collections:
        raise Refusal(404, f"Collection {slug} not found")
    return slug


def _require_writer(request: Request) -> None:
    if request.caller.role != "write":
        raise Refusal(401 if request.caller.role == "anonymous" else 403, "This token may not change collections")
