from __future__ import annotations

import pytest

from qlora_export.drift.comparison.candidates import Candidate, candidate, candidates
from qlora_export.errors import UsageError
from tests.helpers.pico import RecipeMaker


def test_a_candidate_is_spelled_by_format_rounding_and_merge_base() -> None:
    assert candidate("int8") == Candidate("int8")
    assert candidate("nf4:search") == Candidate("nf4", "search")
    assert candidate("w4a16@original") == Candidate("w4a16", None, "original")
    assert candidate("nf4:nearest@original").name == "nf4-nearest-original"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nf5", "unknown format 'nf5'"),
        ("nf4:up", "'up' is no rounding"),
        ("nf4@base", "'base' is no merge base"),
        ("nf4:", "'' is no rounding"),
    ],
)
def test_what_is_no_candidate_is_told(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        candidate(text)


def test_lists_are_split_and_each_is_compared_once(pico_recipe: RecipeMaker) -> None:
    found = candidates(["bf16, nf4:nearest", "bf16"], pico_recipe("bf16"))
    assert [item.name for item in found] == ["bf16", "nf4-nearest"]


def test_the_usual_list_calibrates_where_there_is_a_text(pico_recipe: RecipeMaker) -> None:
    plain = {item.name for item in candidates([], pico_recipe("bf16"))}
    calibrated = {item.name for item in candidates([], pico_recipe("bf16", calibration={"text": "t.jsonl"}))}
    assert {"fp32", "int8", "nf4-nearest", "nf4-nearest-original", "nf4-dithered", "nf4-adapter"} <= plain
    assert calibrated - plain == {"nf4-calibrated", "w4a16-calibrated"}


def test_without_an_adapter_nothing_is_compared_that_needs_one(pico_recipe: RecipeMaker) -> None:
    names = {item.name for item in candidates([], pico_recipe("bf16", adapter=None))}
    assert names.isdisjoint({"nf4-adapter", "nf4-dithered"})
    assert "nf4-adapter" in {item.name for item in candidates(["nf4-adapter"], pico_recipe("bf16", adapter=None))}


def test_options_are_those_of_the_recipe(pico_recipe: RecipeMaker) -> None:
    stated = {"format": "w4a16", "name": "small", "options": {"group_size": 32}, "keep": ["*"], "expect": "fail"}
    artifact = candidate("w4a16").artifact(pico_recipe(stated))
    assert (artifact.options, artifact.keep) == ({"group_size": 32}, ("*",))
    assert (artifact.name, artifact.expect) == ("w4a16", "pass")


def test_an_export_of_other_integers_has_options_of_its_own(pico_recipe: RecipeMaker) -> None:
    recipe = pico_recipe("bf16", {"format": "onnx-int4", "options": {"block_size": 16}})
    assert candidate("onnx-int4").artifact(recipe).options == {"block_size": 16}
    assert candidate("onnx-int4:nearest").artifact(recipe).options == {}
