"""Secrets by their looks: found in files before they are published, and taken out of everything that is written.

A kind of secret is a literal that it begins with and an expression from there on. The literal is looked for first, at
memory speed, so a vocabulary of 20 MB costs milliseconds. Expressions work on bytes (files, mapped) and on text (logs,
reports). In a file a match must also vary: a placeholder such as `hf_xxxxxxxxxxxxxxxxxxxx` in documentation is no
finding; in a log everything that matches goes.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

REDACTED = "[redacted]"
SHORTEST_SECRET = 4
LEAST_DISTINCT = 6


@dataclass(frozen=True)
class SecretKind:
    """One kind of secret: what it is called, the literal it begins with, and the whole as an expression.

    Where `needs_digit` is set, words alone are no finding in a file: "Bearer authentication" is prose.
    """

    what: str
    anchor: str
    expression: str
    needs_digit: bool = False

    @cached_property
    def in_bytes(self) -> re.Pattern[bytes]:
        """The expression for files."""
        return re.compile(self.expression.encode())

    @cached_property
    def in_text(self) -> re.Pattern[str]:
        """The expression for text; ASCII alone counts as a letter or digit."""
        return re.compile(self.expression, re.ASCII)


# The more specific kinds come first: `hf_jwt_` before `hf_`.
SECRETS = (
    SecretKind("a token of a Hub job", "hf_jwt_", r"hf_jwt_[A-Za-z0-9._~+/=-]{16,}"),
    SecretKind("an OAuth token of the Hub", "hf_oauth_", r"hf_oauth_[A-Za-z0-9._~+/=-]{16,}"),
    SecretKind("a token of the Hub", "hf_", r"hf_[A-Za-z0-9]{20,}"),
    SecretKind("a token of the Hub", "api_org_", r"api_org_[A-Za-z0-9]{20,}"),
    SecretKind("a bearer token", "Bearer ", r"Bearer +[A-Za-z0-9._~+/-]{8,}=*", needs_digit=True),
    SecretKind("a bearer token", "bearer ", r"bearer +[A-Za-z0-9._~+/-]{8,}=*", needs_digit=True),
    SecretKind("a GitHub token", "gh", r"gh[pousr]_[A-Za-z0-9]{36,}"),
    SecretKind("a GitHub token", "github_pat_", r"github_pat_[A-Za-z0-9_]{40,}"),
    SecretKind("a GitLab token", "glpat-", r"glpat-[A-Za-z0-9_-]{20,}"),
    SecretKind(
        "an API key", "sk-", r"sk-(?:(?:proj|svcacct|admin|ant-[a-z0-9]+|or-v1)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{32,})"
    ),
    SecretKind("an AWS key", "AKIA", r"AKIA[A-Z0-9]{16}(?![A-Za-z0-9])"),
    SecretKind("an AWS key", "ASIA", r"ASIA[A-Z0-9]{16}(?![A-Za-z0-9])"),
    SecretKind(
        "an AWS secret",
        "aws_secret_access_key",
        r"aws_secret_access_key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{30,}",
    ),
    SecretKind("a Google API key", "AIza", r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    SecretKind("a Slack token", "xox", r"xox[abeoprs]-[A-Za-z0-9-]{20,}"),
    SecretKind("a PyPI token", "pypi-AgEI", r"pypi-AgEI[A-Za-z0-9_-]{40,}"),
    # A key is a header and base64, whose lines may be written as `\n` in a JSON string.
    SecretKind(
        "a private key",
        "-----BEGIN ",
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
        r"(?:\s|\\[nr]|[A-Z][A-Za-z-]+: [^\n\\]*)*[A-Za-z0-9+/=]{24,}(?:[A-Za-z0-9+/=]|\s|\\[nr])*"
        r"(?:-----END [A-Z0-9 ]+-----)?",
    ),
)


@dataclass(frozen=True)
class SecretFound:
    """Where a secret lies and what it looks like; the secret itself is not kept."""

    what: str
    line: int


def find_secrets(content: bytes | mmap.mmap) -> Iterator[SecretFound]:
    """The first secret of each kind in a file's content."""
    for kind in SECRETS:
        if content.find(kind.anchor.encode()) < 0:
            continue
        for match in kind.in_bytes.finditer(content):
            if _stands_alone(content, match.start()) and _varies(kind, match.group()):
                yield SecretFound(kind.what, content[: match.start()].count(b"\n") + 1)
                break


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """The text without these literal secrets and without anything that looks like one."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, REDACTED)
    for kind in SECRETS:
        if kind.anchor in text:
            text = kind.in_text.sub(REDACTED, text)
    return text


def _stands_alone(content: bytes | mmap.mmap, start: int) -> bool:
    """Whether the match is no part of a longer word, as `sk-` is of `task-`."""
    return start == 0 or not content[start - 1 : start].isalnum()


def _varies(kind: SecretKind, match: bytes) -> bool:
    body = match[len(kind.anchor) :]
    return len(set(body)) >= LEAST_DISTINCT and not (kind.needs_digit and not re.search(rb"\d", body))
