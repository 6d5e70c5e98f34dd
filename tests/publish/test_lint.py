"""The release of the embedded demo lints clean; foreign files, licences and secrets are found."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_export.artifact import MANIFEST_NAME, file_facts
from qlora_export.publish.staged_folder import Staged
from tests.publish.lint_stage import (
    FORMATS,
    again,
    found,
    split,
)


@pytest.mark.parametrize("name", FORMATS)
def test_every_artifact_of_the_demo_is_clean(stage: Callable[..., Staged], name: str) -> None:
    assert found(stage(root=name)) == []


def test_artifacts_side_by_side_are_clean(stage: Callable[..., Staged]) -> None:
    assert found(stage(root="bf16", **{"onnx-int4": "onnx-int4", "kept": "nf4-adapter", "lora": "adapter"})) == []


def test_shards_are_clean(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    split(staged.folder, 3)
    assert found(again(staged)) == []


def test_all_findings_come_at_once(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "model.safetensors").write_bytes(b"short")
    (staged.folder / "tokenizer.json").unlink()
    (staged.folder / "evil.py").write_text("")
    rules = {message.rpartition("[")[2] for message in found(again(staged), None)}
    assert rules == {"header]", "companion]", "code]", "foreign-file]", "licence]"}


@pytest.mark.parametrize(
    "name", ["notes.txt", "qlora-export/.env", ".env", "optimizer.pt", ".tmpAbCd12", "README.md.tmp"]
)
def test_a_file_that_is_not_on_the_list(stage: Callable[..., Staged], name: str) -> None:
    staged = stage(root="bf16")
    (staged.folder / name).write_text("x")
    assert f"{name}: is not on the list of what is published [foreign-file]" in found(staged)


def test_a_listed_file_that_no_manifest_names(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "notes.txt").write_text("x")
    assert found(again(staged)) == ["notes.txt: is in no manifest, and none of ours [foreign-file]"]


def test_a_listed_file_that_is_missing(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "generation_config.json").unlink()
    assert found(staged) == ["generation_config.json: is listed and missing [foreign-file]"]


def test_a_listed_file_of_another_size(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "chat_template.jinja").write_text("{{ 1 }}")
    assert "chat_template.jinja: has 7 bytes, 163 are listed [foreign-file]" in found(staged)


def test_a_file_of_the_manifest_that_is_left_out(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / "chat_template.jinja").unlink()
    rest = {name: facts for name, facts in staged.files.items() if name != "chat_template.jinja"}
    assert found(replace(staged, files=rest)) == [
        "chat_template.jinja: is in its manifest, and not published [foreign-file]"
    ]


def test_facts_that_are_not_those_of_the_manifest(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    files = {**staged.files, "config.json": {**staged.files["config.json"], "sha256": "0" * 64}}
    assert found(replace(staged, files=files)) == [
        "config.json: has other facts on the list than in its manifest [foreign-file]"
    ]


def test_a_manifest_that_is_not_the_verified_one(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    (staged.folder / MANIFEST_NAME).write_bytes((staged.folder / MANIFEST_NAME).read_bytes() + b" ")
    files = {**staged.files, MANIFEST_NAME: file_facts(staged.folder / MANIFEST_NAME)}
    assert found(replace(staged, files=files)) == [
        "manifest.json: is not the manifest of the artifact that was verified [foreign-file]"
    ]


@pytest.mark.parametrize("name", ["a:b.json", "evil\u202enosj.json", "back\\slash.json", "two\nlines.json"])
def test_a_hostile_name_on_the_disk_is_refused_and_not_opened(stage: Callable[..., Staged], name: str) -> None:
    staged = stage(root="bf16")
    (staged.folder / name).write_text("hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz")
    messages = found(again(staged))
    assert [message.rpartition(" ")[2] for message in messages] == ["[hostile-path]", "[foreign-file]"]


def test_links_pipes_and_sockets_are_no_files(stage: Callable[..., Staged], tmp_path: Path) -> None:
    staged = stage(root="bf16")
    for name in ("config.json", "tokenizer.json", "generation_config.json", "qlora-export/report.json"):
        (staged.folder / name).unlink()
    (tmp_path / "outside").write_text("{}")
    (staged.folder / "config.json").symlink_to(tmp_path / "outside")
    (staged.folder / "generation_config.json").symlink_to(staged.folder / "chat_template.jinja")
    os.mkfifo(staged.folder / "tokenizer.json")
    before = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(staged.folder / "qlora-export")
        try:
            server.bind("report.json")
        finally:
            os.chdir(before)
        messages = found(staged)
    for name, what in (("config", "a link"), ("generation_config", "a link"), ("tokenizer", "a pipe")):
        assert f"{name}.json: is {what}, expected a regular file [hostile-path]" in messages
    assert "qlora-export/report.json: is a socket, expected a regular file [hostile-path]" in messages


def test_a_pickle_by_another_name(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    torch.save({"a": 1}, staged.folder / "generation_config.json")
    assert "generation_config.json: begins as a pickle or an archive does [pickle]" in found(again(staged))


def test_a_licence_there_must_be(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    assert found(staged, None) == ["README.md: no licence is stated, and there is no LICENSE file [licence]"]
    (staged.folder / "LICENSE").write_text("All rights reserved.")
    assert found(again(staged), None) == []


def test_a_licence_that_promises_too_much(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    assert found(staged, "apache-2.0", "llama3.1") == [
        "README.md: the licence apache-2.0 is not known to be as strict as the base's, llama3.1 [licence]"
    ]
    assert found(staged, "llama3.1", "llama3.1") == []


def test_a_token_in_a_template(stage: Callable[..., Staged]) -> None:
    staged = stage(root="bf16")
    token = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz"
    (staged.folder / "chat_template.jinja").write_text("{# first #}\n{{ call('" + token + "') }}")
    (message,) = found(again(staged))
    assert message == "chat_template.jinja: line 2 holds what looks like a token of the Hub [secret]"
