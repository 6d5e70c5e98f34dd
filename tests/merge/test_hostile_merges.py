"""Adapters whose tensors do not fit their base, or whose values cannot be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.hostile import (
    BAD_INPUT,
    EMBEDDING,
    HEAD,
    REFUSED,
    STORED_Q,
    WEIGHTS,
    Breaker,
    Case,
    Change,
    Pairs,
    Place,
    Q,
    Tensors,
    assert_refused,
    drop,
    map_one,
    nan_row,
    put,
    settings,
    several,
    tensors,
)

UP = "base_model.model.model.layers.1.mlp.up_proj"
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


def _both(name: str, other: str) -> Change:
    """Copy the factors of one module to another."""

    def copy(found: Tensors) -> None:
        for side in "AB":
            found[f"{other}.lora_{side}.weight"] = found[f"{name}.lora_{side}.weight"].clone()

    return copy


def _embedding_factors(module: str, rows: int, columns: int) -> Change:
    """Factors as an embedding has them."""
    made = {"A": torch.ones(4, rows), "B": torch.ones(columns, 4)}
    return lambda found: found.update({f"{module}.lora_embedding_{side}": factor for side, factor in made.items()})


def _linear_factors(module: str, rows: int, columns: int) -> Change:
    """Factors as a linear layer has them."""
    made = {"A": torch.ones(4, columns), "B": torch.ones(rows, 4)}
    return lambda found: found.update({f"{module}.lora_{side}.weight": factor for side, factor in made.items()})


def _trained_rows(indices: Any, rows: int) -> Breaker:
    """Trained token rows of the embedding."""
    delta = torch.ones(rows, 64)
    return several(
        settings(trainable_token_indices=indices),
        tensors(put(f"{EMBEDDING}.token_adapter.trainable_tokens_delta", delta)),
    )


def _magnitudes(found: Tensors) -> None:
    """A magnitude for each row of every module."""
    for name in [name for name in found if name.endswith("lora_B.weight")]:
        module = name.removesuffix(".lora_B.weight")
        found[f"{module}.lora_magnitude_vector"] = torch.ones(found[name].shape[0])


TENSORS: dict[str, Case] = {
    "rank-of-other-size": Case(settings(r=8), BAD_INPUT, (WEIGHTS, f"{Q}.lora_A.weight", "[4, 64]", "[8, 64]")),
    "blocks-do-not-divide": Case(
        settings(use_bdlora={"nblocks": 3, "target_modules_bd_a": ["q_proj"]}), BAD_INPUT, ("3 blocks", "4", STORED_Q)
    ),
    "blocks-stored-whole": Case(
        settings(use_bdlora={"nblocks": 2, "target_modules_bd_b": ["q_proj"]}),
        BAD_INPUT,
        (WEIGHTS, f"{Q}.lora_B.weight", "[64, 4]", "[64, 2]"),
    ),
    "no-home": Case(tensors(put(f"{Q}.lora_C.weight", torch.ones(4, 4))), BAD_INPUT, (WEIGHTS, f"{Q}.lora_C.weight")),
    "no-home-other-adapter-name": Case(
        tensors(put(f"{Q}.lora_A.other.weight", torch.ones(4, 64))), BAD_INPUT, (WEIGHTS, f"{Q}.lora_A.other.weight")
    ),
    "layer-the-base-has-not": Case(
        tensors(_both(Q, Q.replace("layers.0", "layers.7"))), BAD_INPUT, (WEIGHTS, "layers.7.self_attn.q_proj.lora_A")
    ),
    "lonely-a": Case(tensors(drop(f"{Q}.lora_B")), BAD_INPUT, (WEIGHTS, f"{Q}.lora_B.weight", "missing")),
    "lonely-b": Case(tensors(drop(f"{Q}.lora_A")), BAD_INPUT, (WEIGHTS, f"{Q}.lora_A.weight", "missing")),
    "wrong-rank": Case(
        tensors(put(f"{Q}.lora_A.weight", torch.ones(5, 64))), BAD_INPUT, (f"{Q}.lora_A.weight", "[5, 64]", "[4, 64]")
    ),
    "transposed-a": Case(
        tensors(put(f"{Q}.lora_A.weight", torch.ones(64, 4))), BAD_INPUT, (f"{Q}.lora_A.weight", "[64, 4]", "[4, 64]")
    ),
    "wrong-rows": Case(
        tensors(put(f"{UP}.lora_B.weight", torch.ones(89, 4))), BAD_INPUT, (f"{UP}.lora_B.weight", "[89, 4]", "[88, 4]")
    ),
    "three-dimensions": Case(
        tensors(put(f"{Q}.lora_A.weight", torch.ones(1, 4, 64))), BAD_INPUT, (f"{Q}.lora_A.weight", "[1, 4, 64]")
    ),
    "integers": Case(
        tensors(map_one(f"{Q}.lora_A.weight", torch.Tensor.int)), BAD_INPUT, (WEIGHTS, f"{Q}.lora_A.weight", "I32")
    ),
    "no-tensor-at-all": Case(tensors(dict.clear), BAD_INPUT, (WEIGHTS, "no tensor")),
    "dora-without-magnitude": Case(
        settings(use_dora=True), BAD_INPUT, (WEIGHTS, f"{Q}.lora_magnitude_vector", "use_dora")
    ),
    "magnitude-without-dora": Case(
        tensors(put(f"{Q}.lora_magnitude_vector", torch.ones(64))),
        BAD_INPUT,
        (WEIGHTS, f"{Q}.lora_magnitude_vector", "use_dora"),
    ),
    "magnitude-of-wrong-length": Case(
        several(
            settings(use_dora=True), tensors(_magnitudes), tensors(put(f"{Q}.lora_magnitude_vector", torch.ones(63)))
        ),
        BAD_INPUT,
        (f"{Q}.lora_magnitude_vector", "[63]", "[64]"),
    ),
    "bias-the-base-has-not": Case(
        several(settings(lora_bias=True), tensors(put(f"{Q}.lora_B.bias", torch.ones(64)))),
        BAD_INPUT,
        (f"{Q}.lora_B.bias", f"{STORED_Q}.bias"),
    ),
    "lora-on-a-norm": Case(
        tensors(_linear_factors("base_model.model.model.norm", 64, 64)), BAD_INPUT, ("model.norm.lora_A", "[64]")
    ),
    "nested-factors-of-a-linear-layer": Case(
        tensors(_linear_factors(f"{Q}.base_layer", 64, 64)), BAD_INPUT, (f"{Q}.base_layer.lora_A.weight",)
    ),
    "embedding-factors-of-a-linear-layer": Case(
        several(tensors(drop(f"{Q}.lora_")), tensors(_embedding_factors(Q, 64, 64))),
        BAD_INPUT,
        (f"{Q}.lora_embedding_A",),
    ),
    "linear-factors-of-an-embedding": Case(
        tensors(_linear_factors(EMBEDDING, 2048, 64)), BAD_INPUT, (f"{EMBEDDING}.lora_A.weight",)
    ),
    "both-kinds-of-factors": Case(
        several(tensors(_embedding_factors(EMBEDDING, 2048, 64)), tensors(_linear_factors(EMBEDDING, 2048, 64))),
        BAD_INPUT,
        (f"{EMBEDDING}.lora_A.weight",),
    ),
    "bias-of-an-embedding": Case(
        several(
            tensors(_embedding_factors(EMBEDDING, 2048, 64)), tensors(put(f"{EMBEDDING}.lora_B.bias", torch.ones(64)))
        ),
        BAD_INPUT,
        (f"{EMBEDDING}.lora_B.bias",),
    ),
    "two-spellings": Case(
        tensors(lambda found: found.update({f"{Q}.lora_A.default.weight": found[f"{Q}.lora_A.weight"] + 1})),
        BAD_INPUT,
        (f"{Q}.lora_A", "two spellings"),
    ),
    "two-spellings-without-prefix": Case(
        tensors(lambda found: found.update({f"{STORED_Q}.lora_A.weight": found[f"{Q}.lora_A.weight"] + 1})),
        BAD_INPUT,
        (f"{STORED_Q}.lora_A", "two spellings"),
    ),
    "two-copies-of-a-head": Case(
        tensors(
            lambda found: found.update(
                {
                    f"{HEAD}.weight": torch.ones(2048, 64),
                    f"{HEAD}.modules_to_save.default.weight": torch.zeros(2048, 64),
                }
            )
        ),
        BAD_INPUT,
        ("lm_head", "two spellings"),
    ),
    "tokens-of-wrong-count": Case(
        _trained_rows([3, 5, 17], 2), BAD_INPUT, (f"{EMBEDDING}.token_adapter", "[2, 64]", "[3, 64]")
    ),
    "tokens-out-of-range": Case(
        _trained_rows([3, 5, 2048], 3), BAD_INPUT, (f"{EMBEDDING}.token_adapter", "row 2048", "2048")
    ),
    "tokens-negative": Case(_trained_rows([3, -1, 5], 3), BAD_INPUT, (f"{EMBEDDING}.token_adapter", "row -1")),
    "tokens-as-text": Case(_trained_rows(["3", "5", "17"], 3), BAD_INPUT, ("trainable_token",)),
    "tokens-as-floats": Case(_trained_rows([3.0, 5.0, 17.0], 3), BAD_INPUT, ("trainable_token",)),
    "tokens-of-another-module": Case(
        _trained_rows({"wte": [3, 5]}, 2), BAD_INPUT, (f"{EMBEDDING}.token_adapter", "[2, 64]", "[0, 64]")
    ),
    "saved-head-of-wrong-shape": Case(
        several(settings(modules_to_save=["lm_head"]), tensors(put(f"{HEAD}.weight", torch.ones(2048, 63)))),
        BAD_INPUT,
        (f"{HEAD}.weight", "[2048, 63]", "[2048, 64]"),
    ),
    "saved-norm-of-wrong-shape": Case(
        tensors(put("base_model.model.model.norm.weight", torch.ones(65))), BAD_INPUT, ("norm.weight", "[65]", "[64]")
    ),
    "resized-embedding-alone": Case(
        tensors(put(f"{EMBEDDING}.weight", torch.ones(2050, 64))),
        BAD_INPUT,
        ("model.embed_tokens.weight", "2050", "2048"),
    ),
    "resized-head-alone": Case(
        tensors(put(f"{HEAD}.weight", torch.ones(2050, 64))), BAD_INPUT, ("lm_head.weight", "2050", "2048")
    ),
    "vocabulary-of-nothing": Case(
        tensors(lambda found: found.update({f"{name}.weight": torch.ones(0, 64) for name in (EMBEDDING, HEAD)})),
        BAD_INPUT,
        (f"{EMBEDDING}.weight", "[0, 64]"),
    ),
    "bias-of-a-parameter": Case(
        tensors(put(f"{EXPERTS}.lora_B.bias", torch.ones(48))), BAD_INPUT, (f"{EXPERTS}.lora_B.bias",), pair="mixtral"
    ),
    "magnitude-of-a-parameter": Case(
        tensors(put(f"{EXPERTS}.lora_magnitude_vector", torch.ones(48))),
        BAD_INPUT,
        (f"{EXPERTS}.lora_magnitude_vector",),
        pair="mixtral",
    ),
    "factors-of-too-few-experts": Case(
        tensors(map_one(f"{EXPERTS}.lora_A.weight", lambda found: found[:12])),
        BAD_INPUT,
        (f"{EXPERTS}.lora_A.weight", "[12, ", "[16, "),
        pair="mixtral",
    ),
    "saved-bias-of-wrong-length": Case(
        several(settings(bias="all"), tensors(put(f"{Q}.base_layer.bias", torch.ones(57)))),
        BAD_INPUT,
        (f"{Q}.base_layer.bias", "[57]", "[56]"),
        pair="qwen2",
    ),
    "saved-conv1d-transposed": Case(
        tensors(put("base_model.model.transformer.h.0.mlp.c_fc.weight", torch.ones(88, 48))),
        BAD_INPUT,
        ("c_fc.weight", "[88, 48]", "[48, 88]"),
        pair="gpt2",
    ),
    "tied-factors-that-differ": Case(
        tensors(map_one(f"{HEAD}.lora_B.weight", lambda found: found + 1)),
        BAD_INPUT,
        (f"{HEAD}.lora_B.weight",),
        pair="tied-embedding",
    ),
    "classifier-head-of-wrong-width": Case(
        tensors(put("base_model.model.score.weight", torch.ones(3, 47))),
        BAD_INPUT,
        ("score.weight", "[3, 47]", "48"),
        pair="classifier",
    ),
    "classifier-head-of-another-name": Case(
        tensors(
            lambda found: found.update(
                {"base_model.model.classifier.weight": found.pop("base_model.model.score.weight")}
            )
        ),
        BAD_INPUT,
        ("classifier.weight",),
        pair="classifier",
    ),
    "classifier-head-inside-a-layer": Case(
        tensors(put("base_model.model.model.layers.0.score.weight", torch.ones(3, 48))),
        BAD_INPUT,
        ("layers.0.score.weight",),
        pair="classifier",
    ),
    "two-names-of-one-module": Case(
        tensors(
            _both(
                "base_model.model.model.language_model.layers.0.self_attn.q_proj",
                "base_model.model.language_model.model.layers.0.self_attn.q_proj",
            )
        ),
        BAD_INPUT,
        ("self_attn.q_proj",),
        pair="multimodal",
    ),
}

VALUES: dict[str, Case] = {
    "zero-b": Case(tensors(put(f"{Q}.lora_B.weight", torch.zeros(64, 4))), REFUSED, (WEIGHTS, f"{Q}.lora_B.weight")),
    "zero-a": Case(tensors(put(f"{Q}.lora_A.weight", torch.zeros(4, 64))), REFUSED, (WEIGHTS, f"{Q}.lora_A.weight")),
    "nan": Case(tensors(map_one(f"{Q}.lora_A.weight", nan_row)), BAD_INPUT, (WEIGHTS, f"{Q}.lora_A.weight", "1 ")),
    "infinity": Case(
        tensors(put(f"{Q}.lora_B.weight", torch.full((64, 4), float("-inf")))), BAD_INPUT, (f"{Q}.lora_B", "256")
    ),
    "product-overflows": Case(
        tensors(
            lambda found: found.update(
                {f"{Q}.lora_{side}.weight": found[f"{Q}.lora_{side}.weight"].fill_(3e38) for side in "AB"}
            )
        ),
        BAD_INPUT,
        ("q_proj", "inf"),
        late=True,
    ),
    "alpha-overflows-float32": Case(settings(lora_alpha=1e308), BAD_INPUT, ("lora_alpha",)),
    "alpha-vanishes-in-float32": Case(settings(lora_alpha=1e-60), BAD_INPUT, (STORED_Q, "lora_alpha")),
    "alpha-zero": Case(settings(lora_alpha=0), BAD_INPUT, (STORED_Q, "scale", "0", "lora_alpha")),
    "alpha-nan": Case(settings(lora_alpha=float("nan")), BAD_INPUT, (STORED_Q, "scale", "nan", "lora_alpha")),
    "alpha-infinite": Case(settings(lora_alpha=float("inf")), BAD_INPUT, (STORED_Q, "scale", "inf")),
    "alpha-zero-by-pattern": Case(
        settings(alpha_pattern={"layers.0.self_attn.q_proj": 0}), BAD_INPUT, (STORED_Q, "scale", "0")
    ),
    "alpha-zero-of-a-parameter": Case(
        settings(alpha_pattern={"mlp.experts.gate_up_proj": 0}),
        BAD_INPUT,
        ("gate_up_proj", "scale", "0"),
        pair="mixtral",
    ),
}

CASES = {**TENSORS, **VALUES}


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_refused_by_name(pairs: Pairs, tmp_path: Path, name: str) -> None:
    assert_refused(CASES[name], pairs, Place.below(tmp_path))
