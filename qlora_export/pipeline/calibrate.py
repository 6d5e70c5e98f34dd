"""Rounding by calibration, before the build: which artifacts ask for it, on which tokens, and what becomes of the plan.

A finished artifact is not calibrated again. What was decided lies in `OUT/DIGEST.calibrated` until it is
built.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_export.engine.build import locked
from qlora_export.engine.calibration.contamination import require_apart
from qlora_export.engine.calibration.store import folders_of_blocks, remove_blocks
from qlora_export.engine.calibration.text import CalibrationTokens, calibration_tokens, read_calibration
from qlora_export.errors import UsageError
from qlora_export.planning.plan import ArtifactPlan, Plan
from qlora_export.planning.rounding_checks import CALIBRATED
from qlora_export.recipe.calibration import CalibrationMethod
from qlora_export.recipe.config import Recipe
from qlora_export.sources.text import read_entries
from qlora_export.sources.tokenizer import Tokenizer
from qlora_export.types import Track

if TYPE_CHECKING:
    from qlora_export.engine.calibration.block_pass import CalibrationOptions


def to_calibrate(plan: Plan, out: Path) -> list[ArtifactPlan]:
    """The artifacts that are rounded by calibration and are not there yet."""
    asked = [item for item in plan.artifacts if item.rounding.chosen in CALIBRATED]
    return [item for item in asked if not os.path.lexists(out / item.name)]


def tokens_of(recipe: Recipe, tokenizer: Tokenizer) -> CalibrationTokens:
    """The tokens of the recipe's calibration; raises Refused where the text of drift stands in it."""
    if recipe.calibration is None:
        raise UsageError("the recipe has no calibration text", "add `calibration: {text: FILE}` or give --calibration")
    texts = read_calibration(recipe.calibration, recipe.folder)
    if recipe.drift is not None:
        require_apart(texts, read_entries(recipe.drift.text, recipe.folder), recipe.drift.text)
    return calibration_tokens(recipe.calibration, texts, tokenizer)


def calibration_options(recipe: Recipe, out: Path, device: str) -> CalibrationOptions:
    """The recipe's method, on a device."""
    from qlora_export.engine.calibration.block_pass import CalibrationOptions
    from qlora_export.engine.calibration.scale_tuning import Tuning
    from qlora_export.quant.rounding.solving import Method

    chosen = recipe.calibration.method if recipe.calibration is not None else CalibrationMethod()
    method = Method(chosen.correction, chosen.sweeps, chosen.fit_scales, chosen.delta_rounds)
    return CalibrationOptions(out, device, method=method, tuning=Tuning(steps=chosen.tuning_steps))


def calibrated(
    plan: Plan, items: Sequence[ArtifactPlan], tokens: CalibrationTokens, options: CalibrationOptions, track: Track
) -> Plan:
    """The plan with the layers of these artifacts decided; raises EnvironmentProblem before where memory is short."""
    from qlora_export.engine.calibration.calibrate import calibrate
    from qlora_export.engine.calibration.tuning_memory import require_memory

    require_memory(plan, items, tokens, options)
    made = {}
    for item in items:
        with track(f"calibrate {item.name}") as progress:
            made[item.name] = calibrate(plan, item, tokens, replace(options, progress=progress))
    changed = (replace(item, made=made[item.name]) if item.name in made else item for item in plan.artifacts)
    return replace(plan, artifacts=tuple(changed))


def remove_decided_layers(plan: Plan, out: Path) -> None:
    """Remove what was kept for artifacts that are built now; where another run is at work, its own end does."""
    if not any(item.rounding.chosen in CALIBRATED for item in plan.artifacts):
        return
    with suppress(UsageError), locked(out):
        for folder in folders_of_blocks(out):
            remove_blocks(folder)
