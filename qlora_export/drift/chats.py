"""Windows over conversations: the chat template's rendering, and which of its tokens the assistant wrote.

An answer's tokens are what its rendering adds to the rendering of the turns before it. Some templates render earlier
turns anew once others follow, as those that drop the reasoning of the past; then the answer so far and the next one are
windows of their own, each as the model would have met it.
"""

from __future__ import annotations

from collections.abc import Iterator

from qlora_export.drift.tokens import Window
from qlora_export.errors import InputError
from qlora_export.sources.text_entries import Entry
from qlora_export.sources.tokenizer import Tokenizer


def chat_windows(entry: Entry, block: int, tokenizer: Tokenizer, window_tokens: int) -> Iterator[Window]:
    """A chat cut at `window_tokens`, most often as one window; scored are the answers that are not in its prompt.

    Raises InputError where the template does not tell the tokens of an answer apart.
    """
    tokens: list[int] = []
    scored: list[int] = []
    for turn, message in enumerate(entry.chat):
        if message["role"] != "assistant" or turn < entry.prompt_messages:
            continue
        if turn == 0:
            raise InputError(
                f"{entry.place}: a chat begins with the assistant", "give each chat the turn that the assistant answers"
            )
        before = tokenizer.encode(tokenizer.render(entry.chat[:turn], answering=True))
        after = tokenizer.encode(tokenizer.render(entry.chat[: turn + 1], answering=False))
        if after[: len(before)] != before:
            raise InputError(
                f"{entry.place}: the chat template renders a turn differently once the next one follows",
                "assistant tokens cannot be told apart; give plain text for drift",
            )
        if before[: len(tokens)] != tokens:
            yield _cut(tokens, scored, window_tokens, entry.place, block)
            scored = []
        tokens = after
        scored += range(len(before), len(after))
    yield _cut(tokens, scored, window_tokens, entry.place, block)


def _cut(tokens: list[int], scored: list[int], window_tokens: int, place: str, block: int) -> Window:
    kept = tuple(position for position in scored if 1 <= position < window_tokens)
    return Window(tuple(tokens[:window_tokens]), kept, place, block)
