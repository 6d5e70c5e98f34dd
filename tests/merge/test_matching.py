from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_export.errors import ExitCode
from qlora_export.merge.matching import match_adapter
from qlora_export.sources.adapter import open_adapter
from qlora_export.sources.checkpoint import open_checkpoint
from tests.helpers.files import edit_json, edit_tensors

Q = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def test_every_linear_layer_is_found(pico_base: Path, pico_adapter: Path) -> None:
    match = match_adapter(open_adapter(pico_adapter), open_checkpoint(pico_base))
    assert match.problems == ()
    assert len(match.model.changed) == 14
    scales = [change.scale for output in match.model.changed.values() for change in output.changes]  # type: ignore[attr-defined]
    assert set(scales) == {2.0}


def foreign(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(64)


def unknown_module(tensors: Tensors) -> None:
    for side in "AB":
        name = f"base_model.model.model.layers.7.self_attn.q_proj.lora_{side}.weight"
        tensors[name] = tensors[f"{Q}.lora_{side}.weight"].clone()


def lonely(tensors: Tensors) -> None:
    del tensors[f"{Q}.lora_B.weight"]


def narrow(tensors: Tensors) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.ones(4, 63)


def tall(tensors: Tensors) -> None:
    tensors[f"{Q}.lora_B.weight"] = torch.ones(65, 4)


def empty(tensors: Tensors) -> None:
    tensors.clear()


def integers(tensors: Tensors) -> None:
    tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (foreign, "lora_magnitude_vector is there, use_dora is not set"),
        (unknown_module, "layers.7.self_attn.q_proj.lora_A.weight has no home"),
        (lonely, "q_proj.lora_B.weight is missing, its partner is there"),
        (narrow, r"q_proj.lora_A.weight is [4, 63], the base and r need [4, 64]"),
        (tall, r"q_proj.lora_B.weight is [65, 4], the base and r need [64, 4]"),
        (empty, "no tensor at all"),
        (integers, "has dtype I32"),
    ],
)
def test_what_does_not_fit_is_a_problem(
    pico_base: Path, adapter_copy: Path, change: Callable[[Tensors], None], says: str
) -> None:
    edit_tensors(adapter_copy / "adapter_model.safetensors", change)
    (problem,) = match_adapter(open_adapter(adapter_copy), open_checkpoint(pico_base)).problems
    assert says in problem.message
    assert problem.exit_code == ExitCode.BAD_INPUT


def test_a_rank_that_the_config_denies_is_a_problem(pico_base: Path, adapter_copy: Path) -> None:
    edit_json(adapter_copy / "adapter_config.json", rank_pattern={"layers.1.mlp.up_proj": 3})
    (problem,) = match_adapter(open_adapter(adapter_copy), open_checkpoint(pico_base)).problems
    assert "layers.1.mlp.up_proj.lora_A.weight is [4, 64], the base and r need [3, 64]" in problem.message
