"""Secrets are found and taken out, and what is none is left alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.publish.lint.contents import Contents
from qlora_export.publish.lint.secrets import secret_problems
from qlora_export.publish.redaction import REDACTED, find_secrets, redact
from tests.helpers.pico import DEMO

VARIED = "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xYzAbCdEfG"
KEY = (
    "-----BEGIN OPENSSH PRIVATE KEY-----\n"
    + "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU9\n" * 3
    + "-----END OPENSSH PRIVATE KEY-----"
)
SECRETS = {
    "hf_" + VARIED[:34]: "a token of the Hub",
    "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh": "a token of the Hub",
    "hf_jwt_eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcDEF123_-": "a token of a Hub job",
    "hf_oauth_" + VARIED: "an OAuth token of the Hub",
    "api_org_" + VARIED[:34]: "a token of the Hub",
    "Bearer eyJhbGciOiJIUzI1NiJ9.e30.abc": "a bearer token",
    "ghp_" + VARIED[:36]: "a GitHub token",
    "github_pat_" + VARIED + "_" + VARIED: "a GitHub token",
    "glpat-" + VARIED[:20]: "a GitLab token",
    "sk-" + VARIED + VARIED[:8]: "an API key",
    "sk-proj-" + VARIED[:20] + "_-" + VARIED: "an API key",
    "sk-ant-api03-" + VARIED: "an API key",
    "AKIA" + "Q3EGRIZ7XAB2CD4F": "an AWS key",
    "ASIA" + "Q3EGRIZ7XAB2CD4F": "an AWS key",
    "aws_secret_access_key = " + VARIED: "an AWS secret",
    "AIza" + VARIED[:35]: "a Google API key",
    "xoxb-123456789012-" + VARIED[:24]: "a Slack token",
    "pypi-AgEI" + VARIED + VARIED: "a PyPI token",
    KEY: "a private key",
    KEY.replace("\n", "\\n"): "a private key",
}
HARMLESS = [
    "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "hf_hub_download(repo_id) and hf_device_map, hf_transfer",
    "Authorization: Bearer $HF_TOKEN",
    "Bearer authentication is used by the server",
    "task-0123456789abcdef0123456789abcdef0123 and risk-assessment-of-language-models",
    "sk-learn-contrib-something-long-and-boring",
    "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----",
    "-----BEGIN PRIVATE KEY----- is how a key begins",
    "0123456789abcdef" * 4,
    "AKIAXXXXXXXXXXXXXXXX",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("around", ["{}", "line\n\n  key: {} # comment\n", '{{"token": "{}"}}', "x={}&y=1"])
def test_a_secret_is_found_and_redacted(secret: str, around: str) -> None:
    text = around.format(secret)
    found = list(find_secrets(text.encode()))
    assert SECRETS[secret] in [item.what for item in found]
    assert {item.line for item in found} == {text[: text.index(secret)].count("\n") + 1}
    clean = redact(text)
    assert REDACTED in clean
    assert VARIED[:12] not in clean
    assert clean.replace(REDACTED, "").strip() == around.format("").strip()


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_is_no_finding(text: str) -> None:
    assert list(find_secrets(text.encode())) == []


def test_the_tokenizer_of_the_demo_is_no_finding() -> None:
    for path in (DEMO / "base").glob("*.json"):
        assert list(find_secrets(path.read_bytes())) == []


@pytest.mark.parametrize("indent", [None, 2])
def test_a_vocabulary_of_twenty_megabytes_is_quick_and_harmless(tmp_path: Path, indent: int | None) -> None:
    """Every beginning of a secret is a token of its own, and many words follow."""
    beginnings = ["hf_", "sk-", "gh", "Bearer ", "AKIA", "-----BEGIN ", "xox", "github_pat_", "PRIVATE KEY", "AIza"]
    words = [f"{start}{number:x}" for number in range(70_000) for start in beginnings]
    text = json.dumps({"vocab": {word: place for place, word in enumerate(words)}}, indent=indent)
    (tmp_path / "tokenizer.json").write_text(text)
    assert len(text) > 15_000_000
    start = time.process_time()
    assert list(secret_problems(Contents(tmp_path, frozenset(["tokenizer.json"])))) == []
    assert time.process_time() - start < 5


def test_a_finding_names_file_and_line_and_keeps_the_secret(tmp_path: Path) -> None:
    secret = "hf_" + VARIED[:34]
    (tmp_path / "notes.md").write_text(f"one\ntwo {secret}\nthree {secret}\n")
    (tmp_path / "empty.txt").write_text("")
    (problem,) = secret_problems(Contents(tmp_path, frozenset(["notes.md", "empty.txt"])))
    assert problem.message == "notes.md: line 2 holds what looks like a token of the Hub [secret]"
    assert VARIED[:6] not in problem.message + problem.hint


def test_a_secret_behind_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\xff\xfe" + b"hf_" + VARIED[:34].encode() + b"\xff")
    (problem,) = secret_problems(Contents(tmp_path, frozenset(["model.onnx"])))
    assert problem.message.endswith("[secret]")


def test_what_is_said_to_be_secret_is_taken_out_first() -> None:
    text = "password hunter22 and longer hunter22-more"
    assert redact(text, ["", "hunter22", "hunter22-more"]) == f"password {REDACTED} and longer {REDACTED}"
    assert redact("nothing", ["", "no"]) == "nothing"


@given(text=st.text(), secret=st.text(min_size=4, max_size=12))
def test_a_literal_secret_never_stays(text: str, secret: str) -> None:
    clean = redact(f"{text}{secret}{text}", [secret])
    assert secret not in clean.replace(REDACTED, "\0")


@given(text=st.text(st.characters(codec="utf-8"), max_size=200))
def test_redacting_twice_changes_nothing(text: str) -> None:
    once = redact(text + "\nhf_" + VARIED)
    assert redact(once) == once
