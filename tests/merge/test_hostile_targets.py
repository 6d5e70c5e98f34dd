"""Adapters whose config says that other modules were trained than the file holds tensors of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.hostile import (
    BAD_INPUT,
    WEIGHTS,
    Case,
    Pairs,
    Place,
    assert_refused,
    drop,
    put,
    settings,
    several,
    tensors,
)

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


CASES: dict[str, Case] = {
    "layers-denied": Case(
        settings(layers_to_transform=[0], target_modules=LINEARS),
        BAD_INPUT,
        ("layers.1.", "no module that the config targets"),
    ),
    "tensors-of-an-excluded-module": Case(settings(exclude_modules=["q_proj"]), BAD_INPUT, ("q_proj",)),
    "tensors-of-a-module-not-targeted": Case(settings(target_modules=["q_proj"]), BAD_INPUT, ("k_proj",)),
    "tokens-without-tensor": Case(
        settings(trainable_token_indices=[3, 5, 17]), BAD_INPUT, (WEIGHTS, "trainable_token")
    ),
    "targets-without-tensors": Case(tensors(drop("1.mlp.up_proj")), BAD_INPUT, (WEIGHTS, "1 ", "layers.1.mlp.up_proj")),
    "regex-targets-without-tensors": Case(
        several(settings(target_modules=r".*layers\.\d+\.(mlp|self_attn)\..*"), tensors(drop("1.mlp.up_proj"))),
        BAD_INPUT,
        (WEIGHTS, "layers.1.mlp.up_proj"),
    ),
    "all-linear-without-tensors": Case(
        several(settings(target_modules="all-linear"), tensors(drop("1.mlp.up_proj"))),
        BAD_INPUT,
        (WEIGHTS, "layers.1.mlp.up_proj"),
    ),
    "parameters-without-tensors": Case(
        settings(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        BAD_INPUT,
        ("target_parameters", "mlp.experts.gate_up_proj"),
    ),
    "half-of-target-parameters": Case(tensors(drop("base_layer")), BAD_INPUT, ("experts",), pair="mixtral"),
    "saved-modules-without-tensors": Case(settings(modules_to_save=["lm_head"]), BAD_INPUT, (WEIGHTS, "lm_head")),
    "saved-norms-without-tensors": Case(settings(modules_to_save=["input_layernorm"]), BAD_INPUT, ("input_layernorm",)),
    "half-of-the-saved-modules": Case(
        several(
            settings(modules_to_save=["down_proj"], target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]),
            tensors(drop("down_proj", "gate_proj")),
            tensors(put("base_model.model.model.layers.0.mlp.down_proj.weight", torch.ones(64, 88))),
        ),
        BAD_INPUT,
        (WEIGHTS, "layers.1.mlp.down_proj"),
    ),
    "biases-without-tensors": Case(settings(bias="all"), BAD_INPUT, (WEIGHTS, "bias"), pair="qwen2"),
    "lora-bias-without-tensors": Case(settings(lora_bias=True), BAD_INPUT, (WEIGHTS, "lora_B.bias"), pair="qwen2"),
    "classifier-without-head": Case(settings(task_type="SEQ_CLS"), BAD_INPUT, (WEIGHTS, "classifier's head")),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_refused_by_name(pairs: Pairs, tmp_path: Path, name: str) -> None:
    assert_refused(CASES[name], pairs, Place.below(tmp_path))
