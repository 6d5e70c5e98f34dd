"""One repository on the Hub, as the child process sees it: a thin layer over huggingface_hub that reads and creates."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import HfApi, get_session, set_client_factory
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from qlora_export._version import __version__
from qlora_export.errors import RemoteConflict
from qlora_export.publish.hub.failures import NOT_SPOKEN, is_transient, status_of, translated
from qlora_export.publish.hub.job import PROVENANCE_PATH, PublishedRevision, Target

Answer = TypeVar("Answer")
PAUSES_SECONDS = (0.5, 2.0, 5.0)
PULL_REQUESTS_LOOKED_AT = 10
CREATION_HINT = "a trusted publisher's token cannot create a repository: create it first, or set HF_TOKEN"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit: its size, and the sha256 of a stored object or the git blob's sha1."""

    bytes: int
    sha256: str | None
    git_sha1: str


def connect(endpoint: str | None, timeout_seconds: float) -> HfApi:
    """The client, whose every request ends after a silence of `timeout_seconds`; its own default waits for ever."""
    kind, hooks = type(get_session()), get_session().event_hooks
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=timeout_seconds))
    return HfApi(endpoint=endpoint, library_name="qlora-export", library_version=__version__)


def asked(place: str, ask: Callable[[], Answer]) -> Answer:
    """What the Hub answers; asks again while it may still answer, then raises an error of ours."""
    for pause in (*PAUSES_SECONDS, None):
        try:
            return ask()
        except Exception as error:
            if pause is None or not is_transient(error):
                raise translated(error, place) from error
            time.sleep(pause)
    raise AssertionError


