"""Tuned scales: codes stay, divergence on what was held out never rises, and a killed run has its result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_export.engine.calibration.scale_tuning import HELD_OUT, Tuning
from qlora_export.formats.base import Chosen, GridFormat
from qlora_export.planning.plan import Made, Plan
from qlora_export.tensors.reading import SourceFiles
from tests.engine.calibration.conftest import Pico
from tests.engine.calibration.models import windows_of
from tests.engine.calibration.test_calibrate import blocks, made_of, pico_plan

TUNING = Tuning(steps=20, rate=0.003, batch_tokens=64, looks=2)
pytestmark = pytest.mark.usefixtures("hasty_search")
# What is held out is what was looked at: words in random order tell nothing of each other.
TOKENS = replace(windows_of(1), windows=windows_of(1).windows * (2 * HELD_OUT))


def tuned_plan(pico: Pico, out: Path, form: str) -> Plan:
    return pico_plan(pico, out, {"format": form, "rounding": "tuned", "options": OPTIONS[form]})


OPTIONS: dict[str, dict[str, Any]] = {"nf4": {}, "w4a16": {"group_size": 32}}


def chosen(plan: Plan, made: Made) -> dict[str, Chosen]:
    """Codes and scales of every layer that was decided."""
    found = {}
    with SourceFiles() as files:
        for name, route in plan.artifacts[0].routes.items():
            if isinstance(route.form, GridFormat):
                parts = {part.name: made.parts[part.name] for part in route.form.parts(route.spec)}
                raw = {part: files.read_bytes(place, 0, place.bytes) for part, place in parts.items()}
                found[name] = route.form.chosen(route.spec, raw)
    return found


@pytest.mark.parametrize("form", OPTIONS)
def test_scales_move_and_codes_stay(pico: Pico, tmp_path: Path, form: str) -> None:
    plan = tuned_plan(pico, tmp_path, form)
    item = plan.artifacts[0]
    plain = replace(plan, artifacts=(replace(item, recipe=item.recipe.model_copy(update={"rounding": "calibrated"})),))
    before = made_of(plain, tmp_path, tokens=TOKENS)
    after = made_of(plan, tmp_path, tokens=TOKENS, tuning=TUNING)
    facts = after.facts["layers"].pop("tuning")
    assert facts["step"] > 0, "there is something to gain on what was looked at"
    assert facts["mean_kl_after_nats"] < facts["mean_kl_before_nats"]
    assert after.facts["layers"] == before.facts["layers"]
    first, second = chosen(plain, before), chosen(plan, after)
    assert len(first) == 14
    for name, found in second.items():
        np.testing.assert_array_equal(found.codes, first[name].codes)
        assert (found.scales > 0).all()
    assert any((found.scales != first[name].scales).any() for name, found in second.items())


def test_a_run_that_was_killed_after_tuning_does_not_tune_again(pico: Pico, tmp_path: Path) -> None:
    plan = tuned_plan(pico, tmp_path, "nf4")
    first = made_of(plan, tmp_path, tokens=TOKENS, tuning=TUNING)
    steps: list[int] = []
    again = made_of(plan, tmp_path, tokens=TOKENS, tuning=TUNING, progress=lambda done, total: steps.append(done))
    assert steps == []
    assert blocks(again) == blocks(first)
    assert again.digest == first.digest
    fewer = replace(TUNING, steps=4)
    other = made_of(plan, tmp_path, tokens=TOKENS, tuning=fewer, progress=lambda done, total: steps.append(done))
    assert steps == [1, 2, 3, 4], "the blocks are the same, the scales of another tuning are not"
    assert other.facts["method"]["tuning_steps"] == 4


def test_tuning_that_finds_nothing_better_changes_nothing(pico: Pico, tmp_path: Path) -> None:
    plan = tuned_plan(pico, tmp_path, "w4a16")
    made = made_of(plan, tmp_path, tokens=TOKENS, tuning=replace(TUNING, rate=50.0))
    assert made.facts["layers"]["tuning"]["step"] == 0
    item = plan.artifacts[0]
    plain = replace(item, recipe=item.recipe.model_copy(update={"rounding": "calibrated"}))
    calibrated = made_of(replace(plan, artifacts=(plain,)), tmp_path, tokens=TOKENS)
    assert blocks(made) == blocks(calibrated)
