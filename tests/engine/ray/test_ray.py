"""A real cluster of several ray nodes on one machine: nodes and drivers die, the bytes stay those of the threads."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from qlora_export.engine import BuildOptions, build
from qlora_export.engine.journal import Journal
from qlora_export.engine.manifest import versions
from qlora_export.engine.ray import batch_worker
from qlora_export.engine.ray import cluster as ray_cluster
from qlora_export.engine.ray.batches import cut
from qlora_export.engine.ray.workers import Crew, Request
from qlora_export.engine.work_items import work_items_of
from qlora_export.errors import EnvironmentProblem, ExportError, InputError
from qlora_export.planning.make import make_plan
from tests import sampling
from tests.helpers.files import edit_tensors, folder_bytes
from tests.helpers.pico import RecipeMaker
from tests.processes import forked

FORMATS = ("bf16", "nf4", "nf4-adapter", {"format": "fp32", "onto": "original"})
ONE_BY_ONE = 1
STORE_BYTES = 80 << 20


def command(base: Path, adapter: Path, out: Path) -> list[str]:
    words = ["build", "--base", str(base), "--adapter", str(adapter), "--format", "bf16", "--out", str(out)]
    return ["-m", "qlora_export", *words, "--engine", "ray", "--workers", "1"]


# Ray's pages and its scaler take a third of the start of a cluster, and nothing here asks them.
WITHOUT_PAGES = """
from ray._private.node import Node
Node.start_api_server = lambda node, **options: setattr(node, "_webui_url", None)
Node.start_monitor = lambda node: None
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head of one CPU. A node that does not answer is missed late, one that is gone soon."""
    patience = {"initial_delay_ms": 1000, "period_ms": 300, "timeout_ms": 5000, "failure_threshold": 5}
    settings = {f"health_check_{name}": value for name, value in patience.items()}
    head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_log_monitor": False, "_system_config": settings}
    node = ray._private.node.Node
    with ray_cluster.environment(ray_cluster.QUIET), pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "start_api_server", node.start_api_server)
        patch.setattr(node, "start_monitor", node.start_monitor)
        exec(WITHOUT_PAGES, {})
        made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


@pytest.fixture
def address(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a driver of the cluster."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return str(cluster.address)


@pytest.fixture(scope="module")
def whole(pico_recipe: RecipeMaker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What threads make."""
    out = tmp_path_factory.mktemp("whole")
    build(make_plan(pico_recipe(*FORMATS), out), out, BuildOptions())
    return folder_bytes(out)


class Deaths:
    """The crew of a build, and what its workers had in hand when they died."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.crew: Crew
        self.lost: list[Request] = []
        enter, bury = Crew.__enter__, Crew._bury

        def entered(crew: Crew) -> Crew:
            self.crew = crew
            return enter(crew)

        def buried(crew: Crew, question: Request, error: Any) -> None:
            self.lost.append(question)
            bury(crew, question, error)

        monkeypatch.setattr(Crew, "__enter__", entered)
        monkeypatch.setattr(Crew, "_bury", buried)

    def stall(self, node: str | None = None) -> int | None:
        """Have a worker that is at work, on that node, stop inside its next tensor; its process, if there is one."""

        def place(worker: Any) -> tuple[str, int]:
            return ray.get_runtime_context().get_node_id(), os.getpid()

        def stalled(worker: Any) -> None:
            from qlora_export.engine.tensor_job import TensorJob

            setattr(TensorJob, "seal", lambda job: time.sleep(60))  # noqa: B010

        for worker in [item.worker for item in self.crew._asked.values() if item.batch is not None]:
            its_node, process = ray.get(worker.__ray_call__.remote(place))
            if node in (None, its_node):
                ray.get(worker.__ray_call__.remote(stalled))
                return int(process)
        ray.wait([*self.crew._asked], num_returns=len(self.crew._asked))
        return None


def until_done(action: Callable[[], bool]) -> Callable[[int, int], None]:
    """A progress that does something at its reports until it has succeeded."""
    succeeded = threading.Event()

    def progress(done: int, total: int) -> None:
        if not succeeded.is_set() and action():
            succeeded.set()

    return progress


def share_into(reports: list[float]) -> Callable[[int, int], None]:
    """A progress that keeps the shares it is told."""
    return lambda done, total: reports.append(done / total)


def later(action: Callable[[], Any]) -> None:
    """Do it when the driver has given the worker its next batch."""
    threading.Timer(0.7, action).start()


def test_an_error_in_a_worker_is_the_one_that_threads_raise(
    address: str, pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan

    plan = make_plan(pico_recipe("bf16", base=str(base_copy)), tmp_path / "out")
    edit_tensors(base_copy / "model.safetensors", spoil)
    errors: list[ExportError] = []
    for name in ("threads", "ray"):
        with pytest.raises(InputError, match="up_proj") as caught:
            build(plan, tmp_path / name, replace(BuildOptions(1), engine=name))
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1])
    assert [errors[0].message, errors[0].hint] == [errors[1].message, errors[1].hint]


def test_a_path_that_a_node_does_not_see_is_named(
    address: str, pico_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign = batch_worker.assign
    unseen = tmp_path / "only/here.safetensors"
    monkeypatch.setattr(ray_cluster, "assign", lambda *given: replace(assign(*given), sizes={unseen: 1}))
    with pytest.raises(EnvironmentProblem, match=f"node .*: {unseen} is not there") as caught:
        build(make_plan(pico_recipe("bf16"), tmp_path / "out"), tmp_path / "out", BuildOptions(1, engine="ray"))
    assert "file system they share" in caught.value.hint


def test_a_folder_of_the_same_name_is_not_taken_for_the_shared_one(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    plan = make_plan(pico_recipe("bf16"), tmp_path)
    Journal(tmp_path, "digest").mark("the driver's")
    folders = {"bf16": tmp_path}
    batch_worker.require_visible(batch_worker.assign(plan, [], folders, "the driver's"), "here")
    with pytest.raises(EnvironmentProblem, match=f"node here: {tmp_path} is another folder than the driver's"):
        batch_worker.require_visible(batch_worker.assign(plan, [], folders, "another's"), "here")
    with pytest.raises(EnvironmentProblem, match="nowhere is not there"):
        batch_worker.require_visible(batch_worker.assign(plan, [], {"bf16": tmp_path / "nowhere"}, "m"), "here")


def test_a_node_with_other_versions_is_refused() -> None:
    with pytest.raises(EnvironmentProblem, match=r"node .*: numpy .*, the driver has 1\.0"):
        batch_worker.BatchWorker({**versions(), "numpy": "1.0"}, b"").open()


def test_batches_hold_every_subject_once_and_files_alone(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    plan = make_plan(pico_recipe("bf16"), tmp_path)
    subjects = work_items_of(plan, plan.sources)
    assert isinstance(subjects[0], Path)
    for workers in (1, 3, 1000):
        batches = cut(subjects, 256_000_000, workers)
        assert [number for batch in batches for number in batch] == list(range(len(subjects)))
        assert batches[0] == (0,)
    assert len(cut(subjects, 256_000_000, 1)) < len(subjects)
    assert len(cut(subjects, ONE_BY_ONE, 1)) == len(subjects)


DRIVER = """
import os, signal, sys
from pathlib import Path
from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe

