"""Sound adapters, as PEFT saves them, are merged as they run, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

from tests.helpers import zoo
from tests.helpers.hostile import BAD_INPUT, PAIRS, REFUSED, Pairs, Place, build, lay_out_pair

# What must never be merged wrong in silence, as PEFT itself saves it: architecture and settings of the adapter.
LIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "head-factors-and-tokens": ("qwen3", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 5]}),
    "tied-dora-of-the-head": (
        "qwen3",
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "ensure_weight_tying": True},
    ),
    "tied-dora-of-the-embedding": (
        "gemma3",
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "ensure_weight_tying": True},
    ),
    "tied-scales-that-differ": (
        "gemma3",
        {"target_modules": ["q_proj", "lm_head"], "alpha_pattern": {"lm_head": 3}, "ensure_weight_tying": True},
    ),
    "saved-experts": ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "tied-tokens-of-each-side": (
        "qwen3",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [17, 9]}},
    ),
    "embedding-factors-and-saved-head": (
        "qwen3",
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
    "saved-norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}),
    "parameter-of-a-conv1d": (
        "gpt2",
        {"target_parameters": ["c_fc.weight", "attn.c_attn.weight", "mlp.c_proj.weight"]},
    ),
    "parameter-of-a-tied-embedding": (
        "qwen3",
        {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]},
    ),
    "tying-that-peft-forgets": (
        "falcon",
        {"target_modules": ["query_key_value", "lm_head"], "ensure_weight_tying": True},
    ),
    "parameter-of-a-tied-head": ("gemma2", {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]}),
    "layers-and-exact-names": ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}),
    "alpha-of-a-parameter": (
        "mixtral",
        {"target_parameters": ["mlp.experts.gate_up_proj"], "alpha_pattern": {"mlp.experts.gate_up_proj": 3}},
    ),
}

# Those of them that must be merged.
MERGED = {
    "parameter-of-a-conv1d",
    "parameter-of-a-tied-embedding",
    "parameter-of-a-tied-head",
    "layers-and-exact-names",
}


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_is_sound_before_it_is_broken(pairs: Pairs, tmp_path: Path, pair: str) -> None:
    place = Place.below(tmp_path)
    lay_out_pair(place, pairs(pair), recorded=False)
    assert build(place).returncode == 0
    assert (place.out / "bf16/manifest.json").exists()


@pytest.mark.parametrize("name", LIVE)
def test_what_peft_saves_is_merged_as_it_runs_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = Place.below(tmp_path)
    architecture, changes = LIVE[name]
    monkeypatch.setitem(zoo.VARIANTS, name, zoo.Variant(lambda _: {"target_modules": [], **changes}))
    zoo.save_architecture(architecture, place.base, seed=3)
    zoo.save_variant(place.base, architecture, name, place.adapter, seed=5)
    made = build(place, "fp32")
    if made.returncode:
        assert (made.returncode in (REFUSED, BAD_INPUT), name in MERGED) == (True, False), made.stderr
        return
    with zoo._quiet():
        model = peft.PeftModel.from_pretrained(zoo._load(place.base, architecture), place.adapter).eval()
        live = zoo._logits(model, zoo.TOKENS)
    found = zoo.reload_logits(place.out / "fp32", architecture, zoo.TOKENS)
    assert np.abs(found - live).max() < 1e-5
