"""Upload, one commit, reconcile, verify: what happens on the Hub between the dry run and the tag.

    preupload   what is there already; changes nothing
    upload      stored objects one by one, each noted in the journal; no reference moves
    commit      all additions and the deletion of stale weights, guarded by the parent that the release was made for
    reconcile   after whatever went wrong, the tree decides: there, not there, or somebody else's
    verify      every path's digest in the commit's own tree

The commit is the only call that must not be repeated blindly: a lost answer may belong to a commit that landed.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from qlora_export.errors import RemoteConflict, VerifyMismatch
from qlora_export.publish.hub.failures import is_transient, translated
from qlora_export.publish.hub.job import CHECKSUMS_PATH, Committed, Upload
from qlora_export.publish.hub.remote import PAUSES_SECONDS, Remote, RemoteFile, asked, git_blob_sha1

WEIGHTS = re.compile(r"[^/]+\.(safetensors|safetensors\.index\.json|onnx|onnx\.data|onnx_data|onnx_adapter)")
LISTED = re.compile(r"[0-9a-f]{64} [ *](.+)")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Prepared:
    """An upload whose objects all lie on the Hub, ready for its commit."""

    upload: Upload
    remote: Remote
    journal: PublicationJournal
    additions: tuple[CommitOperationAdd, ...]
    deletions: tuple[str, ...]


def prepare(remote: Remote, upload: Upload, progress: Progress) -> Prepared:
    """Send every stored object that the Hub lacks; no reference of the repository moves."""
    journal = PublicationJournal(Path(upload.journal))
    additions = tuple(_addition(upload, path) for path in sorted(upload.files))
    before = remote.tree(upload.parent) if upload.parent else {}
    total, done = sum(int(facts["bytes"]) for facts in upload.files.values()), 0
    for addition in additions:
        facts = upload.files[addition.path_in_repo]
        if not _holds(before.get(addition.path_in_repo), addition, facts):
            progress(done, total, f"{upload.target.repository}: {addition.path_in_repo}")
            _send(remote, upload, addition)
            journal.note(uploaded=facts["sha256"], path=addition.path_in_repo)
        done += int(facts["bytes"])
        progress(done, total, upload.target.repository)
    return Prepared(upload, remote, journal, additions, _stale(remote, upload, before))


def commit(prepared: Prepared) -> Committed:
    """Make the one commit, or find the one that was made; raises RemoteConflict when somebody else published there."""
    upload, remote = prepared.upload, prepared.remote
    if upload.parent is not None and _matches(prepared, remote.tree(upload.parent)):
        return _committed(prepared, upload.parent, upload.revision, changed=False)
    for pause in (*PAUSES_SECONDS, None):
        prepared.journal.note(committing=upload.parent)
        try:
            made = _create(prepared)
        except Exception as error:
            if (landed := _reconcile(prepared, error)) is not None:
                return landed
            if pause is None or not is_transient(error):
                raise translated(error, upload.target.repository) from error
            time.sleep(pause)
        else:
            reference = _reference_of(made, upload)
            prepared.journal.note(committed=made.oid, revision=reference)
            return _committed(prepared, str(made.oid), reference, changed=True)
    raise AssertionError


def require_arrived(prepared: Prepared, committed: Committed) -> None:
    """Compare every path of the commit's tree; raises VerifyMismatch naming the first that is not ours."""
    if wrong := _settled_difference(prepared, committed.commit):
        raise VerifyMismatch(
            f"{committed.repository}@{committed.commit}: {wrong}",
            "the commit is there and not what was sent: do not use it; run again, or take the commit back on the Hub",
        )


def _addition(upload: Upload, path: str) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(Path(upload.folder) / path))


def _send(remote: Remote, upload: Upload, addition: CommitOperationAdd) -> None:
    """Send one file if the Hub stores it as an object; hashes it, so a file that changed since is noticed here."""
    asked(
        remote.name,
        lambda: remote.api.preupload_lfs_files(
            remote.name,
            [addition],
            revision=upload.target.branch,
            create_pr=upload.target.mode == "pull-request",
            free_memory=False,
        ),
    )
    expected = str(upload.files[addition.path_in_repo]["sha256"])
    if (found := addition.upload_info.sha256.hex()) != expected:
        raise VerifyMismatch(
            f"{addition.path_in_repo}: has sha256 {found[:12]} now, {expected[:12]} was released",
            "the file changed while it was published; nothing was committed",
        )


def _create(prepared: Prepared) -> Any:
    upload, remote = prepared.upload, prepared.remote
    deletions = [CommitOperationDelete(path) for path in prepared.deletions]
    return remote.api.create_commit(
        remote.name,
        [*prepared.additions, *deletions],
        commit_message=upload.title,
        commit_description=upload.description,
        revision=upload.target.branch,
        parent_commit=upload.parent,
        create_pr=upload.target.mode == "pull-request",
    )


