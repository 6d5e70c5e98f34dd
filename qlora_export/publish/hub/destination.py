"""Where artifacts go on the Hub: `OWNER/NAME[@BRANCH]` with `{name}` and `{format}`, one repository or several.

Every artifact has a repository of its own, or a sub-folder of its own in a shared one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_export.errors import UsageError
from qlora_export.publish.hub.job import Target
from qlora_export.recipe.config import ArtifactRecipe, PublishRecipe

REPOSITORY = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?")
BRANCH = re.compile(r"[A-Za-z0-9][\w./-]*")
FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
RESERVED = {"qlora-export"}


@dataclass(frozen=True)
class Place:
    """A target and the artifacts that go there: the prefix of each, by its name."""

    target: Target
    prefixes: Mapping[str, str]


def places_of(publish: PublishRecipe, artifacts: Sequence[ArtifactRecipe]) -> tuple[Place, ...]:
    """Targets in the order of the artifacts; raises UsageError when two artifacts would lie on top of each other."""
    found: dict[Target, dict[str, str]] = {}
    for artifact in artifacts:
        target = _target(publish, artifact)
        prefix = _prefix(publish, artifact)
        taken = found.setdefault(target, {})
        if prefix in taken.values() or ("" in (prefix, *taken.values()) and taken):
            raise UsageError(
                f"publish.to: several artifacts go to {target.repository}",
                "give each a repository, as in hub:acme/bot-{name}, or a folder: publish.subfolder: '{name}'",
            )
        taken[artifact.name] = prefix
    repositories = [target.repository for target in found]
    if publish.version is not None and len(set(repositories)) < len(repositories):
        raise UsageError(
            f"publish.version: {publish.version!r} cannot name several branches of one repository",
            "leave the version out, or give every artifact a repository",
        )
    return tuple(Place(target, prefixes) for target, prefixes in found.items())


def _target(publish: PublishRecipe, artifact: ArtifactRecipe) -> Target:
    text = _filled(publish.to.partition(":")[2], artifact, "publish.to")
    repository, _, branch = text.partition("@")
    if not REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository or repository.endswith(".git"):
        raise UsageError(f"publish.to: {repository!r} is no name of a repository", "as in hub:acme/support-bot-{name}")
    if "@" in text and (not BRANCH.fullmatch(branch) or ".." in branch or branch.startswith("refs/")):
        raise UsageError(f"publish.to: {branch!r} is no name of a branch", "as in hub:acme/support-bot@next")
    return Target(repository, branch or "main", publish.visibility, publish.mode, publish.version)


def _prefix(publish: PublishRecipe, artifact: ArtifactRecipe) -> str:
    if not publish.subfolder:
        return ""
    folder = _filled(publish.subfolder, artifact, "publish.subfolder").strip("/")
    if not FOLDER.fullmatch(folder) or folder.split("/")[0] in RESERVED:
        raise UsageError(f"publish.subfolder: {folder!r} cannot be a folder of a release", "as in '{name}'")
    return f"{folder}/"


def _filled(text: str, artifact: ArtifactRecipe, key: str) -> str:
    filled = text.replace("{name}", artifact.name).replace("{format}", artifact.format)
    if "{" in filled or "}" in filled:
        raise UsageError(f"{key}: {text!r} has a placeholder that is none", "known: {name}, {format}")
    return filled
