"""Style and script of the page, and the policy that lets a browser run these and nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent


@cache
def style() -> str:
    """The style sheet."""
    return (FOLDER / "style.css").read_text(encoding="utf-8")


@cache
def script() -> str:
    """The script: sorting, and folds that open for print. The page is whole without it."""
    return (FOLDER / "script.js").read_text(encoding="utf-8")


def policy() -> str:
    """A Content-Security-Policy: nothing is loaded, sent or framed, and only our own style and script count."""
    return (
        f"default-src 'none'; style-src '{_hash(style())}'; script-src '{_hash(script())}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
