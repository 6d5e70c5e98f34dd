"""A repository as data: commits with their whole file table, branches, tags and pull requests that point at them.

A commit's id is the sha1 of its parent, files and message, so the same history has the same ids in every run.
Every change happens under the repository's lock and is complete or not there at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

from qlora_export.testing.attributes import ATTRIBUTES_NAME, DEFAULT_ATTRIBUTES, is_large, large_rule
from qlora_export.testing.messages import Refusal
from qlora_export.testing.storage import BlobStore, FileEntry

MAIN = "main"


@dataclass(frozen=True)
class Commit:
    """One state of all files."""

    oid: str
    parent: str | None
    title: str
    message: str
    files: Mapping[str, FileEntry]
    date: datetime


@dataclass(frozen=True)
class Change:
    """What a commit does: removals first, then writes; `parent` is the head it expects."""

    title: str
    message: str = ""
    parent: str | None = None
    writes: Mapping[str, FileEntry] = field(default_factory=dict)
    removed_files: tuple[str, ...] = ()
    removed_folders: tuple[str, ...] = ()


@dataclass
class Discussion:
    """A discussion, or a pull request with the commits it starts from and proposes; `status` changes over time."""

    number: int
    title: str
    description: str
    status: str
    base: str | None = None
    head: str | None = None
    merged_as: str | None = None
    date: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def is_pull_request(self) -> bool:
        """Whether it proposes commits."""
        return self.head is not None

    @property
    def ref(self) -> str:
        """The revision of its head."""
        return f"refs/pr/{self.number}"


class Repository:
    """History and references of one repository."""

    def __init__(self, name: str, store: BlobStore, private: bool = False) -> None:
        self.name, self.private = name, private
        self.gated: str | bool = False
        self.created = datetime.now(UTC)
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.discussions: dict[int, Discussion] = {}
        self.lock = threading.RLock()
        self._store = store
        self._commits: dict[str, Commit] = {}

    @property
    def pull_requests(self) -> dict[int, Discussion]:
        """Pull requests by number."""
        return {number: item for number, item in self.discussions.items() if item.is_pull_request}

    def head(self, ref: str = MAIN) -> str:
        """The commit a branch, tag, pull request or (shortened) id means; raises Refusal when there is none."""
        named = self.branches.get(ref.removeprefix("refs/heads/")) or self.tags.get(ref.removeprefix("refs/tags/"))
        if named:
            return named
        if (pull := re.fullmatch(r"refs/pr/(\d+)", ref)) and (request := self.pull_requests.get(int(pull[1]))):
            return str(request.head)
        found = [oid for oid in self._commits if oid.startswith(ref.lower())] if len(ref) >= 7 else []
        if len(found) != 1:
            raise Refusal(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        return found[0]

    def commits(self, ref: str = MAIN) -> list[Commit]:
        """The history of a revision, newest first."""
        history = [self._commits[self.head(ref)]]
        while (parent := history[-1].parent) is not None:
            history.append(self._commits[parent])
        return history

    def files(self, ref: str = MAIN) -> dict[str, FileEntry]:
        """All files of a revision by path, sorted."""
        return dict(self._commits[self.head(ref)].files)

    def read(self, ref: str, path: str) -> bytes:
        """A whole file; raises Refusal when the revision has none of this name."""
        files = self.files(ref)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return self._store.path(files[path]).read_bytes()

    def text(self, ref: str, path: str) -> str:
        """A small text file, empty when there is none."""
        return self.read(ref, path).decode(errors="replace") if path in self.files(ref) else ""

    def begin(self, files: Mapping[str, FileEntry], title: str = "initial commit") -> Commit:
        """The first commit; adds the Hub's own .gitattributes when there are none."""
        with self.lock:
            attributes = {ATTRIBUTES_NAME: self._store.keep(DEFAULT_ATTRIBUTES.encode())}
            commit = self._record(None, Change(title), {**attributes, **files})
            self.branches[MAIN] = commit.oid
            return commit

    def commit(self, change: Change, ref: str = MAIN) -> Commit:
        """Apply a change on top of a branch or pull request; raises Refusal 412 when the expected parent has moved."""
        with self.lock:
            head = self.head(ref)
            if change.parent is not None and not head.startswith(change.parent.lower()):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            commit = self._record(head, change, self._changed(head, change))
            self._move(ref, commit.oid)
            return commit

    def propose(self, change: Change, ref: str = MAIN) -> tuple[Commit, Discussion]:
        """Apply a change as a new pull request, which starts at its expected parent or else at `ref`."""
        with self.lock:
            base = self.head(change.parent or ref)
            commit = self._record(base, change, self._changed(base, change))
            return commit, self.discuss(change.title, change.message, base, commit.oid)

    def discuss(self, title: str, description: str, base: str | None = None, head: str | None = None) -> Discussion:
        """A new discussion, or a pull request when it has a head."""
        with self.lock:
            status = "draft" if base is not None and base == head else "open"
            item = Discussion(len(self.discussions) + 1, title, description, status, base, head)
            self.discussions[item.number] = item
            return item

    def merge(self, number: int) -> Commit:
        """Bring what a pull request changed to the main branch; raises Refusal unless it is open."""
        with self.lock:
            item = self.pull_requests.get(number)
            if item is None:
                raise Refusal(404, f"Pull request {number} not found")
            if item.status not in ("open", "draft"):
                raise Refusal(400, f"Pull request {number} is {item.status}")
            before, after = self.files(str(item.base)), self.files(str(item.head))
            change = Change(
                f"{item.title} (#{number})",
                writes={path: entry for path, entry in after.items() if before.get(path) != entry},
                removed_files=tuple(sorted(before.keys() - after.keys() & self.files().keys())),
            )
            commit = self.commit(change)
            item.status, item.merged_as = "merged", commit.oid
            return commit

    def put_tag(self, tag: str, ref: str) -> None:
        """Name a commit; raises Refusal 409 when the name is taken."""
        with self.lock:
            if tag in self.tags:
                raise Refusal(409, f"Tag {tag} already exists")
            self.tags[tag] = self.head(ref)

    def put_branch(self, branch: str, ref: str) -> None:
        """A new branch; raises Refusal 409 when the name is taken."""
        with self.lock:
            if branch in self.branches:
                raise Refusal(409, f"Reference {branch} already exists")
            self.branches[branch] = self.head(ref)

    def _move(self, ref: str, oid: str) -> None:
        branch = ref.removeprefix("refs/heads/")
        if branch in self.branches:
            self.branches[branch] = oid
        elif ref.startswith("refs/pr/"):
            request = self.pull_requests[int(ref.rsplit("/", 1)[-1])]
            request.head = oid
            request.status = "open" if request.status == "draft" else request.status
        else:
            raise Refusal(400, f"{ref} is no branch: nothing can be committed to it")

    def _changed(self, head: str, change: Change) -> dict[str, FileEntry]:
        files = dict(self._commits[head].files)
        for path in change.removed_files:
            if files.pop(path, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for folder in change.removed_folders:
            inside = [path for path in files if path.startswith(folder.rstrip("/") + "/")]
            if not inside:
                raise Refusal(404, f"A folder with this name doesn't exist: {folder}", "EntryNotFound")
            for path in inside:
                del files[path]
        files.update(change.writes)
        return self._with_rules(files, change.writes)

    def _with_rules(self, files: dict[str, FileEntry], writes: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
        """As on the Hub, large files that no rule names get a line in .gitattributes."""
        rules = self._store.path(files[ATTRIBUTES_NAME]).read_text() if ATTRIBUTES_NAME in files else ""
        new = [path for path, entry in writes.items() if entry.sha256 and not is_large(rules, path)]
        if new:
            rules += "" if rules.endswith("\n") or not rules else "\n"
            files[ATTRIBUTES_NAME] = self._store.keep((rules + "".join(map(large_rule, new))).encode())
        return files

    def _record(self, parent: str | None, change: Change, files: dict[str, FileEntry]) -> Commit:
        table = {path: files[path] for path in sorted(files)}
        facts = [parent, change.title, change.message, [(path, entry.oid) for path, entry in table.items()]]
        oid = hashlib.sha1(json.dumps([self.name, *facts]).encode(), usedforsecurity=False).hexdigest()
        commit = Commit(oid, parent, change.title, change.message, MappingProxyType(table), datetime.now(UTC))
        return self._commits.setdefault(oid, commit)
