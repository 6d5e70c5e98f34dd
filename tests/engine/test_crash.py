"""A real process is killed at chosen points; the next run finishes to the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from qlora_export.engine import BuildOptions, build
from qlora_export.engine.journal import Journal
from qlora_export.errors import UsageError
from qlora_export.planning.make import make_plan
from tests.helpers.files import edit_tensors, folder_bytes
from tests.helpers.pico import RecipeMaker
from tests.processes import forked

FORMATS = ("bf16", "nf4", "nf4-adapter")

# Runs a build and kills its own process: when a share of the bytes is done, or at a named step of finishing.
CHILD = """
import os, signal, sys
from pathlib import Path
from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe

base, adapter, out, point, checkpoint = sys.argv[1:]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total):
    if point.startswith("0.") and done >= float(point) * total:
        die()

if point == "manifest":
    sys.modules["qlora_export.engine.partial_folder"].make_manifest = die
if point == "rename":
    Path.rename = die
if point == "journal":
    Path.unlink = die
artifacts = [{"format": name} for name in FORMATS]
recipe = make_recipe({"base": base, "adapter": adapter, "artifacts": artifacts}, Path(), "child")
build(make_plan(recipe, Path(out)), Path(out), BuildOptions(2, int(checkpoint), progress))
""".replace("FORMATS", repr(FORMATS))


@pytest.fixture(scope="module")
def whole(pico_recipe: RecipeMaker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed build makes."""
    out = tmp_path_factory.mktemp("whole")
    build(make_plan(pico_recipe(*FORMATS), out), out, BuildOptions())
    return folder_bytes(out)


@pytest.mark.parametrize("point", ["0.0001", "0.3", "0.7", "0.9999", "manifest", "rename", "journal"])
def test_a_killed_build_resumes_to_the_same_bytes(
    pico_recipe: RecipeMaker,
    pico_base: Path,
    pico_adapter: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    point: str,
) -> None:
    recipe, out = pico_recipe(*FORMATS), tmp_path / "killed"
    arguments = [str(pico_base), str(pico_adapter), str(out), point, "50000"]
    child = forked("-c", CHILD, *arguments)
    assert child.returncode == -signal.SIGKILL, child.stderr
    names = {path.name for path in out.iterdir()}
    if point != "journal":
        assert not names & set(FORMATS), "nothing looks finished"
    assert any(name.endswith(".partial") for name in names)
    build(make_plan(recipe, out), out, BuildOptions())
    assert folder_bytes(out) == whole


def test_resuming_does_not_write_again_what_was_finished(
    pico_recipe: RecipeMaker, pico_base: Path, pico_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [str(pico_base), str(pico_adapter), str(out), "0.9999", "1"]
    forked("-c", CHILD, *arguments)
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
        "from qlora_export.pipeline import release as pipeline\n"
        "pipeline.make_plan = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), threading.Event().wait(20))\n"
        "run()"
    )
    child = forked("-c", script, "build", *arguments)
    assert child.returncode == 143
    assert not os.path.exists(tmp_path / "out" / "bf16")  # noqa: PTH110


@pytest.fixture(scope="module")
def left_behind(pico_base: Path, pico_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that a killed build left, with most tensors journalled."""
    out = tmp_path_factory.mktemp("killed") / "out"
    forked("-c", CHILD, pico_base, pico_adapter, out, "0.7", "1")
    return out


@pytest.fixture
def stopped(left_behind: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(left_behind, tmp_path / "out"))


@pytest.mark.parametrize("harm", ["remove", "shorten", "header"])
def test_a_weight_file_harmed_in_between_is_written_anew(
    pico_recipe: RecipeMaker, stopped: Path, whole: dict[str, bytes], harm: str
) -> None:
    path = stopped / "bf16.partial/model.safetensors"
    if harm == "remove":
        path.unlink()
    elif harm == "shorten":
        os.truncate(path, 1000)
    else:
        with path.open("r+b") as file:
            file.write(b"\0" * 8)
    build(make_plan(pico_recipe(*FORMATS), stopped), stopped, BuildOptions())
    assert folder_bytes(stopped) == whole


def test_a_base_changed_in_between_is_read_anew(
    pico_recipe: RecipeMaker, base_copy: Path, adapter_copy: Path, tmp_path: Path
) -> None:
    (adapter_copy / "qlora_export.json").unlink()
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = [str(base_copy), str(adapter_copy), str(out), "0.7", "1"]
    forked("-c", CHILD, *arguments)

    def double(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.mul_(2)

    edit_tensors(base_copy / "model.safetensors", double)
    recipe = pico_recipe(*FORMATS, base=str(base_copy), adapter=str(adapter_copy))
    build(make_plan(recipe, out), out, BuildOptions())
    build(make_plan(recipe, whole), whole, BuildOptions())
    assert folder_bytes(out) == folder_bytes(whole)


@pytest.mark.parametrize("what", ["journal", "stranger", "link", "folder-link", "garbage"])
def test_what_we_did_not_write_is_not_adopted(pico_recipe: RecipeMaker, stopped: Path, what: str) -> None:
    victim = stopped.parent / "victim"
    victim.write_bytes(b"precious")
    partial = stopped / "bf16.partial"
    if what == "journal":
        (partial / ".journal").unlink()
    elif what == "stranger":
        (partial / "thesis.txt").write_text("precious")
    elif what == "link":
        (partial / "model.safetensors").unlink()
        (partial / "model.safetensors").symlink_to(victim)
    elif what == "folder-link":
        partial.rename(stopped.parent / "elsewhere")
        partial.symlink_to(stopped.parent / "elsewhere")
    else:
        (partial / ".journal").write_text("[]\n")
    with pytest.raises(UsageError):
        build(make_plan(pico_recipe(*FORMATS), stopped), stopped, BuildOptions())
    assert victim.read_bytes() == b"precious"
    assert not (stopped / "bf16").exists()


def test_the_space_of_a_killed_run_counts_as_there(
    pico_recipe: RecipeMaker, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(500_000))
    assert make_plan(pico_recipe(*FORMATS), stopped).bytes > 500_000
