"""Calibration as a step of a release: what is reported, killed runs, the lock, and what is left behind."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from qlora_export.engine.build import locked
from qlora_export.engine.partial_folder import PartialFolder
from qlora_export.errors import PlanRefused, UsageError
from qlora_export.pipeline import release as pipeline
from qlora_export.pipeline.calibrate import remove_decided_layers
from qlora_export.pipeline.clean import find_leftovers, remove_leftovers
from qlora_export.pipeline.options import RunOptions
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Made
from qlora_export.recipe.config import Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.report.data import report, write_report
from qlora_export.report.schemas import report_schema
from qlora_export.report.terminal import print_ledger
from qlora_export.tensors.header import StoredTensor
from qlora_export.types import Progress
from tests.engine.calibration.conftest import Pico
from tests.helpers.files import folder_bytes
from tests.processes import forked

HASTY = {"sweeps": 0, "fit_scales": False, "delta_rounds": 1}
CHILD = """
import os, signal, sys
from pathlib import Path
from qlora_export.pipeline import release as pipeline
from qlora_export.quant.rounding import scale_search
from qlora_export.recipe.load import load_recipe

scale_search.FRACTIONS = (0.9, 1.0)
recipe, out, point = sys.argv[1:]
syncs = 0
fsync = os.fsync

def counted(descriptor):
    global syncs
    if syncs == int(point):
        os.kill(os.getpid(), signal.SIGKILL)
    syncs += 1
    fsync(descriptor)

