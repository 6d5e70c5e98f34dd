"""Builds whose row blocks pass through torch tensors have the bytes of any other build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.engine import BuildOptions, build
from qlora_export.errors import EnvironmentProblem, InputError, UsageError
from qlora_export.planning.make import make_plan
from qlora_export.quant.device.accelerator import Accelerator
from tests.helpers.files import edit_tensors, folder_bytes
from tests.helpers.pico import RecipeMaker

ALL: tuple[Any, ...] = (
    *(
        "bf16",
        "fp32",
        {"format": "nf4", "rounding": "nearest"},
        {"format": "nf4", "rounding": "search"},
        "nf4",
        "nf4-adapter",
        "fp4",
        "int8",
        "w8a16",
        "fp8",
    ),
    {"format": "nf4", "name": "original", "onto": "original"},
)


def run(recipe: Any, out: Path, accelerator: str | None = None, **options: Any) -> None:
    build(make_plan(recipe, out), out, BuildOptions(accelerator=accelerator, **options))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("weights", [1, 1 << 24])
def test_bytes_do_not_depend_on_the_device(
    pico_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, weights: int
) -> None:
    monkeypatch.setattr("qlora_export.merge.base_rows.ACCELERATED_WEIGHTS", weights)
    run(pico_recipe(*ALL), tmp_path / "processor")
    run(pico_recipe(*ALL), tmp_path / "accelerator", device)
    assert folder_bytes(tmp_path / "processor") == folder_bytes(tmp_path / "accelerator")


def test_a_bad_weight_is_named(pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf

    edit_tensors(base_copy / "model.safetensors", spoil)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight is inf in row 3, column 5"):
        run(pico_recipe("nf4", base=str(base_copy)), tmp_path / "out", "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_overflow_is_named(pico_recipe: RecipeMaker, adapter_copy: Path, tmp_path: Path, device: str) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.fill_(1e6)

    edit_tensors(adapter_copy / "adapter_model.safetensors", grow)
    with pytest.raises(InputError, match=r"tensor model.layers.\d.* holds \S+, float16 ends at 65504"):
        run(pico_recipe("fp16", adapter=str(adapter_copy)), tmp_path / "out", device)


def test_bits_arrive_as_they_are() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    accelerator = Accelerator("cpu")
    with accelerator.working():
        assert accelerator.send(bits).view(torch.int16).numpy().view(np.uint16).tolist() == bits.tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(EnvironmentProblem, match="--device cuda: "):
        Accelerator("cuda")
    with pytest.raises(EnvironmentProblem, match="--device warp9: "):
        Accelerator("warp9")


@pytest.mark.parametrize("other", [{"engine": "ray"}, {"memory_limit_bytes": 1 << 30}])
def test_what_does_not_go_with_an_accelerator(pico_recipe: RecipeMaker, tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--device cpu and --"):
        run(pico_recipe("bf16"), tmp_path / "out", "cpu", **other)
    assert not (tmp_path / "out").exists()
