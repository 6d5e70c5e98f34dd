"""The allow-list against the disk and against the manifests: what is published is what was made, nothing more or less.

A listed file is one of an artifact's manifest (with the facts of that manifest), the manifest itself, or one of the few
that the publisher adds. Digests are compared at upload, where the bytes are read anyway; here sizes are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_export.artifact import MANIFEST_NAME, Artifact
from qlora_export.errors import Problem
from qlora_export.publish.lint.contents import Contents
from qlora_export.publish.lint.names import collisions, disguised, hostile, kind_problem, name_problems, walk
from qlora_export.publish.lint.rules import finding
from qlora_export.publish.staged_folder import Staged

ADDED = re.compile(
    r"README\.md|\.gitattributes|SHA256SUMS|model\.sig|(LICEN[CS]E|NOTICE|USE_POLICY)(\.(md|txt))?"
    r"|qlora-export/[A-Za-z0-9][A-Za-z0-9._-]*\.(json|md|html|xml|yaml)|\.eval_results/.+"
)
REBUILD = "build and stage the artifact again; publish nothing by hand"


def look_over(staged: Staged) -> tuple[Contents, list[Problem]]:
    """The files that may be opened, and every finding about names, kinds and sizes."""
    present = dict(walk(staged.folder))
    problems: list[Problem] = []
    for path in sorted({*present, *staged.files}):
        problems += name_problems(path)
    problems += collisions(path for path in {*present, *staged.files} if not hostile(path))
    readable = set()
    for path, status in present.items():
        if found := kind_problem(path, status.st_mode):
            problems.append(found)
        elif path not in staged.files:
            problems.append(finding("foreign-file", path, "is not on the list of what is published", "leave it out"))
        elif status.st_size != staged.files[path].get("bytes"):
            what = f"has {status.st_size} bytes, {staged.files[path].get('bytes')} are listed"
            problems.append(finding("foreign-file", path, what, REBUILD))
        elif not hostile(path):
            readable.add(path)
    for path in sorted(set(staged.files) - set(present)):
        problems.append(finding("foreign-file", path, "is listed and missing", REBUILD))
    problems += disguised(staged.folder, readable)
    problems += unlisted(staged)
    return Contents(staged.folder, frozenset(readable)), problems


def unlisted(staged: Staged) -> Iterator[Problem]:
    """Where the list and the manifests differ."""
    made: dict[str, Mapping[str, Any]] = {}
    for prefix, artifact in staged.artifacts.items():
        made |= {prefix + name: facts for name, facts in artifact.manifest["files"].items()}
        yield from _manifest(staged, prefix, artifact)
    for path, facts in sorted(made.items()):
        if path not in staged.files:
            yield finding("foreign-file", path, "is in its manifest, and not published", REBUILD)
        elif dict(staged.files[path]) != dict(facts):
            yield finding("foreign-file", path, "has other facts on the list than in its manifest", REBUILD)
    manifests = {prefix + MANIFEST_NAME for prefix in staged.artifacts}
    for path in sorted(set(staged.files) - set(made) - manifests):
        if not ADDED.fullmatch(path):
            yield finding("foreign-file", path, "is in no manifest, and none of ours", "leave it out")


def _manifest(staged: Staged, prefix: str, artifact: Artifact) -> Iterator[Problem]:
    path = prefix + MANIFEST_NAME
    if staged.files.get(path, {}).get("sha256") != artifact.manifest_sha256:
        what = "is not listed" if path not in staged.files else "is not the manifest of the artifact that was verified"
        yield finding("foreign-file", path, what, REBUILD)
