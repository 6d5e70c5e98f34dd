"""What tuning takes: compared with what the kernel counts, and refused before anything is calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_export.engine.calibration import tuning_memory
from qlora_export.engine.calibration.block_pass import CalibrationOptions
from qlora_export.engine.calibration.scale_tuning import Tuning
from qlora_export.engine.calibration.tuning_memory import tuning_bytes
from qlora_export.errors import EnvironmentProblem, ExitCode
from qlora_export.pipeline import calibrate
from tests.engine.calibration.conftest import Pico
from tests.engine.calibration.models import windows_of
from tests.engine.calibration.test_calibrate import pico_plan
from tests.helpers.pico import save_base
from tests.processes import forked

TUNED = {"format": "w4a16", "rounding": "tuned", "options": {"group_size": 32}}
CALIBRATED = {**TUNED, "rounding": "calibrated"}
# Tunes each base for two steps, and says what that added to the process at its peak, and what was estimated.
CHILD = """
import sys
import ctypes, gc
import torch
from pathlib import Path
from typing import Any
from qlora_export.engine.calibration import calibrate as running
from qlora_export.engine.calibration.block_pass import CalibrationOptions
from qlora_export.engine.calibration.text import CalibrationTokens
from qlora_export.engine.calibration.scale_tuning import Tuning
from qlora_export.engine.calibration.tuning_memory import tuning_bytes
from qlora_export.planning.make import make_plan
from qlora_export.quant.rounding import scale_search, solving
from qlora_export.quant.rounding.solving import Method
from qlora_export.recipe.load import make_recipe

real = running.tuned


def kernel(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def measured(base, length, tokens):
    artifact = {"format": "w4a16", "rounding": "tuned", "options": {"group_size": 32}}
    facts = {"base": str(base), "artifacts": [artifact], "calibration": {"text": str(base / "config.json")}}
    out = base.with_name(f"{base.name}-out")
    out.mkdir()
    plan = make_plan(make_recipe(facts, Path(), "child"), out)
    windows = tuple(tuple((7 * row + place) % 500 for place in range(length)) for row in range(2 * tokens // length))

    def tuned(*arguments):
        # What was freed before goes back to the kernel: memory that is used again would not be counted.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = kernel("VmRSS")
        made = real(*arguments)
        print(kernel("VmHWM") - before, tuning_bytes(plan, plan.artifacts[0], windows, tokens))
        return made

    running.tuned = tuned
    options = CalibrationOptions(out, method=Method(0, 0, False, 1), tuning=Tuning(steps=2, batch_tokens=tokens))
    running.calibrate(plan, plan.artifacts[0], CalibrationTokens(windows, (), ()), options)


# One arena that gives large blocks back at once: else the peak is that of what was freed and not returned, too.
MMAP_THRESHOLD, ARENA_MAX = -3, -8
ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)
ctypes.CDLL(None).mallopt(ARENA_MAX, 1)
torch.set_num_threads(1)
# Rounded to nearest: what tuning begins with changes no memory.
scale_search.FRACTIONS = (1.0,)
solving.feed_back = lambda target, inverse, grid, scales: grid.nearest(target, scales)
for base, length, tokens in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True):
    measured(Path(base), int(length), int(tokens))
"""
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "weights": ({"hidden_size": 448, "intermediate_size": 768, "vocab_size": 512}, 64, 128),
    "vocabulary": ({"intermediate_size": 128, "vocab_size": 10000}, 256, 512),
}


def test_the_estimate_is_what_the_kernel_counts(tmp_path: Path) -> None:
    words: list[object] = []
    for shape, (changes, length, tokens) in SHAPES.items():
        base = save_base(tmp_path / shape, seed=1, **changes)
        words += [base, length, tokens]
    found = forked("-c", CHILD, *words)
    assert found.returncode == 0, found.stderr
    measured = [[int(word) for word in line.split()] for line in found.stdout.splitlines()]
    assert len(measured) == len(SHAPES)
    for shape, (peak, estimate) in zip(SHAPES, measured, strict=True):
        assert peak < estimate < 1.3 * peak, shape


def test_tuning_is_refused_before_anything_is_decided(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pico_plan(pico, tmp_path, {**CALIBRATED, "name": "first"}, {**TUNED, "name": "second"})
    needed = tuning_bytes(plan, plan.artifacts[1], windows_of(9).windows, Tuning().batch_tokens)
    given = plan, plan.artifacts, windows_of(9), CalibrationOptions(tmp_path)
    monkeypatch.setattr(tuning_memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(EnvironmentProblem, match=r"artifact second: tuning takes about .* this machine has") as caught:
        calibrate.calibrated(*given, lambda stage: pytest.fail("nothing was to begin"))
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert "rounding: calibrated" in str(caught.value.hint)
    tuning_memory.require_memory(plan, plan.artifacts[:1], windows_of(9), CalibrationOptions(tmp_path))
    for enough in (needed, None):
        monkeypatch.setattr(tuning_memory, "available_bytes", lambda device, enough=enough: enough)
        tuning_memory.require_memory(*given)
