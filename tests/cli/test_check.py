"""`check ARTIFACT --against MODEL` from the command line: what is printed and written, and the exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from qlora_export.report.schemas import report_schema
from tests.cli.inside import inside
from tests.helpers.files import edit_tensors
from tests.processes import Finished, forked

SOUND = ("--set", "drift.limits={perplexity_ratio: 1.001, mean_kl: 0.0001, same_top1: null, gain_kept: null}")


def check(*words: Any, **options: Any) -> Finished:
    return inside("check", *words, **options)


def test_a_sound_folder_passes_and_is_reported(pico_base: Path, pico_text: Path, tmp_path: Path) -> None:
    words = ("check", pico_base, "--against", pico_base, "--text", pico_text, *SOUND, "--json")
    found = forked("-m", "qlora_export", *words, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    data = json.loads(found.stdout)
    assert list(Draft202012Validator(report_schema()).iter_errors(data)) == []
    assert data["recipe_digest"] is None
    written = tmp_path / "out" / f"check-{pico_base.name}"
    assert json.loads((written / "report.json").read_text()) == data
    assert {path.name for path in written.iterdir()} == {"references", "report.html", "report.json", "report.md"}
    assert (written / "report.md").read_text().startswith("# Drift report\n\nDrift from the model, on 130 tokens.")


def test_a_worse_one_is_exit_3_and_names_the_layer(pico_base: Path, pico_text: Path, tmp_path: Path) -> None:
    worse = Path(shutil.copytree(pico_base, tmp_path / "worse"))
    edit_tensors(worse / "model.safetensors", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))
    xml = tmp_path / "junit.xml"
    found = check(
        worse, "--against", pico_base, "--text", pico_text, *SOUND, "--out", tmp_path / "out", "--junit-xml", xml
    )
    assert (found.returncode, found.stderr) == (3, "")
    assert "Drift from the model" in found.stdout
    assert "model.layers.1.mlp.up_proj" in found.stdout
    assert 'failures="' in xml.read_text()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--against", "BASE"], 2, "without a text to measure on"),
        (["--against", "BASE", "--text", "TEXT", "--format", "bf16"], 2, "--against and --format"),
        (["--against", "nowhere", "--text", "TEXT"], 5, "nowhere: no such folder"),
        (["--against", "BASE", "--text", "nowhere.txt"], 5, "nowhere.txt: no such text"),
        (["--against", "BASE", "--text", "TEXT", "--protocol", "strided"], 2, "protocol strided is for running text"),
    ],
)
def test_bad_input(words: list[str], code: int, says: str, pico_base: Path, pico_text: Path, tmp_path: Path) -> None:
    given = [{"BASE": str(pico_base), "TEXT": str(pico_text)}.get(word, word) for word in words]
    found = check(pico_base, *given, "--out", tmp_path / "out")
    assert found.returncode == code, found.stderr
    assert says in found.stderr
    assert "hint: " in found.stderr
    assert "Traceback" not in found.stderr


def test_against_needs_an_artifact(pico_base: Path) -> None:
    found = check("--against", pico_base)
    assert found.returncode == 2
    assert "--against without an artifact" in found.stderr