os.fsync = counted
pipeline.build(load_recipe(Path(recipe)), pipeline.RunOptions(Path(out), workers=1))
print(syncs)
"""


def recipe_of(pico: Pico, *artifacts: Any, **changes: Any) -> Recipe:
    """A recipe with a text to calibrate on, which is rounded in a hurry."""
    data = {
        "base": str(pico.base),
        "adapter": str(pico.adapter),
        "artifacts": list(artifacts) or [{"format": "nf4", "rounding": "calibrated"}],
        "calibration": {"text": str(pico.text), "sequences": 12, "window_tokens": 48, "method": HASTY},
        **changes,
    }
    return make_recipe({key: value for key, value in data.items() if value is not None}, Path(), "test")


@pytest.fixture(scope="module")
def undisturbed(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A recipe's file, an undisturbed run of it in a process of its own, and the number of its syncs."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe_of(pico).model_dump(mode="json", exclude_defaults=True)))
    found = forked("-c", CHILD, path, folder / "out", -1)
    assert found.returncode == 0, found.stderr
    return path, folder / "out", int(found.stdout)


@pytest.mark.parametrize("point", [0, 1, 2, -3])
def test_a_killed_run_goes_on_to_the_same_bytes(
    undisturbed: tuple[Path, Path, int], tmp_path: Path, point: int
) -> None:
    """Before the first block is kept, before the second, before the first weight, and before the last file."""
    recipe, whole, syncs = undisturbed
    assert forked("-c", CHILD, recipe, tmp_path, point % syncs).returncode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.glob("*.calibrated")] == [".calibrated"]
    again = forked("-c", CHILD, recipe, tmp_path, -1)
    assert again.returncode == 0, again.stderr
    assert folder_bytes(tmp_path) == folder_bytes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["nf4-calibrated"]


@pytest.mark.usefixtures("hasty_search")
def test_a_release_tells_of_its_calibration(pico: Pico, tmp_path: Path, capsys: Any) -> None:
    """And drifts less than the same grid with rounding to nearest."""
    w4a16 = {"format": "w4a16", "options": {"group_size": 32}}
    artifacts = [{**w4a16, "rounding": rounding} for rounding in ("calibrated", "nearest")]
    limits = {"perplexity_ratio": 9, "mean_kl": 9, "same_top1": 0, "gain_kept": None, "survival_min": 0}
    recipe = recipe_of(
        pico,
        *({**item, "name": str(item["rounding"])} for item in artifacts),
        drift={"text": str(pico.holdout), "limits": limits},
        calibration={"text": str(pico.text), "sequences": 16, "window_tokens": 48},
    )
    run = pipeline.check(recipe, RunOptions(tmp_path))
    write_report(run, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(data, report_schema())
    calibrated, nearest = data["artifacts"]
    told = calibrated["calibration"]
    assert (told["sequences"], told["layers"], told["fallbacks"]) == (16, 14, {})
    assert "calibration" not in nearest
    assert told["notes"] == ["calibration: 16 sequences are few; give 64 or more, 128 are usual"]
    line = f"14 layers rounded by 16 sequences of calibration, {told['tokens']} tokens"
    assert line in (tmp_path / "report.md").read_text()
    print_ledger(run)
    shown = capsys.readouterr().out
    assert f"calibrated: {line}" in shown
    assert "16 sequences are few" in shown
    assert calibrated["drift"]["mean_kl"] < nearest["drift"]["mean_kl"]
    assert not list(tmp_path.glob("*.calibrated"))
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("calibrated", "nearest")]
    assert ["calibration" in manifest for manifest in manifests] == [True, False]
    assert not any("sequences" in note for manifest in manifests for note in manifest["assumptions"])
    again = pipeline.check(recipe, RunOptions(tmp_path))
    assert report(again)["artifacts"][0]["calibration"] == told


def test_layers_left_to_the_format_are_counted(pico_base: Path, pico: Pico, tmp_path: Path, capsys: Any) -> None:
    """Two `down_proj` of 88 columns."""
    run = pipeline.build(recipe_of(pico, base=str(pico_base), adapter=None), RunOptions(tmp_path))
    found = report(run)["artifacts"][0]["calibration"]
    assert (found["layers"], found["fallbacks"]) == (14, {"88 columns are no multiple of the group": 2})
    from qlora_export.report.terminal import print_artifacts

    print_artifacts(run)
    assert "2 left to the format: 2 because 88 columns are no multiple of the group" in capsys.readouterr().out


def test_the_run_folder_is_locked_and_an_interrupted_run_leaves_what_clean_finds(pico: Pico, tmp_path: Path) -> None:
    held: list[str] = []

    @contextmanager
    def track(stage: str) -> Iterator[Progress]:
        def progress(done: int, total: int) -> None:
            if stage != "calibrate nf4-calibrated":
                return
            try:
                with locked(tmp_path):
                    held.append("free")
            except UsageError as error:
                held.append(error.message)
            if done == 10:
                raise KeyboardInterrupt

        yield progress

    with pytest.raises(KeyboardInterrupt):
        pipeline.build(recipe_of(pico), RunOptions(tmp_path, track=track))
    assert len(held) == 10
    assert all("another run is at work here" in said for said in held)
    (tmp_path / "mine.calibrated").mkdir()
    folder = next(path for path in tmp_path.glob("*.calibrated") if path.name != "mine.calibrated")
    (folder / "notes.txt").write_text("mine")
    found = find_leftovers(tmp_path)
    assert [item.path for item in found] == [folder]
    remove_leftovers(tmp_path, found)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    remove_leftovers(tmp_path, find_leftovers(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.calibrated"]


def test_blocks_of_a_run_at_work_are_not_forgotten(pico: Pico, tmp_path: Path) -> None:
    plan = make_plan(recipe_of(pico), tmp_path)
    blocks = tmp_path / f"{'0' * 16}.calibrated"
    blocks.mkdir(parents=True)
    with locked(tmp_path):
        remove_decided_layers(plan, tmp_path)
    assert blocks.is_dir()
    remove_decided_layers(make_plan(recipe_of(pico, "bf16"), tmp_path), tmp_path)
    assert blocks.is_dir()
    remove_decided_layers(plan, tmp_path)
    assert not blocks.exists()


def test_what_was_built_from_other_blocks_is_built_again(pico: Pico, tmp_path: Path) -> None:
    """A killed build of the same plan whose layers are now decided otherwise, as on other threads."""
    item = make_plan(recipe_of(pico), tmp_path).artifacts[0]
    stored = StoredTensor.__new__(StoredTensor)
    for number, (value, kept) in enumerate([(1, False), (1, True), (2, False), (2, True)]):
        made = Made({"part": stored}, {"layers": {"layer": {"output_error": value}}})
        folder = PartialFolder(replace(item, made=made), tmp_path)
        assert bool(folder.journal.finished) == kept, number
        folder.journal.add(["layer.weight"])
        folder.writer.close()


def test_what_cannot_be_calibrated_is_said_at_once(pico: Pico, tmp_path: Path) -> None:
    artifacts = [{"format": form, "rounding": "calibrated"} for form in ("nf4", "bf16", "onnx-fp32")]
    with pytest.raises(PlanRefused) as error:
        make_plan(recipe_of(pico, *artifacts, calibration=None), tmp_path)
    assert error.value.exit_code == 2
    for said in ("needs a text to calibrate on", "bf16 rounds no", "is exported as it is"):
        assert sum(said in problem.message for problem in error.value.problems) == 1, said
    assert all(problem.hint for problem in error.value.problems)
