"""The protocols of the drift check by name, and which sizes each may be told.

windows            a chat is a window; running text in disjoint windows, each after the begin token; `window_tokens`
disjoint-N         the tables of GPTQ and AWQ: joined text in disjoint windows of N
strided            the perplexity page of transformers: overlapping windows; `window_tokens`, `stride_tokens`
llama.cpp-N        llama-perplexity: chunks of N, their second halves scored
lm-eval-rolling    lm-evaluation-harness: every document for itself, every token scored; `window_tokens`
labels             of a sequence classifier, and its only one: every text for itself, its label scored; `window_tokens`
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from qlora_export.errors import UsageError

Kind = Literal["windows", "disjoint", "strided", "llama.cpp", "lm-eval-rolling", "labels"]

USUAL = "windows"
LABELS: Kind = "labels"
FEWEST_TOKENS = 8
PLAIN: dict[str, Kind] = {
    "windows": "windows",
    "strided": "strided",
    "lm-eval-rolling": "lm-eval-rolling",
    "labels": "labels",
}
SIZED: dict[str, Kind] = {"disjoint": "disjoint", "llama.cpp": "llama.cpp"}
EXAMPLES = ("windows", "disjoint-2048", "strided", "llama.cpp-512", "lm-eval-rolling", "labels")


@dataclass(frozen=True)
class ProtocolChoice:
    """A protocol as it is asked for; a size of None is the protocol's own, or hangs on the model."""

    name: str
    kind: Kind
    window_tokens: int | None = None
    stride_tokens: int | None = None


def choose_protocol(name: str, window_tokens: int | None = None, stride_tokens: int | None = None) -> ProtocolChoice:
    """The protocol of a name with the sizes stated beside it; raises UsageError for what it does not have."""
    kind, size = protocol_of_name(name)
    if stride_tokens is not None and kind != "strided":
        raise UsageError(f"drift.stride_tokens: {name} has no stride", "leave it out, or take protocol strided")
    if size is None:
        return ProtocolChoice(name, kind, window_tokens, stride_tokens)
    if window_tokens is not None:
        raise UsageError(
            f"drift.window_tokens: the window of {name} is in its name",
            f"leave it out, or name {kind}-{window_tokens}",
        )
    return ProtocolChoice(name, kind, size)


def protocol_of_name(name: str) -> tuple[Kind, int | None]:
    """The kind of protocol that a name means, and the window that it states; raises UsageError for an unknown one."""
    if name in PLAIN:
        return PLAIN[name], None
    stem, _, digits = name.rpartition("-")
    if stem in SIZED and re.fullmatch(r"[1-9][0-9]{0,8}", digits):
        if int(digits) < FEWEST_TOKENS:
            raise UsageError(f"drift.protocol: {name}: windows of {digits} tokens", f"{FEWEST_TOKENS} are the fewest")
        return SIZED[stem], int(digits)
    near = difflib.get_close_matches(name, EXAMPLES, n=1)
    known = f"known, with any number: {', '.join(EXAMPLES)}"
    raise UsageError(f"unknown protocol {name!r}", f"did you mean {near[0]}? {known}" if near else known)
