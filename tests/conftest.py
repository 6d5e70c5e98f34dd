"""How the tests are run, and the pico model that most of them look at.

The process that only deals tests out to others reads this file, too: the libraries of models are imported by fixtures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Matrices of pico models take microseconds, and threads that wait for each other take milliseconds on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Commands are started some hundred times: none need compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import hypothesis
import pytest

from tests import processes, room_times, sampling

if TYPE_CHECKING:
    from qlora_export.recipe.config import Recipe
    from tests.helpers.hostile import Pairs
    from tests.helpers.pico import RecipeMaker

# Its asserts show the values that differ, as those of tests do.
pytest.register_assert_rewrite("tests.helpers.hostile")

hypothesis.settings.register_profile("all-cases", deadline=None, derandomize=True)
hypothesis.settings.register_profile("sampled", hypothesis.settings.get_profile("all-cases"), max_examples=25)


# By measurement; what is not here takes a few seconds each. Two workers end together when what is long begins first.
LONG_FILES = (
    "tests/engine/ray/test_ray.py",
    "tests/demo/test_demo.py",
    "tests/publish/hub/test_release.py",
    "tests/cli/test_cli.py",
    "tests/publish/hub/test_commit.py",
    "tests/exporters/test_onnx_traced.py",
    "tests/publish/test_card.py",
    "tests/tools/test_quality_tools.py",
    "tests/publish/hub/test_tokens.py",
    "tests/cli/test_publishing.py",
    "tests/engine/calibration/test_calibrate.py",
    "tests/pipeline/test_release.py",
    "tests/report/test_html.py",
    "tests/sources/test_hub_sources.py",
    "tests/publish/hub/test_killed.py",
    "tests/tools/test_tools.py",
    "tests/exporters/test_transformers_js.py",
    "tests/formats/test_architectures.py",
    "tests/exporters/test_onnx_classifier.py",
    "tests/merge/test_oracle.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    sampling.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Which cases are run, where kernels are kept and who forks processes: the workers, started later, inherit it."""
    # A run in the background of a shell ignores interrupts, and so would every process that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sampling.configure(config)
    hypothesis.settings.load_profile("all-cases" if sampling.all_cases() else "sampled")
    os.environ["NUMBA_CACHE_DIR"] = str(kernel_cache(config.rootpath))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        stack = contextlib.ExitStack()
        stack.enter_context(processes.serving())
        config.add_cleanup(stack.close)
    processes.use(os.environ[processes.ADDRESS])
    subprocess.Popen = processes.Warm  # type: ignore[misc]


def kernel_cache(root: Path) -> Path:
    """Where numba keeps what it compiles of these very sources.

    It looks at the file of a function alone: one cache for all sources could hold what was inlined from a module that
    has been edited since.
    """
    sources = [raw for path in sorted((root / "qlora_export").rglob("*.py")) if b"numba" in (raw := path.read_bytes())]
    return root / ".cache" / f"kernels-{hashlib.sha256(b''.join(sources)).hexdigest()[:16]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A worker among others begins with the long files; a run of its own keeps the order of the folders."""
    if left := sampling.left_out(items, config.args):
        config.hook.pytest_deselected(items=sorted(left, key=items.index))
        items[:] = [item for item in items if item not in left]
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {name: place for place, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long each room took."""
    reports = [item for items in terminalreporter.stats.values() for item in items if hasattr(item, "duration")]
    terminalreporter.section("seconds of each room, over all processes")
    for line in room_times.lines(room_times.seconds_of_rooms(reports)):
        terminalreporter.write_line(line)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of a CUDA device run where there is one, those of vLLM and lm-eval where their Python is named."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    if item.get_closest_marker("vllm") and "QLORA_EXPORT_VLLM_PYTHON" not in os.environ:
        pytest.skip("QLORA_EXPORT_VLLM_PYTHON names no environment of vLLM")
    if item.get_closest_marker("lm_eval") and "QLORA_EXPORT_LM_EVAL_PYTHON" not in os.environ:
        pytest.skip("QLORA_EXPORT_LM_EVAL_PYTHON names no environment of lm-evaluation-harness")


@pytest.fixture(scope="session")
def pico_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied pico base in one file."""
    from tests.helpers.pico import save_base

    return save_base(tmp_path_factory.mktemp("pico") / "base", seed=1)


@pytest.fixture(scope="session")
def pico_adapter(pico_base: Path) -> Path:
    """An adapter on all linear layers of the pico base."""
    from tests.helpers.pico import save_adapter

    return save_adapter(pico_base, pico_base.parent / "adapter", seed=2)


@pytest.fixture(scope="session")
def pico_text(pico_base: Path) -> Path:
    """A few chats to measure on."""
    from tests.helpers.pico import DIALOGUE

    path = pico_base.parent / "text.jsonl"
    path.write_text("\n".join(json.dumps({"messages": DIALOGUE}) for _ in range(10)))
    return path


@pytest.fixture(scope="session")
def pico_recipe(pico_base: Path, pico_adapter: Path) -> RecipeMaker:
    """Make a recipe on the pico model: formats, and any key to change."""
    from qlora_export.recipe.load import make_recipe

    def make(*formats: str | dict[str, Any], **changes: Any) -> Recipe:
        artifacts = [{"format": item} if isinstance(item, str) else item for item in formats]
        data = {"base": str(pico_base), "adapter": str(pico_adapter), "artifacts": artifacts, **changes}
        data = {key: value for key, value in data.items() if value is not None}
        return make_recipe(data, Path(), "test")

    return make


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, pico_base: Path, pico_adapter: Path) -> Pairs:
    """A sound base and a sound adapter by name, each made once, whose copies tests break."""
    from tests.helpers.hostile import sound_pairs

    return sound_pairs(tmp_path_factory.mktemp("pairs"), pico_base, pico_adapter)


@pytest.fixture
def base_copy(pico_base: Path, tmp_path: Path) -> Path:
    """A base that a test may break."""
    return Path(shutil.copytree(pico_base, tmp_path / "base"))


@pytest.fixture
def adapter_copy(pico_adapter: Path, tmp_path: Path) -> Path:
    """An adapter that a test may break."""
    return Path(shutil.copytree(pico_adapter, tmp_path / "adapter"))
