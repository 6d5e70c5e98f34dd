"""The tokenizer of a folder, as transformers opens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers
from jinja2 import TemplateError

from qlora_export.errors import InputError
from qlora_export.runtimes.loading import first_line

PAIR_HINT = "give lines without text_pair; models with token types are measured on single texts"


class FolderTokenizer:
    """The tokenizer of a model folder, opened by transformers without remote code."""

    def __init__(self, folder: Path) -> None:
        transformers.utils.logging.set_verbosity_error()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise what they meet, of any class
            raise InputError(
                f"{folder}: no tokenizer can be loaded: {first_line(error)}",
                "are the tokenizer's files and config.json there, and whole?",
            ) from error
        self._folder = folder

    @property
    def begin(self) -> int | None:
        """The token that starts a text, if the model has one."""
        token: int | None = self._tokenizer.bos_token_id
        return token

    @property
    def end(self) -> int | None:
        """The token that ends a text, if the model has one."""
        token: int | None = self._tokenizer.eos_token_id
        return token

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens of the tokenizer's own."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def encode_whole(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one by itself."""
        ids: list[int] = self._tokenizer.encode(text, verbose=False)
        return ids

    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens, added ones included."""
        found: dict[str, int] = self._tokenizer.get_vocab()
        return found

    def served(self, text: str) -> list[int]:
        """Token ids of a text as a server makes them, with the tokenizer's own special tokens."""
        ids: list[int] = self._tokenizer.encode(text, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def encode_within(self, text: str, pair: str | None, limit: int) -> tuple[list[int], bool]:
        """Token ids of a text, or of two together, as a classifier reads them, at most so many; whether they are whole.

        Raises InputError for two that the model tells apart by token types, which are not handed on.
        """
        found = self._tokenizer(text, pair, verbose=False)
        if any(found.get("token_type_ids") or ()):
            raise InputError(f"{self._folder}: its tokenizer marks the second of two texts by token types", PAIR_HINT)
        ids: list[int] = found["input_ids"]
        if len(ids) <= limit:
            return ids, True
        return self._tokenizer(text, pair, truncation=True, max_length=limit, verbose=False)["input_ids"], False

    def render(self, messages: Sequence[Mapping[str, str]], answering: bool) -> str:
        """A conversation by the chat template; raises InputError when there is no template."""
        if self._tokenizer.chat_template is None:
            raise InputError(f"{self._folder}: no chat template", "give plain text for drift, or add the template")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answering
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{self._folder}: the chat template refuses a chat: {error}", "see the text") from error
        return text
