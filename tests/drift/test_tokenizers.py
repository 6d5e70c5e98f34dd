"""A candidate's tokenizer against the reference's: every kind of difference is named, and the same is silent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_export.demo import recipe_path
from qlora_export.drift.tokenizers import differences, require_same_tokenizer
from qlora_export.errors import InputError
from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.sources.text import DriftText, read_text
from qlora_export.sources.text_entries import Entry

DEMO_BASE = recipe_path().parent / "base"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
TEXT = DriftText((Entry("They said: 12 apples\nwere left.", "line 1"),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copyfile(DEMO_BASE / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def reference() -> FolderTokenizer:
    return FolderTokenizer(DEMO_BASE)


@pytest.fixture(scope="module")
def chats() -> DriftText:
    return DriftText(read_text(recipe_path().parent / "holdout.jsonl").entries[:5])


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def found(folder: Path, reference: FolderTokenizer, text: DriftText = TEXT) -> list[str]:
    return list(differences(FolderTokenizer(folder), reference, text))


def test_the_same_tokenizer_differs_in_nothing(folder: Path, reference: FolderTokenizer, chats: DriftText) -> None:
    assert found(folder, reference) == []
    assert found(folder, reference, chats) == []


def test_tokens_that_differ_are_named(folder: Path, reference: FolderTokenizer) -> None:
    def swap(data: Any) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]

    edit(folder / "tokenizer.json", swap)
    first, second = found(folder, reference)[0], found(folder, reference)[-1]
    ids = reference.vocabulary()
    assert first == f"2 tokens differ: 'a' is {ids['e']}, not {ids['a']}, 'e' is {ids['a']}, not {ids['e']}"
    assert second.startswith("token "), second


def test_a_missing_token_is_named(folder: Path, reference: FolderTokenizer) -> None:
    def add(data: Any) -> None:
        data["added_tokens"].append({**data["added_tokens"][0], "id": 2048, "content": "<|new|>"})

    edit(folder / "tokenizer.json", add)
    assert found(folder, reference) == ["1 tokens differ: '<|new|>' is 2048, not there"]


def test_what_a_server_puts_before_a_text_is_shown(folder: Path, reference: FolderTokenizer) -> None:
    def begin(data: Any) -> None:
        data["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|begin|>", "type_id": 0}})
        token = {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}
        data["post_processor"]["special_tokens"] = {"<|begin|>": token}

    edit(folder / "tokenizer.json", begin)
    assert found(folder, reference) == ["a text of 'a' is served as '<|begin|>a', not 'a'"]


def test_another_template_is_shown_where_it_begins(folder: Path, reference: FolderTokenizer, chats: DriftText) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("{{ bos_token }}", ""))
    (said,) = found(folder, reference, chats)
    assert said.startswith("the template renders line 1 otherwise from character 2 on: '")
    path.write_text(path.read_text().replace("<|assistant|>\n{% endif", "{% endif"))
    with pytest.raises(InputError, match=r"the template renders line 1 otherwise from character 2 on") as caught:
        require_same_tokenizer("folder", FolderTokenizer(folder), reference, chats)
    assert caught.value.hint.startswith("put the reference's tokenizer files")


def test_an_end_of_the_template_alone_is_seen(folder: Path, reference: FolderTokenizer, chats: DriftText) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("{% if add_generation_prompt %}<|assistant|>\n{% endif %}", ""))
    (said,) = found(folder, reference, chats)
    assert "'', not '<|assistant|>" in said


def test_another_split_of_the_text_is_shown(folder: Path, reference: FolderTokenizer) -> None:
    edit(folder / "tokenizer.json", lambda data: data["model"]["merges"].clear())
    (said,) = found(folder, reference)
    assert said == "token 0 of line 1 is 'T', not 'They'" or said.startswith("token ")
