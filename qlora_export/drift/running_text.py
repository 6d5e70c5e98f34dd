"""Windows over the token ids of running text, as each protocol defines them; positions count from 0.

disjoint     [0, N) [N, 2N) ...             all but the first of each scored; a tail shorter than N is dropped
chunks       the same windows               the first replaced by the begin token; N/2 + 1 to N - 1 scored
strided      [0, W) [S, S + W) ...          scored is what no window before it held, and never a window's first
rolling      a prefix token before all      every token scored, the rest of a document after as much as fits
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_export.drift.tokens import Window
from qlora_export.sources.windows import text_windows


def running_windows(ids: Sequence[int], begin: int | None, window_tokens: int) -> Iterator[Window]:
    """Every id in windows that each begin with the begin token, which is not scored."""
    first = 0
    for block, tokens in enumerate(text_windows(ids, begin, window_tokens)):
        own = len(tokens) - (begin is not None)
        yield Window(tokens, tuple(range(1, len(tokens))), place_of(first, first + own), block)
        first += own


def disjoint_windows(ids: Sequence[int], window_tokens: int) -> Iterator[Window]:
    """Whole windows only, as the evaluation of GPTQ cuts them."""
    for block, start in enumerate(range(0, len(ids) - window_tokens + 1, window_tokens)):
        tokens = tuple(ids[start : start + window_tokens])
        yield Window(tokens, tuple(range(1, window_tokens)), place_of(start, start + window_tokens), block)


def half_scored_chunks(ids: Sequence[int], begin: int | None, window_tokens: int) -> Iterator[Window]:
    """Whole windows whose second half is scored but for its first token, as llama-perplexity counts."""
    for window in disjoint_windows(ids, window_tokens):
        tokens = window.tokens if begin is None else (begin, *window.tokens[1:])
        yield Window(tokens, tuple(range(window_tokens // 2 + 1, window_tokens)), window.place, window.block)


def strided_windows(ids: Sequence[int], window_tokens: int, stride_tokens: int) -> Iterator[Window]:
    """Overlapping windows, each scored where the one before it did not reach, as transformers' page on perplexity."""
    reached = 0
    for block, start in enumerate(range(0, len(ids), stride_tokens)):
        end = min(start + window_tokens, len(ids))
        scored = tuple(range(max(1, reached - start), end - start))
        yield Window(tuple(ids[start:end]), scored, place_of(start, end), block)
        reached = end
        if end == len(ids):
            return


def rolling_windows(ids: Sequence[int], prefix: int, window_tokens: int, block: int, place: str) -> Iterator[Window]:
    """A document after a prefix token, as lm-evaluation-harness' loglikelihood_rolling with a context of one token.

    A window holds what the model is fed, at most `window_tokens`, and the last token, which nothing follows. The last
    window reaches back as far as that allows.
    """
    led = (prefix, *ids)
    for start in range(0, len(ids), window_tokens):
        end = min(start + window_tokens, len(ids))
        first = max(0, end - window_tokens)
        where = place if len(ids) <= window_tokens else f"{place}, {place_of(start, end)}"
        yield Window(led[first : end + 1], tuple(range(start - first + 1, end - first + 1)), where, block)


def place_of(start: int, end: int) -> str:
    """Tokens from `start` up to but not including `end`, in words."""
    return f"tokens {start} to {end - 1}"
