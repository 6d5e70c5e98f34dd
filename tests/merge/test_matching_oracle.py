"""Whatever config a LoRA has, our ranks, scales and homes are those of the live layers that PEFT makes of it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.save_and_load import get_peft_model_state_dict

from qlora_export.merge.adapter_keys import PREFIX
from qlora_export.merge.changes import LowRank
from qlora_export.merge.matching import match_adapter
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint
from qlora_export.tensors.header import StoredTensor
from qlora_export.types import TensorSpec, TrainingQuantization
from tests import sampling
from tests.helpers.zoo import save_architecture

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = [
    *LINEARS,
    "self_attn.q_proj",
    "layers.0.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    r"layers\.\d+\.mlp\.down_proj",
    r".*\.1\..*",
    r"model.layers.0.self_attn.(k|v)_proj",
    "proj",
]
patterns = st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=3)
targets = st.one_of(
    st.lists(st.sampled_from([*LINEARS, "model.layers.1.mlp.up_proj"]), min_size=1, unique=True),
    st.sampled_from(
        ["all-linear", r".*\.(q|v)_proj", r".*layers\.1\.mlp\.\w+_proj", r"model\.layers\.0\.self_attn\.q_proj"]
    ),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Any]:
    folder = save_architecture("llama", tmp_path_factory.mktemp("base") / "base", seed=3)
    return open_checkpoint(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)


@settings(max_examples=sampling.examples(60))
@given(
    rank=st.integers(1, 9),
    alpha=st.integers(1, 40),
    target=targets,
    ranks=patterns,
    alphas=patterns,
    stabilised=st.booleans(),
    layers=st.sampled_from([None, [0], 1, [0, 1]]),
    pattern=st.sampled_from([None, "layers", ["layers", "h"]]),
    excluded=st.sampled_from([None, ["k_proj"], ["layers.1.mlp.up_proj"], r".*layers\.0\.mlp.*"]),
)
def test_ranks_scales_and_homes_are_pefts(
    base: tuple[Checkpoint, Any],
    rank: int,
    alpha: int,
    target: Any,
    ranks: dict[str, int],
    alphas: dict[str, int],
    stabilised: bool,
    layers: Any,
    pattern: Any,
    excluded: Any,
) -> None:
    checkpoint, model = base
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=target,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=stabilised,
        layers_to_transform=None if isinstance(target, str) else layers,
        layers_pattern=None if isinstance(target, str) or layers is None else pattern,
        exclude_modules=excluded,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            live = peft.get_peft_model(copy.deepcopy(model), config)
        except ValueError as error:
            assert "No modules were targeted" in str(error) or "not found in the base model" in str(error), error
            return
        state = get_peft_model_state_dict(live, save_embedding_layers=False)
    tensors = {
        name: StoredTensor(TensorSpec(name, "F32", tuple(tensor.shape)), Path("adapter"), 0)
        for name, tensor in state.items()
    }
    saved = live.peft_config["default"].to_dict()
    saved["target_modules"] = sorted(saved["target_modules"]) if isinstance(saved["target_modules"], set) else target
    match = match_adapter(Adapter(Path("adapter"), saved, tensors, TrainingQuantization()), checkpoint)
    assert match.problems == ()
    layers_found = {
        name: module for name, module in live.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {f"{PREFIX}{output.spec.module}" for output in match.model.changed.values()} == set(layers_found)
    for output in match.model.changed.values():
        (change,) = output.changes
        layer = layers_found[f"{PREFIX}{output.spec.module}"]
        assert isinstance(change, LowRank)
        assert change.scale == layer.scaling["default"]
        assert change.a.spec.shape == tuple(layer.lora_A["default"].weight.shape)


@settings(max_examples=sampling.examples(40))
@given(data=st.data())
def test_a_tensor_that_is_missing_or_foreign_never_passes(base: tuple[Checkpoint, Any], data: st.DataObject) -> None:
    """Take one tensor of a good adapter away, rename it or reshape it: there is a problem, and it names a tensor."""
    checkpoint, _ = base
    names = [f"{PREFIX}model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    shapes: dict[str, tuple[int, ...]] = {f"{name}.lora_A.weight": (4, 48) for name in names}
    shapes |= {f"{name}.lora_B.weight": (48 if "q_proj" in name else 24, 4) for name in names}
    broken = data.draw(st.sampled_from(sorted(shapes)))
    how = data.draw(st.sampled_from(["remove", "rename", "wider", "deeper", "taller"]))
    shape = shapes.pop(broken)
    if how == "rename":
        replacement = data.draw(st.sampled_from(["layers.7", "layer.0", "layers.0.x"]))
        shapes[broken.replace("layers.0", replacement).replace("layers.1", replacement)] = shape
    elif how != "remove":
        wrong = {"wider": (shape[0], shape[1] + 1), "deeper": (*shape, 1), "taller": (shape[0] + 1, shape[1])}
        shapes[broken] = wrong[how]
    tensors = {name: StoredTensor(TensorSpec(name, "F32", found), Path("adapter"), 0) for name, found in shapes.items()}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    match = match_adapter(Adapter(Path("adapter"), config, tensors, TrainingQuantization()), checkpoint)
    assert match.problems
    assert any("self_attn" in problem.message for problem in match.problems)
    assert match.model.outputs == {}
