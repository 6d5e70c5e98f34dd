from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import jsonschema  # type: ignore[import-untyped]
import pytest
from PIL import Image

from qlora_export.drift.comparison.rows import Comparison
from qlora_export.errors import EnvironmentProblem, UsageError
from qlora_export.report.comparison import comparison_data, print_comparison, write_comparison_csv
from qlora_export.report.comparison_plot import WIDTHS, plot_shapes, require_plot, write_comparison_plot
from qlora_export.report.html.chart import Words
from qlora_export.report.html.comparison_page import comparison_page
from qlora_export.report.schemas import compare_schema


def test_the_json_is_what_its_schema_says(compared: Comparison) -> None:
    data = comparison_data(compared)
    validator = jsonschema.Draft202012Validator(compare_schema())
    assert list(validator.iter_errors(json.loads(json.dumps(data)))) == []
    data["rows"][0]["bits_per_weight"] = "few"
    del data["front"]
    assert len(list(validator.iter_errors(data))) == 2


def test_the_json_has_every_row_with_its_numbers_or_its_reason(compared: Comparison) -> None:
    rows = {row["name"]: row for row in comparison_data(compared)["rows"]}
    assert rows["bf16"]["bytes_of_fp32"] == pytest.approx(0.5, abs=0.06)
    assert rows["bf16"]["bytes_per_token_of_fp32"] == pytest.approx(0.5)
    assert rows["nf4-adapter"]["flops_of_fp32"] > 1
    assert rows["nf4-nearest"]["rounding"] == "nearest"
    assert rows["nf4-nearest"]["drift"]["survival_min"] < 0.9
    assert rows["fp32"]["rounding"] is None
    assert "calibrated needs a text to calibrate on" in rows["nf4-calibrated"]["reason"]
    assert rows["nf4-calibrated"]["bytes"] is rows["nf4-calibrated"]["drift"] is None


def test_the_csv_has_a_line_a_row(compared: Comparison, tmp_path: Path) -> None:
    write_comparison_csv(compared, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert list(lines) == [row.name for row in compared.rows]
    assert float(lines["int8"]["mean_kl"]) == comparison_data(compared)["rows"][1]["drift"]["mean_kl"]
    assert float(lines["int8"]["bits_per_weight"]) > 8
    assert lines["w4a16"]["bytes"] == ""
    assert "cannot hold" in lines["w4a16"]["reason"]


def test_the_tables_tell_sizes_reasons_and_the_choice(compared: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(compared)
    found = capsys.readouterr().out
    lines = [line.strip() for line in found.splitlines()]
    assert next(line for line in lines if line.startswith("* nf4-nearest"))
    assert next(line for line in lines if line.startswith("fp32"))
    assert "nf4-calibrated: not made: calibrated needs a text" in found
    assert "14 matrices (" in found
    assert "rank 4, 7,232 parameters in factors" in found
    assert "keeps the recipe's limits" in found
    assert max(len(line) for line in lines[: lines.index("") + 20] if "±" in line) <= 112


def test_a_vector_plot_is_the_same_each_time(compared: Comparison, tmp_path: Path) -> None:
    for name in ("first.svg", "second.svg"):
        write_comparison_plot(compared, tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "first.svg").getroot().tag.endswith("svg")


def test_the_plot_is_the_drawing_of_the_page_with_marks_by_width(compared: Comparison) -> None:
    shapes = plot_shapes(compared)
    said = [shape.said for shape in shapes if isinstance(shape, Words)]
    measured = {row.name: row.measured for row in compared.rows if row.measured is not None}
    assert {words.partition(" (below")[0] for words in said} >= set(measured)
    assert "fp32 (below 1e-06)" in said
    marks = {text.partition(":")[0]: shape.kind for shape in shapes if " MB, " in (text := getattr(shape, "said", ""))}
    assert {name: kind.split()[-1] for name, kind in marks.items()} == {
        name: found.entry.verdict.outcome for name, found in measured.items()
    }
    assert marks["bf16"].startswith("mark series-0 ")
    assert marks["nf4-adapter"].startswith(f"mark series-{list(WIDTHS).index('4 bits, adapter beside')} ")
    page = comparison_page(comparison_data(compared))
    assert all(f">{words}</text>" in page for words in ("size of the folder, MB", "mean KL, nats a token", "0.01"))
    assert {"size of the folder, MB", "mean KL, nats a token", "0.01"} <= set(said)


def test_one_row_alone_is_drawn_in_pixels(compared: Comparison, tmp_path: Path) -> None:
    write_comparison_plot(replace(compared, rows=compared.rows[:1]), tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert image.size == (1440, 896)
        assert image.convert("RGB").getpixel((3, 3)) == (255, 255, 255)


def test_what_cannot_be_drawn_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"rows.pdf: is no .svg or .png"):
        require_plot(Path("rows.pdf"))
    require_plot(Path("rows.PNG"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EnvironmentProblem, match="matplotlib is not installed") as found:
        require_plot(Path("rows.svg"))
    assert "qlora-export[report]" in found.value.hint
