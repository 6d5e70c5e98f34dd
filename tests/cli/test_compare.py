from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.inside import inside
from tests.cli.test_cli import recipe, started

__all__ = ["recipe"]


def test_a_comparison_in_words_as_json_as_csv_and_as_a_plot(recipe: Path, tmp_path: Path) -> None:
    words = ("compare", recipe, "--out", tmp_path / "out", "--formats", "bf16,nf4:nearest", "--formats", "w4a16")
    files = ("--csv", tmp_path / "rows.csv", "--plot", tmp_path / "rows.svg", "-o", tmp_path / "rows.json")
    found = inside(*words, *files, "--html", tmp_path / "rows.html")
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert "take bf16: the smallest that keeps the recipe's limits" in found.stdout
    assert "w4a16: not made: w4a16 cannot hold" in found.stdout
    data = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["nf4-nearest", "bf16", "w4a16"]
    assert (data["recommended"], data["exit_code"]) == ("bf16", 0)
    assert (tmp_path / "rows.csv").read_text().startswith("name,format,")
    assert "<svg" in (tmp_path / "rows.svg").read_text()
    assert "<title>Comparison: take bf16</title>" in (tmp_path / "rows.html").read_text(encoding="utf-8")
    again = inside("compare", recipe, "--out", tmp_path / "out", "--formats", "bf16", "--json")
    assert again.returncode == 0, again.stderr
    (same,) = json.loads(again.stdout)["rows"]
    assert same["drift"] == data["rows"][1]["drift"]
    left = inside("clean", tmp_path / "out")
    assert "compare-trial" in left.stdout


def test_flags_do_what_a_recipe_does(pico_base: Path, pico_adapter: Path, pico_text: Path, tmp_path: Path) -> None:
    sources = ("--base", pico_base, "--adapter", pico_adapter, "--text", pico_text)
    found = started("compare", *sources, "--formats", "bf16", "--out", tmp_path / "out", "--json")
    assert found.returncode == 0, found.stderr
    assert [row["name"] for row in json.loads(found.stdout)["rows"]] == ["bf16"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--formats", "nf5"), "unknown format 'nf5'"),
        (("--formats", "nf4:up"), "'up' is no rounding"),
        (("--plot", "rows.pdf"), "is no .svg or .png"),
        (("--csv", "no/such/rows.csv"), "its folder does not exist"),
        (("--format", "bf16"), "No such option"),
    ],
)
def test_what_cannot_be_compared_is_exit_2(words: tuple[str, str], message: str, recipe: Path, tmp_path: Path) -> None:
    found = inside("compare", recipe, "--out", tmp_path / "out", *words)
    assert found.returncode == 2
    assert message in found.stderr
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_a_plot_is_exit_6_before_any_work(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = inside("compare", recipe, "--plot", "rows.svg", "--out", "out", cwd=tmp_path)
    assert found.returncode == 6, found.stderr
    assert "pip install 'qlora-export[report]'" in found.stderr
    assert not (tmp_path / "out").exists()
