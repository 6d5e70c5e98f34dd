"""A pico model made from a config, a real QLoRA adapter on it, and small makers for broken inputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Matrices of pico models take microseconds, and threads that wait for each other take milliseconds on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Commands are started some hundred times: none need compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import hypothesis
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qlora_export.demo
from qlora_export.recipe import Recipe, make_recipe
from qlora_export.training import record
from tests import processes, room_times, sampling

hypothesis.settings.register_profile("all-cases", deadline=None, derandomize=True)
hypothesis.settings.register_profile("sampled", hypothesis.settings.get_profile("all-cases"), max_examples=25)

DEMO = Path(qlora_export.demo.__file__).parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DIALOGUE = [
    {"role": "user", "content": "Order 512 came broken."},
    {"role": "assistant", "content": "We are sorry. You get the money back."},
]


def pico_config(**changes: Any) -> transformers.LlamaConfig:
    """A Llama of 0.2 M parameters whose columns are no multiple of the NF4 block."""
    settings: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaConfig(**{**settings, **changes})


def save_base(
    folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16, shard: str = "50GB", **changes: Any
) -> Path:
    """A pico base with a tokenizer."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(pico_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / "base" / name, folder / name)
    return folder


def load_qlora(base: Path, storage: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """The base as QLoRA training loads it, quantised with one thread."""
    settings: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    config = transformers.BitsAndBytesConfig(**{**settings, **changes})
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, dtype=storage, device_map={"": "cpu"}
        )
    finally:
        torch.set_num_threads(threads)


def save_adapter(base: Path, folder: Path, seed: int, size: float = 0.05, **changes: Any) -> Path:
    """A LoRA adapter of random deltas on a 4-bit base, with its sidecar."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    model = peft.get_peft_model(load_qlora(base), peft.LoraConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=size)
    model.save_pretrained(folder)
    record(model, folder)
    return folder


# By measurement; what is not here takes a few seconds each. Two workers end together when what is long begins first.
LONG_FILES = (
    "tests/test_demo.py",
    "tests/publish/hub/test_release.py",
    "tests/engine/test_ray.py",
    "tests/tools/test_tools.py",
    "tests/publish/hub/test_commit.py",
    "tests/merge/test_oracle.py",
    "tests/cli/test_cli.py",
    "tests/cli/test_publishing.py",
    "tests/exporters/test_onnx_traced.py",
    "tests/exporters/test_onnx_classifier.py",
    "tests/exporters/test_onnx_architectures.py",
    "tests/exporters/test_onnx.py",
    "tests/exporters/test_transformers_js.py",
    "tests/tools/test_quality_tools.py",
    "tests/calibrate/test_running.py",
    "tests/publish/hub/test_killed.py",
    "tests/calibrate/test_tuning_memory.py",
    "tests/publish/test_card.py",
    "tests/calibrate/test_pipeline.py",
    "tests/publish/hub/test_tokens.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    sampling.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Which cases are run, a cache of kernels, and processes to fork from: told to the workers, which are started later."""
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
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("vllm") and "QLORA_EXPORT_VLLM_PYTHON" not in os.environ:
        pytest.skip("QLORA_EXPORT_VLLM_PYTHON names no environment of vLLM")
    if item.get_closest_marker("lm_eval") and "QLORA_EXPORT_LM_EVAL_PYTHON" not in os.environ:
        pytest.skip("QLORA_EXPORT_LM_EVAL_PYTHON names no environment of lm-evaluation-harness")


@pytest.fixture(scope="session")
def pico_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied pico base in one file."""
    return save_base(tmp_path_factory.mktemp("pico") / "base", seed=1)


@pytest.fixture(scope="session")
def pico_adapter(pico_base: Path) -> Path:
    """An adapter on all linear layers of the pico base."""
    return save_adapter(pico_base, pico_base.parent / "adapter", seed=2)


@pytest.fixture(scope="session")
def pico_text(pico_base: Path) -> Path:
    """A few chats to measure on."""
    path = pico_base.parent / "text.jsonl"
    path.write_text("\n".join(json.dumps({"messages": DIALOGUE}) for _ in range(10)))
    return path


RecipeMaker = Callable[..., Recipe]


@pytest.fixture
def pico_recipe(pico_base: Path, pico_adapter: Path) -> RecipeMaker:
    """Make a recipe on the pico model: formats, and any key to change."""

    def make(*formats: str | dict[str, Any], **changes: Any) -> Recipe:
        artifacts = [{"format": item} if isinstance(item, str) else item for item in formats]
        data = {"base": str(pico_base), "adapter": str(pico_adapter), "artifacts": artifacts, **changes}
        data = {key: value for key, value in data.items() if value is not None}
        return make_recipe(data, Path(), "test")

    return make


@pytest.fixture
def base_copy(pico_base: Path, tmp_path: Path) -> Path:
    """A base that a test may break."""
    return Path(shutil.copytree(pico_base, tmp_path / "base"))


@pytest.fixture
def adapter_copy(pico_adapter: Path, tmp_path: Path) -> Path:
    """An adapter that a test may break."""
    return Path(shutil.copytree(pico_adapter, tmp_path / "adapter"))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def half_step(values: torch.Tensor) -> torch.Tensor:
    """Half the distance of bf16 values around each float32 value, and a little for float32 sums in another order."""
    return values.abs().clamp(min=1e-30).log2().floor().exp2() * 2**-8 + 1e-6 * values.abs().max()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def random_values(*shape: int, seed: int = 0, scale: float = 0.02) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Heavy-tailed float32 values, as weights are."""
    return (np.random.default_rng(seed).standard_t(4, shape) * scale).astype(np.float32)
