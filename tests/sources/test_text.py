from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_export.errors import InputError
from qlora_export.sources.text import read_entries, read_text
from qlora_export.sources.text_entries import Entry


def write(tmp_path: Path, name: str, content: str) -> Path:
    path = tmp_path / name
    path.write_text(content)
    return path


def test_chats_and_texts(tmp_path: Path) -> None:
    chats = read_text(write(tmp_path, "a.jsonl", '{"messages": [{"role": "user", "content": "x", "id": 1}]}\n\n'))
    assert chats.chats == (({"role": "user", "content": "x"},),)
    assert read_text(write(tmp_path, "b.jsonl", '{"text": "a"}\n{"text": "b"}')).text == "a\n\nb"
    assert read_text(write(tmp_path, "c.txt", "plain")).text == "plain"


def test_a_prompt_and_its_completion_are_a_chat(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    lines = [{"prompt": "x", "completion": "y"}, {"prompt": turns[:1], "completion": turns[1:]}]
    found = read_entries("a.jsonl", write(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, lines))).parent)
    assert found == tuple(Entry(tuple(turns), place, prompt_messages=1) for place in ("line 1", "line 3"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "line 1 is not valid JSON"),
        ('{"text": "a"}\n' + "[" * 100_000, "line 2 is nested too deep"),
        ('{"text": "a \\ud83d b"}', r"line 1 has half of a surrogate pair, \\ud83d"),
        ('{"text": "a"}\n[1]', "line 2 has neither messages nor text"),
        ('{"messages": []}', "line 1 has neither"),
        ('{"prompt": "a"}', "line 1 has neither"),
        ('{"prompt": [{"role": "user"}], "completion": []}', "line 1 has neither"),
        ('{"messages": [{"role": "user"}]}', "line 1 has neither"),
        ('{"text": "a"}\n{"messages": [{"role": "user", "content": "x"}]}', "1 chats and 1 plain texts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_text(write(tmp_path, "bad.jsonl", content))


def test_missing_and_binary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such text"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(tmp_path / "binary.txt")
