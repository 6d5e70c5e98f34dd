"""--choices and --prompts: what is reported, and what is refused before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.inside import inside
from tests.helpers.pico import DIALOGUE
from tests.processes import Finished

QUESTION = {"messages": DIALOGUE[:1], "choices": ["We are sorry.", "Hello."], "answer": "Hello."}


def check(base: Path, text: Path | None, out: Path, *words: Any) -> Finished:
    given = ("--text", text) if text else ()
    return inside("check", "--base", base, "--format", "bf16", "--out", out, *given, *words)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n")
    return path


def test_questions_and_prompts_are_told(pico_base: Path, pico_text: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--choices", questions, "--prompts", pico_text, "--set", "drift.generate_tokens=4")
    found = check(pico_base, pico_text, out, *words)
    assert found.returncode in (0, 11), found.stderr
    (artifact,) = json.loads((out / "report.json").read_text())["artifacts"]
    assert artifact["choices"]["items"] == 1
    assert artifact["generation"]["tokens"] == 4
    assert artifact["generation"]["whole"] == artifact["generation"]["prompts"] == 10
    assert artifact["choices"]["accuracy_stderr"] is None
    assert "% of 1 questions right" in found.stdout
    assert "nan" not in found.stdout
    assert "10 of 10 prompts to their end" in (out / "report.md").read_text()


def test_a_wrong_file_is_exit_5_before_anything_is_built(
    pico_base: Path, pico_text: Path, questions: Path, tmp_path: Path
) -> None:
    questions.write_text(json.dumps({**QUESTION, "answer": "Bye."}))
    found = check(pico_base, pico_text, tmp_path / "out", "--choices", questions)
    assert found.returncode == 5
    assert f"error: {questions}: line 1: the answer 'Bye.' is not among its choices" in found.stderr
    assert "hint: " in found.stderr
    assert not (tmp_path / "out").exists()


def test_they_go_with_a_text(pico_base: Path, questions: Path, tmp_path: Path) -> None:
    found = check(pico_base, None, tmp_path / "out", "--choices", questions)
    assert found.returncode == 2
    assert "without a text to measure on" in found.stderr
