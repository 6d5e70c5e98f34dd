"""Parquet files, and data sets of a Hub read with the real client over a real socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from qlora_export.errors import EnvironmentProblem, InputError, UsageError
from qlora_export.sources.text import read_entries, read_text
from qlora_export.sources.text_entries import Entry
from qlora_export.testing import HubServer

TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "yes"}] for number in range(5)
]
COMMIT = "0123456789" * 4


def write(path: Path, columns: dict[str, Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_the_rows_of_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"id": list(range(5)), "messages": TALKS})
    assert read_entries("a.parquet", tmp_path) == tuple(
        Entry(tuple(talk), f"row {number}") for number, talk in enumerate(TALKS, 1)
    )
    assert read_text(path).chats == tuple(map(tuple, TALKS))
    assert read_text(write(tmp_path / "b.parquet", {"text": ["a", "b", "c"]})).text == "a\n\nb\n\nc"
    pairs = write(tmp_path / "c.parquet", {"prompt": ["question 0"], "completion": ["yes"]})
    assert read_text(pairs).chats == (tuple(TALKS[0]),)


def test_what_is_no_text_in_parquet(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"content": ["x"], "id": [1]})
    with pytest.raises(InputError, match=r"a\.parquet: none of the columns messages, text.*only content, id"):
        read_entries("a.parquet", tmp_path)
    write(tmp_path / "b.parquet", {"text": ["x", "y", None, "z"]})
    with pytest.raises(InputError, match=r"b\.parquet: row 3 has neither"):
        read_entries("b.parquet", tmp_path)
    whole = write(tmp_path / "c.parquet", {"text": ["x" * 999]}).read_bytes()
    for cut in (b"", whole[:-1], whole[:50]):
        (tmp_path / "c.parquet").write_bytes(cut)
        with pytest.raises(InputError, match=r"c\.parquet: cannot be read as Parquet"):
            read_entries("c.parquet", tmp_path)


@pytest.mark.parametrize(
    "name",
    ["hub:acme/talks", "hub:acme/talks#train", "hub:acme/talks@main#train", f"hub:acme/talks@{COMMIT}", "hub:",
     f"hub:acme/../talks@{COMMIT}#train", f"hub:talks@{COMMIT}#train"],
)  # fmt: skip
def test_a_name_without_commit_or_split(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_entries(name, Path())
    assert "no data set, commit and split" in caught.value.message
    assert "@COMMIT#train" in caught.value.hint


def test_a_folder_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme/talks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="a folder acme/talks lies here"):
        read_entries(f"hub:acme/talks@{COMMIT}#train", Path())


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (str(path), f"hub:acme/talks@{COMMIT}#train"):
        with pytest.raises(EnvironmentProblem) as caught:
            read_entries(name, Path())
        assert caught.value.hint == "pip install 'qlora-export[data]'"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Two data sets: one of files, one that wants to run code."""
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "talks").mkdir()
    for split, talks in (("train", TALKS), ("test", TALKS[:1])):
        lines = [json.dumps({"messages": talk, "id": number}) for number, talk in enumerate(talks)]
        (folder / f"talks/{split}.jsonl").write_text("\n".join(lines))
    (folder / "code").mkdir()
    (folder / "code/code.py").write_text("raise SystemExit('code of a data set ran')\n")
    with HubServer() as server:
        for name in ("talks", "code"):
            server.add_repository(f"datasets/acme/{name}", folder / name)
        yield server


SCRIPT = """
import json, sys
from pathlib import Path
from qlora_export.errors import ExportError
from qlora_export.sources.text import read_entries
found = []
for name in sys.argv[1:]:
    try:
        found.append([[entry.place, entry.content[0]["content"]] for entry in read_entries(name, Path())])
    except ExportError as error:
        found.append([type(error).__name__, error.message])
print(json.dumps(found))
"""


def asked(endpoint: str | None, cache: Path, *names: str) -> Any:
    """What each name comes to, in a process with a cache of its own, and offline where there is no endpoint."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", SCRIPT, *names]
    found = subprocess.run(words, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_splits_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    commits = {name: hub.repositories[f"datasets/acme/{name}"].head() for name in ("talks", "code")}
    talks = f"hub:acme/talks@{commits['talks']}"
    names = [f"{talks}#train", f"{talks}#default/test", f"{talks}#train[:2]", f"{talks}#dev"]
    names += [f"hub:acme/code@{commits['code']}#train", f"hub:acme/talks@{COMMIT}#train", f"hub:acme/none@{COMMIT}#a"]
    train, test, first, no_split, code, no_commit, no_set = asked(hub.endpoint, tmp_path, *names)
    assert train == [[f"row {number}", f"question {number - 1}"] for number in range(1, 6)]
    assert (test, first) == (train[:1], train[:2])
    assert no_split[0] == "InputError"
    assert 'Unknown split "dev"' in no_split[1]
    assert code[0] == "Refused"
    assert "code of its own, which is not run" in code[1]
    assert no_commit[0] == no_set[0] == "InputError"
    (offline, unreachable) = asked(None, tmp_path, f"{talks}#train", f"hub:acme/none@{COMMIT}#a")
    assert offline == train
    assert unreachable[0] == "EnvironmentProblem"
    assert "the Hub cannot be reached" in unreachable[1]
