"""What rounding an artifact may have, what it has where none is named, and what a plan predicts and says of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.errors import ExitCode, PlanRefused
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.planning.survival_estimate import SAMPLE_WEIGHTS, sample_of
from qlora_export.report.data import plan_summary
from tests.helpers.pico import RecipeMaker, save_adapter

NEAREST = {"format": "nf4", "rounding": "nearest"}
CALIBRATED = {"format": "nf4", "rounding": "calibrated"}


@pytest.fixture(scope="module")
def small(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(pico_base, tmp_path_factory.mktemp("small") / "adapter", seed=5, size=0.004)


def chosen(plan: Plan) -> list[Any]:
    return [item.rounding.chosen for item in plan.artifacts]


def test_nf4_is_dithered_where_it_was_trained_on_and_all_else_is_nearest(
    small: Path, pico_recipe: RecipeMaker, tmp_path: Path
) -> None:
    original = {"format": "nf4", "name": "original", "onto": "original"}
    recipe = pico_recipe("nf4", NEAREST, original, "fp4", "int8", "bf16", "nf4-adapter", adapter=str(small))
    plan = make_plan(recipe, tmp_path)
    assert chosen(plan) == ["dithered", "nearest", "nearest", "nearest", "nearest", None, None]
    assert chosen(make_plan(pico_recipe("nf4", adapter=None), tmp_path)) == ["nearest"]
    none = pico_recipe("nf4", adapter=str(small), training_quantization="none")
    assert chosen(make_plan(none, tmp_path)) == ["dithered"], "the sidecar knows better"


def test_a_training_in_16_bits_has_no_grid_to_fall_back_onto(
    adapter_copy: Path, pico_recipe: RecipeMaker, tmp_path: Path
) -> None:
    (adapter_copy / "qlora_export.json").unlink()
    made = {"adapter": str(adapter_copy), "training_quantization": "none"}
    assert chosen(make_plan(pico_recipe("nf4", **made), tmp_path)) == ["nearest"]
    with pytest.raises(PlanRefused, match="dithering is onto a base trained in nf4, training had none"):
        make_plan(pico_recipe({"format": "nf4", "rounding": "dithered"}, **made), tmp_path)


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        ({"format": "int8", "rounding": "dithered"}, "artifact int8-dithered: int8 is not rounded dithered"),
        ({"format": "awq", "rounding": "dithered", "options": {"group_size": 32}}, "awq is not rounded dithered"),
        ({"format": "nf4", "rounding": "dithered", "onto": "original"}, "this is merged onto the original"),
        ({"format": "bf16", "rounding": "nearest"}, "bf16 rounds no merged weight to a grid"),
        ({"format": "nf4-adapter", "rounding": "search"}, "nf4-adapter rounds no merged weight to a grid"),
        ({"format": "onnx-int4", "rounding": "dithered"}, "onnx-int4 is not rounded dithered"),
        ({"format": "onnx-fp32", "rounding": "search"}, "onnx-fp32 is exported as it is"),
        (CALIBRATED, "calibrated needs a text to calibrate on"),
        ({"format": "int8", "rounding": "tuned"}, "artifact int8-tuned: tuned needs a text to calibrate on"),
    ],
)
def test_what_a_format_cannot_be_is_refused(
    pico_recipe: RecipeMaker, tmp_path: Path, artifact: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanRefused) as caught:
        make_plan(pico_recipe(artifact), tmp_path)
    (problem,) = [problem for problem in caught.value.problems if message in problem.message]
    assert problem.exit_code == ExitCode.USAGE
    assert problem.hint


def test_rounding_is_part_of_the_digest(small: Path, pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    ways = ("nearest", "search", "dithered")
    artifacts = [{"format": "nf4", "rounding": way, "seed": seed} for way in ways for seed in (0, 1)]
    digests = [
        make_plan(pico_recipe(artifact, adapter=str(small)), tmp_path).artifacts[0].digest for artifact in artifacts
    ]
    assert len(set(digests)) == 3
    assert digests[::2] == digests[1::2], "no random number decides them"


def test_the_plan_predicts_what_is_measured_later(small: Path, pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    """The sample holds whole pico matrices; double quantisation of the base is all that is left out."""
    plan = make_plan(pico_recipe(NEAREST, "nf4", "w8a8", "int8", adapter=str(small)), tmp_path)
    artifacts = build(plan, tmp_path, BuildOptions())
    for item, artifact, tolerance in zip(plan.artifacts, artifacts, (0.05, 0.08, 0.02, 0.02), strict=True):
        found, predicted = survival(plan, item, artifact), item.rounding.predicted
        assert predicted is not None
        assert predicted.survival.keys() == found.keys()
        assert predicted.median == pytest.approx(float(np.median([*found.values()])), abs=tolerance), item.name
    nearest, dithered, *_ = plan.artifacts
    assert nearest.rounding.predicted is not None
    assert dithered.rounding.nearest is not None
    assert nearest.rounding.predicted.survival == dithered.rounding.nearest.survival
    assert nearest.rounding.predicted.median < 0.9
    (warning,) = plan.warnings
    assert warning.startswith("nf4-nearest: of the adapter's delta about ")
    assert "nf4 dithered or calibrated, nf4-adapter and int8 keep it" in warning
    summary = plan_summary(plan, 1)
    assert summary["warnings"] == [warning]
    assert summary["artifacts"][1]["rounding"] == {"stated": None, "chosen": "dithered", "seed": None}
    assert summary["artifacts"][0]["predicted_survival"]["median"] == nearest.rounding.predicted.median
    assert summary["artifacts"][0]["predicted_survival"]["lowest_tensor"] in plan.model.changed


@pytest.mark.parametrize("rows", [1, 7, 64, 512, 513, 4096, 100_000])
@pytest.mark.parametrize(("columns", "multiple"), [(64, 1), (88, 8), (4096, 1), (14336, 2), (4096, 128)])
def test_a_sample_is_of_whole_multiples_in_few_places(rows: int, columns: int, multiple: int) -> None:
    places = sample_of(rows, columns, multiple, 4)
    seen = [row for place in places for row in place]
    assert sorted(set(seen)) == seen, "no row twice"
    assert 0 <= seen[0] <= seen[-1] < rows
    assert all(place.start % multiple == 0 for place in places)
    assert all(len(place) % multiple == 0 or place.stop == rows for place in places)
    assert len(seen) * columns <= max(2 * SAMPLE_WEIGHTS, 4 * columns * multiple)
    if rows * columns <= SAMPLE_WEIGHTS:
        assert seen == list(range(rows))


def test_planning_imports_no_torch(small: Path, pico_base: Path, tmp_path: Path) -> None:
    words = f"'plan', '--base', '{pico_base}', '--adapter', '{small}', '--format', 'nf4', '--format', 'w8a8'"
    script = (
        "import sys\n"
        f"sys.argv = ['qlora-export', {words}, '--out', '{tmp_path}']\n"
        "from qlora_export.cli.main import _run\ncode = _run()\n"
        "print(code, {'torch'} & set(sys.modules), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stderr.strip() == "0 set()"
    assert "dithered" in found.stdout
