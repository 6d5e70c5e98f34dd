"""The licence that a base states of itself: the key `license` of its README's front matter."""

from __future__ import annotations

from pathlib import Path

import yaml

from qlora_export.publish.card.front_matter import TextLoader, split_readme


def licence_of(folder: Path) -> str | None:
    """The licence in the folder's README.md; None where there is none, whatever state that file is in."""
    try:
        text = (folder / "README.md").read_bytes().decode("utf-8", errors="replace")
        metadata = yaml.load(split_readme(text).metadata, TextLoader)  # noqa: S506  a SafeLoader
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    stated = metadata.get("license") if isinstance(metadata, dict) else None
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    return stated.strip() or None if isinstance(stated, str) else None
