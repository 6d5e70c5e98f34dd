"""What published artifacts were made from, as their manifests record it, in one form for provenance and BOM.

A source with an id of the Hub has a package URL, `pkg:huggingface/OWNER/NAME@COMMIT`; a folder has its name alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from qlora_export.sources.locate import COMMIT, HUB_ID

HUB = "https://huggingface.co"
ADAPTER_DIGEST = "sha256 over the sha256 digests of adapter_config.json and of each weight file"


@dataclass(frozen=True)
class Origin:
    """A source: what it is called, sha256 of its files by name, or of the whole, and the weight it was added with."""

    role: str
    name: str
    files: tuple[tuple[str, str], ...] = ()
    sha256: str | None = None
    weight: float | None = None

    @property
    def repository(self) -> str | None:
        """`owner/name` on the Hub, for what is not just a folder's name."""
        found = HUB_ID.fullmatch(self.name)
        return found["repository"] if found else None

    @property
    def commit(self) -> str | None:
        """The commit that the name is pinned to."""
        _, _, revision = self.name.partition("@")
        return revision if COMMIT.fullmatch(revision) else None

    @property
    def package_url(self) -> str | None:
        """The package URL of a source on the Hub."""
        if self.repository is None:
            return None
        return f"pkg:huggingface/{quote(self.repository)}" + (f"@{self.commit}" if self.commit else "")

    def download(self, file: str) -> str | None:
        """Where a file of a pinned source can be fetched."""
        pinned = self.repository is not None and self.commit is not None
        return f"{HUB}/{self.repository}/resolve/{self.commit}/{quote(file)}" if pinned else None


def origins(manifests: Sequence[Mapping[str, Any]]) -> tuple[Origin, ...]:
    """Base and adapters of all artifacts, each once, in the order of the manifests."""
    return tuple(dict.fromkeys(origin for manifest in manifests for origin in _of(manifest["sources"])))


def _of(sources: Mapping[str, Any]) -> Iterable[Origin]:
    """The sources of one artifact: of a combination its parts, since the combined adapter is nowhere to be had."""
    base = sources["base"]
    files = tuple((name, str(facts["sha256"])) for name, facts in sorted(base["files"].items()))
    yield Origin("base", base["id"], files)
    parts = sources.get("combined_from") or ()
    for part in parts:
        yield Origin("adapter", part["id"], sha256=part["sha256"], weight=part["weight"])
    if sources.get("adapter") and not parts:
        yield Origin("adapter", sources["adapter"]["id"], sha256=sources["adapter"]["sha256"])
