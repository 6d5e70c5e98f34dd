"""What is asked of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Turns text and chat into token ids, as the released model's users will."""

    @property
    def begin(self) -> int | None:
        """The token that starts a text, if the model has one."""
        ...

    @property
    def end(self) -> int | None:
        """The token that ends a text, if the model has one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens of the tokenizer's own."""
        ...

    def encode_whole(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one by itself."""
        ...

    def encode_within(self, text: str, pair: str | None, limit: int) -> tuple[list[int], bool]:
        """Token ids of a text, or of two together, as a classifier reads them: with special tokens, at most so many.

        Also whether they are whole.
        """
        ...

    def render(self, messages: Sequence[Mapping[str, str]], answering: bool) -> str:
        """A conversation by the chat template; `answering` adds the start of the assistant's turn."""
        ...


class ServedTokenizer(Tokenizer, Protocol):
    """A tokenizer that can be compared with another."""

    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens, added ones included."""
        ...

    def served(self, text: str) -> list[int]:
        """Token ids of a text as a server makes them, with the tokenizer's own special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        ...
