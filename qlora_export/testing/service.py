"""The Hub's state: repositories, contents, uploads under way, tokens, and who may do what."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_export.testing.faults import Faults
from qlora_export.testing.messages import Caller, Refusal, Request
from qlora_export.testing.repository import Repository
from qlora_export.testing.storage import BlobStore

USER = "rehearsal"
_PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass(frozen=True)
class Limits:
    """Sizes at which the Hub changes its ways; smaller ones let small tests meet them.

    Files above `regular_bytes` are large, large ones above `part_bytes` go up in parts, listings hold `page_rows`.
    """

    regular_bytes: int = 10_000_000
    part_bytes: int = 5_000_000_000
    page_rows: int = 1000


@dataclass(frozen=True)
class Rules:
    """How this Hub was started.

    The token that may write, organisations of its user, whether it takes uploads by xet; the path that all of its
    addresses begin with, and words in those that it does not know.
    """

    token: str | None = None
    organisations: Sequence[str] = ()
    xet: bool = False
    limits: Limits = field(default_factory=Limits)
    prefix: str = ""
    without: Sequence[str] = ()


@dataclass
class Upload:
    """A large file that was announced; `received` is (size, sha256) of what came."""

    oid: str
    size: int
    part_bytes: int | None = None
    parts: dict[int, str] = field(default_factory=dict)
    received: tuple[int, str] | None = None


class Service:
    """Everything the routes share."""

    def __init__(self, rules: Rules, store: BlobStore, faults: Sequence[str], collections: dict[str, Any]) -> None:
        self.rules, self.store, self.collections = rules, store, collections
        self.faults = Faults(faults)
        self.endpoint = ""
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, Upload] = {}
        self.publishers: dict[str, str] = {}
        self.lock = threading.RLock()
        self.closing = threading.Event()

    @property
    def organisations(self) -> list[str]:
        """Organisations of the user: those named at the start and the owners of all repositories."""
        owners = {name.split("/")[-2] for name in list(self.repositories)}
        return sorted((owners | set(self.rules.organisations)) - {USER})

    def new_repository(self, name: str, private: bool) -> Repository:
        """An empty repository without a commit; raises Refusal 409 when there is one of this name."""
        with self.lock:
            if name in self.repositories:
                message = "You already created this model repo"
                raise Refusal(409, message, url=f"{self.endpoint}/{name}", name=name)
            return self.repositories.setdefault(name, Repository(name, self.store, private))

    def new_upload(self, upload: Upload) -> str:
        """A ticket for an announced file."""
        ticket = secrets.token_hex(16)
        with self.lock:
            self.uploads[ticket] = upload
        return ticket

    def new_publisher(self, repository: str) -> str:
        """A token that may write to one repository and create none."""
        token = f"hf_jwt_{secrets.token_hex(16)}"
        with self.lock:
            self.publishers[token] = repository
        return token


def identify(service: Service, request: Request) -> Request:
    """The request with its caller; raises Refusal 401 when its token is not one of ours."""
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
    expected = service.rules.token
    if f"{service.rules.prefix}/xet/" in request.path:
        return request
    if bearer:
        committing = re.search(r"/commit/", request.path) is not None
        if service.faults.token_expires(committing):
            raise _invalid_token()
    if bearer in service.publishers:
        return replace(request, caller=Caller("write", service.publishers[bearer]))
    if expected is None or (bearer and secrets.compare_digest(bearer.encode(), expected.encode())):
        return replace(request, caller=Caller("write"))
    if bearer == f"read:{expected}":
        return replace(request, caller=Caller("read"))
    if bearer:
        raise _invalid_token()
    return request


def readable(service: Service, request: Request) -> Repository:
    """The repository that the path names; raises Refusal when the caller may not see it."""
    name = repository_name(request.words)
    repository = service.repositories.get(name)
    hidden = repository is not None and repository.private and not _sees(request.caller, name)
    if repository is None or hidden:
        status = 401 if hidden and request.caller.role == "anonymous" else 404
        raise Refusal(status, "Repository not found", "RepoNotFound")
    return repository


def writable(service: Service, request: Request) -> Repository:
    """The repository that the path names; raises Refusal when the caller may not write to it."""
    if request.caller.role == "anonymous":
        raise Refusal(401, "Invalid username or password.")
    repository = readable(service, request)
    if request.caller.role == "read" or request.caller.repository not in (None, repository.name):
        raise Refusal(403, f"You don't have write access to {repository.name}: the token may only read")
    return repository


def repository_name(words: Mapping[str, str]) -> str:
    """The name of a repository as it stands in its address: models have no prefix."""
    kind = words.get("kind") or "models"
    return f"{_PREFIXES[kind.rstrip('/')]}{words['owner']}/{words['name']}"


def _sees(caller: Caller, name: str) -> bool:
    return caller.role != "anonymous" and caller.repository in (None, name)


def _invalid_token() -> Refusal:
    return Refusal(401, "Invalid credentials in Authorization header")
