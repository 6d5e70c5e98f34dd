from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from qlora_export.errors import ExitCode, InputError, Refused
from qlora_export.sources.adapter import MERGED_SETTINGS, REFUSED, Adapter, open_adapter, variant_problems
from qlora_export.types import TrainingQuantization
from tests.helpers.files import edit_json


def with_config(**config: Any) -> Adapter:
    return Adapter(Path("adapter"), {"peft_type": "LORA", **config}, {}, TrainingQuantization())


@given(
    pattern=st.dictionaries(
        st.sampled_from(["q_proj", "layers.0.q_proj", r"layers\.\d+\.k_proj", "proj", ".*", "model.layers.1.k_proj"]),
        st.integers(1, 9),
    ),
    module=st.sampled_from(["model.layers.0.q_proj", "model.layers.1.k_proj", "model.layers.10.q_proj", "x_proj"]),
)
def test_patterns_match_as_in_peft(pattern: dict[str, int], module: str) -> None:
    expected = pattern.get(get_pattern_key(list(pattern), module), 8)
    assert with_config(r=8, rank_pattern=pattern).rank(module) == expected
    assert with_config(r=1, lora_alpha=8, alpha_pattern=pattern).scale(module) == expected


def test_rank_stabilised_scale() -> None:
    assert with_config(r=16, lora_alpha=32, use_rslora=True).scale("x") == 32 / math.sqrt(16)
    assert with_config(r=16, lora_alpha=32).scale("x") == 2


def test_what_peft_saves_by_default_is_plain(pico_adapter: Path) -> None:
    adapter = open_adapter(pico_adapter)
    assert variant_problems(adapter) == []
    assert adapter.training.recorded


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"peft_type": "ADALORA"}, "peft_type ADALORA"),
        ({"peft_type": "XLORA"}, "peft_type XLORA"),
        ({"init_lora_weights": "corda"}, "corda changed the base"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga changed the base"),
        ({"init_lora_weights": "loftq"}, "loftq changed the base"),
        ({"task_type": "TOKEN_CLS"}, "task_type TOKEN_CLS"),
        ({"layer_replication": [[0, 2]]}, "layer replication"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changed the base"),
        ({"init_lora_weights": "olora"}, "olora changed the base"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"use_a_later_variant": True}, "use_a_later_variant = True is unknown"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(config: dict[str, Any], says: str) -> None:
    (problem,) = variant_problems(with_config(**config))
    assert says in problem.message
    assert problem.exit_code == ExitCode.REFUSED


def test_every_switch_of_this_peft_is_known_or_harmless() -> None:
    """A new variant in peft must be looked at before it is merged as if it were plain."""
    assert set(peft.LoraConfig().to_dict()) <= MERGED_SETTINGS | set(REFUSED)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": None}, "r: Input should be a valid integer"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: Input should be a valid dictionary"),
        ({"alpha_pattern": {"(": 3}}, "'(' is no regular expression"),
    ],
)
def test_settings_that_are_no_numbers_are_named(adapter_copy: Path, config: dict[str, Any], says: str) -> None:
    edit_json(adapter_copy / "adapter_config.json", **config)
    with pytest.raises(InputError) as caught:
        open_adapter(adapter_copy)
    assert says in caught.value.message


def test_pickled_weights_are_refused(adapter_copy: Path) -> None:
    (adapter_copy / "adapter_model.safetensors").rename(adapter_copy / "adapter_model.bin")
    with pytest.raises(Refused, match="adapter_model.bin"):
        open_adapter(adapter_copy)


def test_pickles_beside_the_weights_are_ignored(adapter_copy: Path) -> None:
    before = open_adapter(adapter_copy).sha256
    (adapter_copy / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert open_adapter(adapter_copy).sha256 == before


def test_a_folder_that_is_no_adapter(pico_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapter_config.json: missing"):
        open_adapter(pico_base)
    with pytest.raises(InputError, match="no such folder"):
        open_adapter(tmp_path / "nothing")


@pytest.mark.parametrize(
    "changes", [{"schema": 2}, {"quantization": {}}, {"modules": 3}, {"modules": {}}, {"base": None}]
)
def test_a_broken_sidecar_is_named(adapter_copy: Path, changes: dict[str, Any]) -> None:
    edit_json(adapter_copy / "qlora_export.json", **changes)
    with pytest.raises(InputError, match="qlora_export.json"):
        open_adapter(adapter_copy)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("block_size", 100, "block_size 100"), ("block_size", 0, "block_size 0"), ("double_quant", "false", "'false'")],
)
def test_impossible_facts_of_a_sidecar_are_named(adapter_copy: Path, key: str, value: Any, says: str) -> None:
    path = adapter_copy / "qlora_export.json"
    quantization = json.loads(path.read_text())["quantization"]
    edit_json(path, quantization={**quantization, key: value})
    with pytest.raises(InputError, match="qlora_export.json") as caught:
        open_adapter(adapter_copy)
    assert says in caught.value.message


def test_without_a_sidecar_the_documented_default_is_assumed(adapter_copy: Path) -> None:
    (adapter_copy / "qlora_export.json").unlink()
    assert open_adapter(adapter_copy).training == TrainingQuantization()
