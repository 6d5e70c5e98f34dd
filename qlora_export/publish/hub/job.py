"""What the publisher asks of its child process: one JSON object on stdin, NDJSON on stdout, the last line the answer.

    {"operation": "look", "targets": [...], ...}
    {"progress": [done, total, "what"]}
    {"result": {...}}  or  {"error": {"exit_code": 8, "message": "...", "hint": "..."}}

The client reads its environment when it is imported (xet, endpoint, offline), hence a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Mode = Literal["commit", "pull-request"]
Visibility = Literal["private", "public"]
DOCUMENTS_FOLDER = "qlora-export"
REPORT_PATH = f"{DOCUMENTS_FOLDER}/report.json"
PROVENANCE_PATH = f"{DOCUMENTS_FOLDER}/provenance.json"
BOM_PATH = f"{DOCUMENTS_FOLDER}/bom.cdx.json"
CARD_PATH = "README.md"
CHECKSUMS_PATH = "SHA256SUMS"
SIGNATURE_PATH = "model.sig"
EDITED_BY_PEOPLE = (CARD_PATH, ".gitattributes")


@dataclass(frozen=True)
class Target:
    """A branch of a repository, and how it is to be written."""

    repository: str
    branch: str = "main"
    visibility: Visibility = "private"
    mode: Mode = "commit"
    version: str | None = None


@dataclass(frozen=True)
class PublishedRevision:
    """A revision that may already hold the publication: how it is called, its commit, and the texts that tell."""

    revision: str
    commit: str
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetState:
    """What is at a target now; `head` is None where there is no such repository."""

    target: Target
    head: str | None
    candidates: tuple[PublishedRevision, ...] = ()


@dataclass(frozen=True)
class Upload:
    """Everything of one commit: the allow-list of files below `folder`, and the head it was made for.

    `revision` names that head; it is a tag or a pull request where one holds this publication already. `title` and
    `description` are the commit's message, which tells this publication from every other.
    """

    target: Target
    folder: str
    files: Mapping[str, Mapping[str, Any]]
    prefixes: tuple[str, ...]
    parent: str | None
    revision: str
    title: str
    description: str
    journal: str


@dataclass(frozen=True)
class Committed:
    """The commit that holds the publication; `changed` is False when it was there before."""

    repository: str
    commit: str
    revision: str
    url: str
    changed: bool


def as_data(value: Any) -> dict[str, Any]:
    """A value of this module as JSON data."""
    return asdict(value)


def target_from(data: Mapping[str, Any]) -> Target:
    """The target that was sent."""
    return Target(**data)


def seen_from(data: Mapping[str, Any]) -> TargetState:
    """What was seen, as it was answered."""
    return TargetState(
        target_from(data["target"]), data["head"], tuple(PublishedRevision(**item) for item in data["candidates"])
    )


def upload_from(data: Mapping[str, Any]) -> Upload:
    """The upload that was sent."""
    return Upload(**{**data, "target": target_from(data["target"]), "prefixes": tuple(data["prefixes"])})
