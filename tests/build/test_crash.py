"""A real process is killed at chosen points; the next run finishes to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_export.build import BuildOptions, build
from qlora_export.build.journal import Journal
from qlora_export.errors import UsageError
from qlora_export.plan import make_plan
from tests.conftest import RecipeMaker, folder_bytes

FORMATS = ("bf16", "nf4", "nf4-adapter")

# Runs a build and kills its own process: when a share of the bytes is done, or at a named step of finishing.
CHILD = """
import os, signal, sys
from pathlib import Path
from qlora_export.build import BuildOptions, build
from qlora_export.build import build as module
from qlora_export.plan import make_plan
from qlora_export.recipe import make_recipe

base, adapter, out, point, checkpoint = sys.argv[1:]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total):
    if point.startswith("0.") and done >= float(point) * total:
        die()

engine = sys.modules["qlora_export.build.build"]
if point == "manifest":
    engine.make_manifest = die
if point == "rename":
    Path.rename = die
if point == "journal":
    Path.unlink = die
artifacts = [{"format": name} for name in FORMATS]
recipe = make_recipe({"base": base, "adapter": adapter, "artifacts": artifacts, "folder": Path()}, "child")
build(make_plan(recipe, Path(out)), Path(out), BuildOptions(2, int(checkpoint), progress))
""".replace("FORMATS", repr(FORMATS))


@pytest.mark.parametrize("point", ["0.0001", "0.3", "0.7", "0.9999", "manifest", "rename", "journal"])
def test_a_killed_build_resumes_to_the_same_bytes(
    pico_recipe: RecipeMaker, pico_base: Path, pico_adapter: Path, tmp_path: Path, point: str
) -> None:
    recipe = pico_recipe(*FORMATS)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    build(make_plan(recipe, whole), whole, BuildOptions())
    arguments = [str(pico_base), str(pico_adapter), str(out), point, "50000"]
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=False, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    names = {path.name for path in out.iterdir()}
    if point != "journal":
        assert not names & set(FORMATS), "nothing looks finished"
    assert any(name.endswith(".partial") for name in names)
    build(make_plan(recipe, out), out, BuildOptions())
    assert folder_bytes(out) == folder_bytes(whole)


def test_resuming_does_not_write_again_what_was_finished(
    pico_recipe: RecipeMaker, pico_base: Path, pico_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [str(pico_base), str(pico_adapter), str(out), "0.7", "1"]
    subprocess.run([sys.executable, "-c", CHILD, *arguments], check=False, capture_output=True)
    reports: list[int] = []
    options = BuildOptions(1, progress=lambda done, total: reports.append(100 * done // total))
    build(make_plan(pico_recipe(*FORMATS), out), out, options)
    assert min(reports) > 60


def test_a_torn_journal_line_is_cut_off(tmp_path: Path) -> None:
    Journal(tmp_path, "digest").add(["a", "b"])
    with (tmp_path / ".journal").open("a") as file:
        file.write('{"tensors": ["c"')
    assert Journal(tmp_path, "digest").finished == {"a", "b"}
    Journal(tmp_path, "digest").add(["d"])
    assert Journal(tmp_path, "digest").finished == {"a", "b", "d"}
    with pytest.raises(UsageError, match="another plan"):
        Journal(tmp_path, "other")


def test_a_terminated_command_says_so(pico_base: Path, pico_adapter: Path, tmp_path: Path) -> None:
    arguments = ["--base", pico_base, "--adapter", pico_adapter, "--format", "bf16", "--out", tmp_path / "out"]
    script = (
        "import os, signal, sys, threading\n"
        "from qlora_export.cli.main import run\n"
        "from qlora_export import pipeline\n"
        "pipeline.make_plan = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), threading.Event().wait(20))\n"
        "run()"
    )
    child = subprocess.run([sys.executable, "-c", script, "build", *map(str, arguments)], check=False)
    assert child.returncode == 143
    assert not os.path.exists(tmp_path / "out" / "bf16")  # noqa: PTH110
