"""The quality benchmark and the maker of its second model run, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tools.running import printed, tool

# The benchmark with two more rows: of a format that will never exist, and one that is another's twin.
WITH_STRANGERS = """
import bench_quality as bench
bench.ROWS |= {'stranger': {'format': 'no-such'}, 'twin': {'format': 'int8', 'onto': 'as-trained'}}
bench.main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    tool("make_quality_model.py", "--out", str(folder), "--tiny")
    return folder


@pytest.fixture(scope="module")
def data(model: Path) -> Any:
    """Some rows, two strangers, a peer that is not installed, and the sweep."""
    rows = "bf16;nf4 nearest;int8;twin;stranger"
    words = ["--models", str(model), "--rows", rows, "--sweep", "--peer-python", sys.executable, "--tiny", "--json"]
    return json.loads(printed(WITH_STRANGERS, *words))


def test_the_maker_of_the_second_model(model: Path) -> None:
    record = json.loads((model / "training_record.json").read_text())
    sidecar = json.loads((model / "adapter/qlora_export.json").read_text())
    assert set(record["adapter"]["relative_delta"]) == set(sidecar["modules"])
    assert len(sidecar["modules"]) == 14
    held_out, calibration = ((model / f"{name}.jsonl").read_text().splitlines() for name in ("holdout", "calibration"))
    assert len(held_out) == len(calibration) == 4
    assert not set(held_out) & set(calibration)
    assert not any(str(model) in path.read_text() for path in model.rglob("*.json*"))


def test_rows_are_measured_on_the_same_tokens(data: Any) -> None:
    table = data["models"]["tiny"]
    rows = table["rows"]
    assert table["tokens"] >= 200
    assert list(rows) == ["bf16", "nf4 nearest", "int8", "twin"]
    assert rows["bf16"]["mean_kl"] < rows["int8"]["mean_kl"] < rows["nf4 nearest"]["mean_kl"]
    assert rows["bf16"]["bits_per_weight"] == 16
    assert 4.1 < rows["nf4 nearest"]["bits_per_weight"] < 4.8
    assert data["int8_kl"] == rows["int8"]["mean_kl"]
    assert data["nf4_calibrated_to_better_plain"] is None


def test_what_is_refused_is_a_row_with_its_error(data: Any) -> None:
    refused = data["models"]["tiny"]["refused"]
    assert refused["stranger"].startswith("unknown format 'no-such'")
    assert "No module named 'llmcompressor'" in refused["llm-compressor w4a16"]


def test_a_row_with_the_bytes_of_another_says_so(data: Any) -> None:
    rows = data["models"]["tiny"]["rows"]
    assert {name: row["same_bytes_as"] for name, row in rows.items() if row["same_bytes_as"]} == {"twin": "int8"}


def test_a_delta_of_nothing_is_part_of_the_sweep(data: Any) -> None:
    points = data["sweep"]["tiny"]
    assert list(points) == ["0", "2"]
    assert points["0"]["rows"]["nf4 nearest"]["mean_kl"] < 1e-6
    assert points["2"]["rows"]["nf4 nearest"]["mean_kl"] > data["models"]["tiny"]["rows"]["nf4 nearest"]["mean_kl"]