def _reconcile(prepared: Prepared, error: Exception) -> Committed | None:
    """Where the commit landed although it seemed to fail; None when nothing moved; RemoteConflict when others moved."""
    upload, remote = prepared.upload, prepared.remote
    if upload.target.mode == "pull-request":
        for reference, oid in remote.pull_requests().items():
            if _matches(prepared, remote.tree(oid)):
                return _committed(prepared, oid, reference, changed=True)
        return None
    head = remote.head()
    if head is None or head == upload.parent:
        return None
    if _matches(prepared, remote.tree(head)) or (
        _may_be_ours(prepared, head) and not _settled_difference(prepared, head)
    ):
        prepared.journal.note(committed=head, revision=upload.target.branch, reconciled=True)
        return _committed(prepared, head, upload.target.branch, changed=True)
    raise RemoteConflict(
        f"{remote.name}: {upload.target.branch} moved from {str(upload.parent)[:12]} to {head[:12]} while this release "
        f"was published",
        "look at that commit, then run again: nothing of this release is on the branch",
    ) from error


def _may_be_ours(prepared: Prepared, commit_oid: str) -> bool:
    """Whether a commit has our message and its listing is worth waiting for; True where the endpoint tells none."""
    told, upload = prepared.remote.message(commit_oid), prepared.upload
    return told is None or (upload.title in told and upload.description in told)


def _reference_of(made: Any, upload: Upload) -> str:
    return str(made.pr_revision) if made.pr_revision else upload.target.branch


def _committed(prepared: Prepared, oid: str, reference: str, changed: bool) -> Committed:
    remote = prepared.remote
    url = f"{remote.api.endpoint}/{remote.name}"
    if reference.startswith("refs/pr/"):
        url = f"{url}/discussions/{reference.rsplit('/', 1)[-1]}"
    return Committed(remote.name, oid, reference, url, changed)


def _settled_difference(prepared: Prepared, commit_oid: str) -> str:
    """In words what differs in a fresh commit's tree, looked at again for as long as a listing may lag behind it."""
    for pause in (*PAUSES_SECONDS, None):
        wrong = _first_difference(prepared, prepared.remote.tree(commit_oid))
        if not wrong or pause is None:
            return wrong
        time.sleep(pause)
    raise AssertionError


def _matches(prepared: Prepared, tree: Mapping[str, RemoteFile]) -> bool:
    return not _first_difference(prepared, tree)


def _first_difference(prepared: Prepared, tree: Mapping[str, RemoteFile]) -> str:
    """In words, the first path of a tree that is not as this release has it."""
    for addition in prepared.additions:
        path = addition.path_in_repo
        if path not in tree:
            return f"{path} is missing"
        if not _holds(tree[path], addition, prepared.upload.files[path]):
            return f"{path} has other content ({tree[path].sha256 or tree[path].git_sha1})"
    for path in sorted(tree):
        if path not in prepared.upload.files and _is_stale_weight(path, prepared.upload.prefixes):
            return f"{path} does not belong to this release"
    return ""


def _holds(found: RemoteFile | None, addition: CommitOperationAdd, facts: Mapping[str, Any]) -> bool:
    if found is None or found.bytes != facts["bytes"]:
        return False
    if found.sha256 is not None:
        return found.sha256 == str(facts["sha256"])
    return found.git_sha1 == git_blob_sha1(Path(str(addition.path_or_fileobj)))


def _stale(remote: Remote, upload: Upload, before: Mapping[str, RemoteFile]) -> tuple[str, ...]:
    """Remote weights of our places that this release does not have, and files that an earlier release listed."""
    listing = remote.read(CHECKSUMS_PATH, str(upload.parent)) if CHECKSUMS_PATH in before else None
    formerly = {match[1] for line in (listing or "").splitlines() if (match := LISTED.fullmatch(line))}
    return tuple(
        path
        for path in sorted(before)
        if path not in upload.files and (path in formerly or _is_stale_weight(path, upload.prefixes))
    )


def _is_stale_weight(path: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a path names weights directly in one of the folders that this release owns."""
    return any(path.startswith(prefix) and WEIGHTS.fullmatch(path.removeprefix(prefix)) for prefix in prefixes)


class PublicationJournal:
    """What a publication has sent so far, as evidence: one JSON object a line; a last line that was torn is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        self.events = [json.loads(line) for line in whole]
        if len(whole) < len(lines):
            os.truncate(path, sum(map(len, whole)))

    def note(self, **event: Any) -> None:
        """Write an event down; raises OSError when the disk does not take it."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            os.write(descriptor, json.dumps(event).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.events.append(event)
