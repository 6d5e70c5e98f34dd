"""Every kind of text that can be read gives the same tokens as the same words in another kind."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from qlora_export.drift.protocols import token_set
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.window_sizes import sized
from qlora_export.errors import InputError
from qlora_export.recipe.protocols import choose_protocol
from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.sources.text import DriftText, read_text
from qlora_export.testing import HubServer
from tests.helpers.pico import DEMO

PIECES = ["The order came broken.", "We are sorry. You get the money back.", "It comes on Friday."]
QUESTIONS = ["Order 512 came broken.", "Where is my order?"]
ANSWERS = ["We are sorry. You get the money back.", "It comes on Friday."]
TALKS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": piece} for piece in PIECES],
    "messages": [{"messages": talk} for talk in TALKS],
    "prompts": [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)],
    "prompts as chats": [{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS],
}


def tokens(name: str | Path, protocol: str = "windows") -> TokenSet:
    return tokens_of(read_text(name), protocol)


def tokens_of(text: DriftText, protocol: str = "windows") -> TokenSet:
    return token_set(text, FolderTokenizer(DEMO / "base"), sized(choose_protocol(protocol), 512), None)


def shown(found: TokenSet) -> list[str]:
    """What each window scores, decoded."""
    decode = FolderTokenizer(DEMO / "base").decode
    return [decode([window.tokens[place] for place in window.scored]) for window in found.windows]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_running_text_in_every_form(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("\n\n".join(PIECES))
    forms = [plain, jsonl(tmp_path / "a.jsonl", ROWS["text"]), table(tmp_path / "a.parquet", ROWS["text"])]
    for protocol in ("windows", "disjoint-8"):
        first, *others = [tokens(form, protocol) for form in forms]
        assert {found.sha256 for found in others} == {first.sha256}
    assert shown(tokens(plain)) == ["\n\n".join(PIECES)]


def test_documents_are_the_pieces_of_a_file(tmp_path: Path) -> None:
    for form, word in (
        (jsonl(tmp_path / "a.jsonl", ROWS["text"]), "line"),
        (table(tmp_path / "a.parquet", ROWS["text"]), "row"),
    ):
        found = tokens(form, "lm-eval-rolling")
        assert shown(found) == PIECES
        assert [window.place for window in found.windows] == [f"{word} {number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("kind", ["messages", "prompts", "prompts as chats"])
@pytest.mark.parametrize("write", [jsonl, table])
def test_conversations_in_every_form(kind: str, write: Any, tmp_path: Path) -> None:
    path = tmp_path / ("a.jsonl" if write is jsonl else "a.parquet")
    found = tokens(write(path, ROWS[kind]))
    assert found.sha256 == tokens(jsonl(tmp_path / "same.jsonl", ROWS["messages"])).sha256
    assert [text.startswith(answer) for text, answer in zip(shown(found), ANSWERS, strict=True)] == [True, True]
    assert not any(question in text for question, text in zip(QUESTIONS, shown(found), strict=True))


def test_only_the_completion_is_scored(tmp_path: Path) -> None:
    row = {"prompt": [*TALKS[0], TALKS[1][0]], "completion": TALKS[1][1:]}
    (scored,) = shown(tokens(jsonl(tmp_path / "a.jsonl", [row])))
    assert scored.startswith(ANSWERS[1])
    assert ANSWERS[0] not in scored


@pytest.mark.parametrize(
    "row", [{"completion": "It comes."}, {"prompt": "Where?"}, {"prompt": "Where?", "completion": [1]}]
)
def test_half_a_pair_is_no_text(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 1 has neither messages nor text") as caught:
        tokens(jsonl(tmp_path / "a.jsonl", [row]))
    assert '{"prompt": ..., "completion": ...}' in caught.value.hint


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    folder = tmp_path_factory.mktemp("datasets")
    for name, kind in (("talks", "messages"), ("prose", "text")):
        (folder / name).mkdir()
        jsonl(folder / name / "train.jsonl", ROWS[kind])
    with HubServer() as server:
        for name in ("talks", "prose"):
            server.add_repository(f"datasets/acme/{name}", folder / name)
        yield server


SCRIPT = """
import pickle
import sys
from qlora_export.sources.text import read_text
pickle.dump([read_text(name) for name in sys.argv[1:]], sys.stdout.buffer)
"""


def test_data_sets_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    names = [f"hub:acme/{name}@{hub.repositories[f'datasets/acme/{name}'].head()}#train" for name in ("talks", "prose")]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.endpoint}
    words = [sys.executable, "-c", SCRIPT, *names]
    found = subprocess.run(words, check=False, capture_output=True, env=environment, timeout=120)
    assert found.returncode == 0, found.stderr
    texts = pickle.loads(found.stdout)
    forms = [jsonl(tmp_path / "a.jsonl", ROWS["messages"]), jsonl(tmp_path / "b.jsonl", ROWS["text"])]
    assert [tokens_of(text).sha256 for text in texts] == [tokens(form).sha256 for form in forms]
