from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.cli.options import recipe_from
from qlora_export.errors import UsageError
from qlora_export.publish.public_report import public_recipe
from qlora_export.recipe.calibration import CalibrationPart, CalibrationRecipe
from qlora_export.recipe.config import Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.report.schemas import recipe_schema

HALVES = [{"text": "in/task.jsonl", "share": 0.5}, {"text": "/deep/general.txt", "share": 0.5}]


def recipe(calibration: Any) -> Recipe:
    return make_recipe({"base": "b", "artifacts": ["bf16"], "calibration": calibration}, Path(), "test")


def section(calibration: Any) -> CalibrationRecipe:
    found = recipe(calibration).calibration
    assert found is not None
    return found


def test_one_text() -> None:
    found = section({"text": "train.jsonl", "sequences": 32, "window_tokens": 100, "seed": 3})
    assert (found.sequences, found.window_tokens, found.seed) == (32, 100, 3)
    assert found.parts == (CalibrationPart(text="train.jsonl", share=1.0),)
    assert recipe(None).calibration is None


def test_a_list_is_a_mixture_of_the_usual_size() -> None:
    found = section(HALVES)
    assert (found.sequences, found.window_tokens, found.seed) == (128, 512, 0)
    assert [(part.text, part.share) for part in found.parts] == [("in/task.jsonl", 0.5), ("/deep/general.txt", 0.5)]
    assert section({"mixture": HALVES, "sequences": 128}) == found


@pytest.mark.parametrize(
    ("calibration", "says", "hint"),
    [
        ({"txt": "a"}, "unknown key calibration.txt", "did you mean text?"),
        ([{"text": "a", "shere": 1}], "unknown key calibration.mixture.0.shere", "did you mean share?"),
        ({}, "name either one text, or a mixture", ""),
        ([], "name either one text, or a mixture", ""),
        ({"text": "a", "mixture": HALVES}, "name either one text, or a mixture", ""),
        ([{"text": "a", "share": 0.5}, {"text": "b", "share": 0.4}], "the shares of the mixture come to 0.9", ""),
        ([{"text": "a"}, {"text": "b"}], "come to 2, and not to 1", ""),
        ([{"text": "a", "share": 0.5}, {"text": "a", "share": 0.5}], "a is twice in the mixture", ""),
        ([{"text": "a", "share": 0}], "calibration.mixture.0.share", ""),
        ({"text": "a", "sequences": 0}, "calibration.sequences", ""),
        ({"text": "a", "method": {"sweep": 0}}, "unknown key calibration.method.sweep", "did you mean sweeps?"),
        ({"text": "a", "method": {"correction": 1.5}}, "calibration.method.correction", ""),
        ({"text": "a", "window_tokens": 4}, "calibration.window_tokens", ""),
        ("train.jsonl", "calibration", ""),
    ],
)
def test_what_is_wrong_is_named(calibration: Any, says: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(calibration)
    assert says in caught.value.message
    assert hint in caught.value.hint


@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_shares_in_two_decimals_are_a_whole(weights: list[int]) -> None:
    """As people write them: rounded, the last one takes what is left."""
    shares = [round(weight / sum(weights), 2) for weight in weights[:-1]]
    last = round(1 - sum(shares), 2)
    if min([*shares, last]) <= 0:
        return
    found = CalibrationRecipe.model_validate(
        [{"text": f"{number}.txt", "share": share} for number, share in enumerate([*shares, last])]
    )
    assert len(found.parts) == len(weights)


def test_the_digest_follows_the_section() -> None:
    digests = {recipe(value).digest for value in (None, HALVES, {"text": "a"}, {"text": "a", "seed": 1})}
    assert len(digests) == 4


def test_no_folder_is_published() -> None:
    texts = public_recipe(recipe(HALVES))["calibration"]["mixture"]
    assert [item["text"] for item in texts] == ["task.jsonl", "general.txt"]
    assert public_recipe(recipe({"text": "~/mine/a.jsonl"}))["calibration"]["text"] == "a.jsonl"
    hub = f"hub:acme/talks@{'0' * 40}#train"
    assert public_recipe(recipe({"text": hub}))["calibration"]["text"] == hub


def test_the_flag_names_one_text() -> None:
    flags = dict.fromkeys(["--adapter", "--onto", "--training-quantization", "--text"])
    flags |= {"--base": "b", "--calibration": "train.jsonl"}
    found = recipe_from(None, {**flags, "--format": ["bf16"]}, ["calibration.sequences=7"])
    assert found.calibration == CalibrationRecipe(text="train.jsonl", sequences=7)


@pytest.mark.parametrize(
    ("calibration", "good"),
    [
        ({"text": "a.jsonl", "sequences": 8}, True),
        (HALVES, True),
        ({"mixture": HALVES, "seed": 1}, True),
        ({"sequences": 8}, False),
        ({"text": "a", "mixture": HALVES}, False),
        ([], False),
        ([{"share": 1}], False),
        ({"txt": "a"}, False),
    ],
)
def test_the_schema_knows_both_spellings(calibration: Any, good: bool) -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    assert validator.is_valid({"base": "b", "artifacts": ["bf16"], "calibration": calibration}) is good