base, adapter, out = sys.argv[1:]

def progress(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

recipe = make_recipe({"base": base, "adapter": adapter, "artifacts": FORMATS}, Path(), "child")
build(make_plan(recipe, Path(out)), Path(out), BuildOptions(1, 1, progress, engine="ray"))
""".replace("FORMATS", repr([{"format": item} if isinstance(item, str) else item for item in FORMATS]))


def test_what_a_killed_driver_left_is_completed_by_either_engine(
    address: str,
    pico_recipe: RecipeMaker,
    pico_base: Path,
    pico_adapter: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    child = forked("-c", DRIVER, pico_base, pico_adapter, out)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert (out / "nf4.partial/.journal").read_text().count("tensors") > 1
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    for folder, options in ((out, BuildOptions(2)), (copy, BuildOptions(1, engine="ray"))):
        reports: list[float] = []
        watched = replace(options, progress=share_into(reports))
        build(make_plan(pico_recipe(*FORMATS), folder), folder, watched)
        assert folder_bytes(folder) == whole
        assert min(reports) > 0.2, "what was finished is not made again"


def test_a_signal_stops_driver_and_workers(address: str, pico_base: Path, pico_adapter: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, threading\n"
        "from qlora_export.cli.main import run\n"
        "from qlora_export.engine.ray.workers import Crew\n"
        "take = Crew._take\n"
        "def taken(*words):\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    Crew._take = lambda *words: None\n"
        "Crew._take = taken\n"
        "run()"
    )
    child = forked("-c", script, *command(pico_base, pico_adapter, tmp_path / "out")[2:], timeout=30)
    assert child.returncode == 143, child.stderr
    assert child.stderr.count("\n") == 1, child.stderr
    assert (tmp_path / "out/bf16.partial/.journal").is_file()


def test_a_cluster_of_its_own_says_nothing(pico_base: Path, pico_adapter: Path, tmp_path: Path) -> None:
    """Not started beside the other cluster: ray gives up on a node that is not up after half a minute."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    start = "" if sampling.all_cases() else WITHOUT_PAGES
    words = command(pico_base, pico_adapter, tmp_path / "out")[2:]
    child = forked("-c", start + "from qlora_export.cli.main import run\nrun()", *words, env=environment, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    assert child.stdout.count("\n") == 1


@pytest.mark.parametrize("dies", ["worker", "node"])
def test_a_death_inside_a_tensor_changes_no_byte(
    dies: str,
    cluster: Cluster,
    address: str,
    pico_recipe: RecipeMaker,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker is replaced; what a node took with it is made by a worker of another."""
    deaths, out = Deaths(monkeypatch), tmp_path / "out"
    with ray_cluster.environment(ray_cluster.QUIET):
        node = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) if dies == "node" else None

    def kill() -> bool:
        process = deaths.stall(node and node.node_id)
        if process and node:
            later(lambda: cluster.remove_node(node, allow_graceful=False))
        elif process:
            later(lambda: os.kill(process, signal.SIGKILL))
        return process is not None

    workers = 2 if node else 1
    build(make_plan(pico_recipe(*FORMATS), out), out, BuildOptions(workers, ONE_BY_ONE, until_done(kill), engine="ray"))
    lost = [question.batch is not None for question in deaths.lost]
    assert True in lost, "a batch was lost with whoever died"
    assert node or lost == [True]
    assert folder_bytes(out) == whole


def test_without_ray_or_a_cluster_the_next_step_is_named(
    pico_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(pico_recipe("bf16"), tmp_path / "out")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(EnvironmentProblem, match="RAY_ADDRESS=127.0.0.1:1: no cluster answers there"):
        build(plan, tmp_path / "out", BuildOptions(1, engine="ray"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="ray is not installed") as caught:
        build(plan, tmp_path / "none", BuildOptions(1, engine="ray"))
    assert caught.value.hint == "pip install 'qlora-export[ray]'"
    assert not (tmp_path / "none").exists()