class Remote:
    """A target on the Hub."""

    def __init__(self, api: HfApi, target: Target) -> None:
        self.api = api
        self.target = target
        self.name = target.repository

    def exists(self) -> bool:
        """Whether the repository is there; raises RemoteConflict when others may see what is to be private."""
        try:
            private = asked(self.name, lambda: self.api.repo_info(self.name).private)
        except Exception as error:
            if _is_absent(error):
                return False
            raise
        self._require_visibility(bool(private))
        return True

    def create(self) -> None:
        """Create what is missing of repository and branch, and read the visibility back before anything is sent."""
        private = self.target.visibility == "private"
        if not self.exists():
            try:
                asked(self.name, lambda: self.api.create_repo(self.name, private=private, exist_ok=True))
            except Exception as error:
                if hasattr(error, "hint"):
                    error.hint = f"{error.hint}; {CREATION_HINT}"
                raise
            self._require_visibility(bool(asked(self.name, lambda: self.api.repo_info(self.name).private)))
        if self.target.branch != "main" and self.head() is None:
            asked(self.name, lambda: self.api.create_branch(self.name, branch=self.target.branch, exist_ok=True))

    def speaks_xet(self) -> bool:
        """Whether the endpoint gives out tokens for xet; the client itself would not fall back to classic LFS."""
        address = f"{self.api.endpoint}/api/models/{self.name}/xet-write-token/{quote(self.target.branch, safe='')}"

        def ask() -> bool:
            response = get_session().get(address, headers=build_hf_headers())
            if response.status_code in NOT_SPOKEN:
                return False
            hf_raise_for_status(response)
            return "X-Xet-Cas-Url" in response.headers

        return asked(self.name, ask)

    def head(self, revision: str | None = None) -> str | None:
        """The commit of a revision, by default of the target's branch; None when there is no such revision."""
        name = revision or self.target.branch
        try:
            return str(asked(self.name, lambda: self.api.repo_info(self.name, revision=name).sha))
        except Exception as error:
            if isinstance(error.__cause__, RevisionNotFoundError) or _is_absent(error):
                return None
            raise

    def tree(self, revision: str) -> dict[str, RemoteFile]:
        """Every file of a revision."""

        def listed() -> dict[str, RemoteFile]:
            entries = self.api.list_repo_tree(self.name, recursive=True, revision=revision)
            return {entry.path: _remote_file(entry) for entry in entries if hasattr(entry, "blob_id")}

        return asked(self.name, listed)

    def message(self, commit: str) -> str | None:
        """A commit's title and message; None where the endpoint has no history."""
        try:
            history = asked(self.name, lambda: self.api.list_repo_commits(self.name, revision=commit))
        except Exception as error:
            if status_of(error) in NOT_SPOKEN:
                return None
            raise
        return f"{history[0].title}\n{history[0].message}" if history else None

    def tags(self) -> dict[str, str]:
        """Tags and the commits they name."""
        refs = asked(self.name, lambda: self.api.list_repo_refs(self.name))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def pull_requests(self) -> dict[str, str]:
        """Refs of pull requests and their commits, newest first."""
        refs = asked(self.name, lambda: self.api.list_repo_refs(self.name, include_pull_requests=True))
        found = {item.ref: item.target_commit for item in refs.pull_requests or ()}
        return dict(sorted(found.items(), key=lambda item: -int(item[0].rsplit("/", 1)[-1])))

    def is_open(self, reference: str) -> bool:
        """Whether a pull request still waits for its merge."""
        number = int(reference.rsplit("/", 1)[-1])
        details = asked(self.name, lambda: self.api.get_discussion_details(self.name, number))
        return details.status in ("open", "draft")

    def read(self, path: str, commit: str) -> str | None:
        """A small text file of a commit; None when it is not there."""
        with TemporaryDirectory() as cache:

            def fetch() -> str:
                return str(self.api.hf_hub_download(self.name, path, revision=commit, cache_dir=cache))

            try:
                return Path(asked(self.name, fetch)).read_bytes().decode("utf-8", errors="replace")
            except Exception as error:
                if isinstance(error.__cause__, EntryNotFoundError):
                    return None
                raise

    def candidates(self, texts: tuple[str, ...]) -> list[PublishedRevision]:
        """Revisions that may hold a publication of ours: the version's tag, the branch, open pull requests."""
        revisions: dict[str, str] = {}
        if self.target.version is not None and (tagged := self.tags().get(self.target.version)) is not None:
            revisions[self.target.version] = tagged
        if (head := self.head()) is not None:
            revisions[self.target.branch] = head
        if self.target.mode == "pull-request":
            waiting = list(self.pull_requests().items())[:PULL_REQUESTS_LOOKED_AT]
            revisions |= {reference: commit for reference, commit in waiting if self.is_open(reference)}
        return [self._found(revision, commit, texts) for revision, commit in revisions.items()]

    def _found(self, revision: str, commit: str, texts: tuple[str, ...]) -> PublishedRevision:
        """What a revision says of itself; without a provenance of ours, only its card matters."""
        paths = set(self.tree(commit))
        wanted = texts if PROVENANCE_PATH in paths else texts[:1]
        read = {path: self.read(path, commit) for path in wanted if path in paths}
        return PublishedRevision(revision, commit, {path: text for path, text in read.items() if text is not None})

    def _require_visibility(self, private: bool) -> None:
        if private == (self.target.visibility == "private"):
            return
        now = "private" if private else "public"
        raise RemoteConflict(
            f"{self.name}: the repository is {now}, the recipe asks for {self.target.visibility}",
            "an upload does not change who may see a repository: change it on the Hub, or publish.visibility",
        )


def git_blob_sha1(path: Path) -> str:
    """What git calls a file of this content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _is_absent(error: Exception) -> bool:
    """Whether the Hub says that there is no such repository, or none that this token may see."""
    cause = error.__cause__
    return isinstance(cause, RepositoryNotFoundError) and isinstance(cause, HfHubHTTPError) and status_of(cause) == 404


def _remote_file(entry: Any) -> RemoteFile:
    stored = entry.lfs
    return RemoteFile(entry.size, str(stored.sha256) if stored is not None else None, str(entry.blob_id))
