"""--protocol, and the same in a recipe: what is measured, and what is refused before anything is built."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.cli.inside import inside
from tests.processes import Finished


def check(base: Path, out: Path, *words: Any) -> Finished:
    return inside("check", "--base", base, "--format", "bf16", "--out", out, *words)


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"Order {number} came broken. We are sorry."}) for number in range(9))
    )
    return path


def test_a_named_protocol_is_told_with_every_number(pico_base: Path, prose: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "--text",
        prose,
        "--protocol",
        "strided",
        "--set",
        "drift.window_tokens=32",
        "--set",
        "drift.stride_tokens=8",
    )
    found = check(pico_base, out, *words)
    assert found.returncode in (0, 11), found.stderr
    tokens = json.loads((out / "report.json").read_text())["tokens"]
    assert (tokens["name"], tokens["window_tokens"], tokens["stride_tokens"]) == ("strided", 32, 8)
    assert (tokens["begin"], tokens["documents"]) == (None, None)
    line = f"protocol strided: {tokens['protocol']} ({tokens['windows']} windows)"
    assert line in found.stdout
    assert line in (out / "report.md").read_text()


def test_documents_are_told_with_their_words_and_bytes(pico_base: Path, prose: Path, tmp_path: Path) -> None:
    found = check(pico_base, tmp_path / "out", "--text", prose, "--protocol", "lm-eval-rolling", "--json")
    assert found.returncode in (0, 11), found.stderr
    report = json.loads(found.stdout)
    by_document = report["document_perplexity"]
    assert set(by_document["artifacts"]) == {"bf16"}
    nll = math.log(report["reference"]["perplexity"]) * report["tokens"]["count"]
    bits = nll / report["tokens"]["documents"]["bytes"] / math.log(2)
    assert by_document["reference"]["bits_per_byte"] == pytest.approx(bits)
    assert report["tokens"]["documents"] == {
        "count": 9,
        "words": 63,
        "bytes": 9 * len("Order 0 came broken. We are sorry."),
    }


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("--protocol", "disjoint-4096"), "windows of 4096 tokens, and the model's context is 2048", "disjoint-2048"),
        (("--protocol", "disjont-8"), "unknown protocol 'disjont-8'", "did you mean disjoint-2048?"),
        (("--set", "drift.stride_tokens=8"), "windows has no stride", "protocol strided"),
    ],
)
def test_what_does_not_fit_is_exit_2_before_anything_is_built(
    words: tuple[str, ...], message: str, hint: str, pico_base: Path, prose: Path, tmp_path: Path
) -> None:
    found = check(pico_base, tmp_path / "out", "--text", prose, *words)
    assert found.returncode == 2
    assert message in found.stderr
    assert hint in found.stderr
    assert not (tmp_path / "out/bf16").exists()


def test_chats_by_a_protocol_for_running_text(pico_base: Path, pico_text: Path, tmp_path: Path) -> None:
    found = check(pico_base, tmp_path / "out", "--text", pico_text, "--protocol", "llama.cpp-16")
    assert found.returncode == 2
    assert "protocol llama.cpp-16 is for running text" in found.stderr
    assert "take protocol windows" in found.stderr
    assert not (tmp_path / "out/bf16").exists()


def test_a_text_shorter_than_a_window_is_exit_5(pico_base: Path, prose: Path, tmp_path: Path) -> None:
    found = check(pico_base, tmp_path / "out", "--text", prose, "--protocol", "disjoint-2048")
    assert found.returncode == 5
    assert "scores whole windows of 2048 tokens" in found.stderr


def test_a_protocol_without_a_text(pico_base: Path, tmp_path: Path) -> None:
    found = check(pico_base, tmp_path / "out", "--protocol", "strided")
    assert found.returncode == 2
    assert "--protocol strided without a text to measure on" in found.stderr
