"""What can go wrong on purpose: named faults, each fired once unless its line says otherwise.

A name given twice fires twice; `name:NUMBER` hands the fault its number. The table is the documentation.
"""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

FAULTS: Mapping[str, str] = MappingProxyType(
    {
        "create-403": "creating the repository is forbidden",
        "repository-turns-public": "a repository asked for as private is created public",
        "token-401-mid-run": "the token expires at the first commit (or after :N requests that carry it), for good",
        "refusals-tell-token": "every refusal repeats the token it was sent, as proxies do that print headers",
        "preupload-429-retry-after": "the first preupload is answered 429 with `Retry-After: 1`",
        "preupload-429-ratelimit": "the first preupload is answered 429 with `RateLimit: r=0;t=1`",
        "put-500": "the first upload of a large file is answered 500 and not stored",
        "put-truncated": "half of a large file is stored, PUT and verify still say 200; "
        "after the commit its size and sha256 read back are those of the half",
        "put-slow": "the first upload of a large file stalls for :SECONDS (60) before a byte of it is read",
        "verify-502": "the first verification of an uploaded large file is answered 502",
        "commit-503": "the first commit is answered 503 and not applied",
        "commit-503-always": "every commit is answered 503 and not applied",
        "commit-closed-before": "the connection closes at the first commit, which is not applied",
        "commit-applied-then-closed": "the first commit is applied, then the connection closes without an answer",
        "commit-412": "another publisher commits to the branch just before the first commit",
        "tree-missing-shard": "the first file listing after a commit leaves out a .safetensors file",
        "tag-409": "another publisher has put the tag on an older commit just before it is made",
    }
)
_LASTING = frozenset({"commit-503-always", "refusals-tell-token"})
_WITH_NUMBER = frozenset({"put-slow", "token-401-mid-run"})


class Faults:
    """The faults of one run, counted down as they fire; safe to ask from many threads."""

    def __init__(self, names: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, float] = {}
        self._left: Counter[str] = Counter(self._known(name) for name in names)
        self._requests_with_token = 0
        self._token_expired = False

    def _known(self, given: str) -> str:
        name, colon, number = given.partition(":")
        if name not in FAULTS:
            close = difflib.get_close_matches(name, FAULTS, n=1)
            hint = f"is it {close[0]}?" if close else f"there are {', '.join(FAULTS)}"
            raise ValueError(f"{given}: no such fault; {hint}")
        if colon:
            if name not in _WITH_NUMBER:
                raise ValueError(f"{given}: {name} takes no number")
            try:
                self._numbers[name] = float(number)
            except ValueError:
                raise ValueError(f"{given}: {number!r} is no number") from None
        return name

    def strikes(self, name: str) -> bool:
        """Whether the fault happens now; uses it up unless it lasts."""
        with self._lock:
            if not self._left[name]:
                return False
            if name not in _LASTING:
                self._left[name] -= 1
            return True

    def seconds(self, name: str, default: float) -> float:
        """The number given with a fault."""
        return self._numbers.get(name, default)

    def token_expires(self, committing: bool) -> bool:
        """Whether the token of a request that carries one is refused from now on."""
        with self._lock:
            if not self._left["token-401-mid-run"]:
                return False
            self._requests_with_token += 1
            allowed = self._numbers.get("token-401-mid-run")
            due = committing if allowed is None else self._requests_with_token > allowed
            self._token_expired = self._token_expired or due
            return self._token_expired
