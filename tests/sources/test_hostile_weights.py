"""Bases whose weights are broken, or stored as nothing that can be read: floats, int8, FP8, 4 bits and others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.hostile import (
    BAD_INPUT,
    BASE_WEIGHTS,
    REFUSED,
    STORED_Q,
    Breaker,
    Case,
    Pairs,
    Place,
    Q,
    Tensors,
    assert_refused,
    base_settings,
    base_tensors,
    drop,
    map_one,
    nan_row,
    put,
    settings,
    several,
    tensors,
)

QUANT_STATE = f"{STORED_Q}.weight.quant_state.bitsandbytes__nf4"


def quant_state(change: Callable[[dict[str, Any]], object]) -> Breaker:
    """Change the JSON state of a 4-bit weight."""

    def edit(found: Tensors) -> None:
        facts = json.loads(bytes(found[QUANT_STATE].tolist()))
        change(facts)
        found[QUANT_STATE] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    return base_tensors(edit)


def _int8(**parts: torch.Tensor | None) -> Breaker:
    """One matrix of the base as int8 rows with their scales, some of its parts replaced or left out."""

    def edit(found: Tensors) -> None:
        weight = found[f"{STORED_Q}.weight"].float()
        scales = weight.abs().amax(1)
        stored: dict[str, torch.Tensor | None] = {
            "weight": (weight * 127 / scales[:, None]).round().to(torch.int8),
            "SCB": scales,
            **parts,
        }
        found.update({f"{STORED_Q}.{part}": tensor for part, tensor in stored.items() if tensor is not None})

    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return several(base_tensors(edit), base_settings(quantization_config=quantization))


def _fp8(scales: torch.Tensor | None, **quantization: Any) -> Breaker:
    """One matrix of the base in FP8 with these scales."""

    def edit(found: Tensors) -> None:
        found[f"{STORED_Q}.weight"] = found[f"{STORED_Q}.weight"].float().to(torch.float8_e4m3fn)
        if scales is not None:
            found[f"{STORED_Q}.weight_scale_inv"] = scales

    stated = {"quant_method": "fp8", **quantization}
    return several(base_tensors(edit), base_settings(quantization_config=stated))


def _without_q(place: Place) -> None:
    """Take q_proj out of the adapter."""
    settings(target_modules=["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])(place)
    tensors(drop("q_proj"))(place)


def _unannounced_gptq(found: Tensors) -> None:
    del found[f"{STORED_Q}.weight"]
    found[f"{STORED_Q}.qweight"] = torch.ones(8, 64, dtype=torch.int32)
    found[f"{STORED_Q}.scales"] = torch.ones(1, 64, dtype=torch.float16)


VALUES: dict[str, Case] = {
    "nan-in-the-base": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", nan_row)),
        BAD_INPUT,
        (BASE_WEIGHTS, f"{STORED_Q}.weight", "row 3, column 5"),
        late=True,
    ),
    "nan-in-a-norm": Case(
        base_tensors(put("model.norm.weight", torch.full((64,), float("nan"), dtype=torch.bfloat16))),
        BAD_INPUT,
        (BASE_WEIGHTS, "model.norm.weight", "row 0"),
        late=True,
    ),
    "float64-base": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", torch.Tensor.double)), REFUSED, (f"{STORED_Q}.weight", "F64")
    ),
    "integers-without-scales": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", torch.Tensor.char)), REFUSED, (BASE_WEIGHTS, STORED_Q, "I8")
    ),
    "bytes-without-scales": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", torch.Tensor.byte)), REFUSED, (BASE_WEIGHTS, STORED_Q, "U8")
    ),
    "dtype-as-a-list": Case(base_settings(dtype=["bfloat16"]), BAD_INPUT, ("config.json", "dtype")),
}

METHODS: dict[str, Case] = {
    "gptq": Case(base_settings(quantization_config={"quant_method": "gptq", "bits": 4}), REFUSED, ("/base", "gptq")),
    "awq": Case(base_settings(quantization_config={"quant_method": "awq", "bits": 4}), REFUSED, ("/base", "awq")),
    "compressed": Case(
        base_settings(quantization_config={"quant_method": "compressed-tensors"}), REFUSED, ("compressed-tensors",)
    ),
    "quantization-as-a-list": Case(base_settings(quantization_config=["hqq"]), REFUSED, ("/base", "hqq")),
    "nested-gptq": Case(
        base_settings(vision_config={"quantization_config": {"quant_method": "gptq"}}), REFUSED, ("vision_config",)
    ),
    "gptq-tensors-unannounced": Case(base_tensors(_unannounced_gptq), BAD_INPUT, (f"{Q}.lora_A.weight",)),
    "four-bit-says-gptq": Case(base_settings(quantization_config="gptq"), REFUSED, ("/base", "gptq"), pair="four-bit"),
    "quantization-as-a-word": Case(
        several(_fp8(torch.ones(4, 4)), base_settings(quantization_config="fp8")), BAD_INPUT, ("quantization_config",)
    ),
}

INT8: dict[str, Case] = {
    "int8-without-scales": Case(_int8(SCB=None), BAD_INPUT, (BASE_WEIGHTS, STORED_Q)),
    "int8-with-too-few-scales": Case(_int8(SCB=torch.ones(63)), BAD_INPUT, (f"{STORED_Q}.SCB", "63", "64")),
    "int8-with-too-many-scales": Case(_int8(SCB=torch.ones(65)), BAD_INPUT, (f"{STORED_Q}.SCB", "65", "64")),
    "int8-with-integer-scales": Case(
        _int8(SCB=torch.ones(64, dtype=torch.int32)), BAD_INPUT, (f"{STORED_Q}.SCB", "I32")
    ),
    "int8-in-the-order-of-turing": Case(
        _int8(weight_format=torch.tensor(2, dtype=torch.uint8)), REFUSED, (f"{STORED_Q}.weight_format", "2")
    ),
}

FP8: dict[str, Case] = {
    "fp8-without-scales": Case(_fp8(None), REFUSED, (BASE_WEIGHTS, f"{STORED_Q}.weight", "F8_E4M3")),
    "fp8-of-the-other-kind": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", lambda found: found.to(torch.float8_e5m2))),
        REFUSED,
        (BASE_WEIGHTS, f"{STORED_Q}.weight", "F8_E5M2"),
    ),
    "fp8-with-wrong-grid": Case(
        _fp8(torch.ones(2, 3), weight_block_size=[16, 16]), BAD_INPUT, (f"{STORED_Q}.weight_scale_inv", "[2, 3]", "16")
    ),
    "fp8-with-integer-scales": Case(
        _fp8(torch.ones(4, 4, dtype=torch.int32), weight_block_size=[16, 16]), BAD_INPUT, ("weight_scale_inv", "I32")
    ),
    "fp8-with-nan-scale": Case(
        _fp8(torch.full((4, 4), float("nan")), weight_block_size=[16, 16]),
        BAD_INPUT,
        (BASE_WEIGHTS, f"{STORED_Q}.weight", "nan"),
        late=True,
    ),
    "fp8-with-block-of-zero": Case(_fp8(torch.ones(4, 4), weight_block_size=[0, 16]), BAD_INPUT, (STORED_Q,)),
    "fp8-with-one-number-for-a-block": Case(
        _fp8(torch.ones(4, 4), weight_block_size=16), BAD_INPUT, ("weight_block_size",)
    ),
    "fp8-with-words-for-a-block": Case(
        _fp8(torch.ones(4, 4), weight_block_size=["a", "b"]), BAD_INPUT, ("weight_block_size",)
    ),
    "fp8-with-broken-blocks": Case(
        _fp8(torch.ones(4, 4), weight_block_size=[16.5, 16.5]), BAD_INPUT, ("weight_block_size",)
    ),
}

FOUR_BIT: dict[str, Case] = {
    "four-bit-without-absmax": Case(
        base_tensors(drop(f"{STORED_Q}.weight.absmax")),
        BAD_INPUT,
        (BASE_WEIGHTS, f"{STORED_Q}.weight.absmax", "missing"),
        pair="four-bit",
    ),
    "four-bit-with-short-absmax": Case(
        base_tensors(map_one(f"{STORED_Q}.weight.absmax", lambda found: found[:-1])),
        BAD_INPUT,
        (f"{STORED_Q}.weight.absmax", "63", "64"),
        pair="four-bit",
    ),
    "four-bit-with-short-codes": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", lambda found: found[:-1])),
        BAD_INPUT,
        (f"{STORED_Q}.weight", "2047", "2048"),
        pair="four-bit",
    ),
    "four-bit-without-map": Case(
        base_tensors(drop(f"{STORED_Q}.weight.quant_map")),
        BAD_INPUT,
        (f"{STORED_Q}.weight.quant_map",),
        pair="four-bit",
    ),
    "four-bit-without-state": Case(base_tensors(drop(QUANT_STATE)), BAD_INPUT, (STORED_Q,), pair="four-bit"),
    "four-bit-without-state-where-nothing-is-merged": Case(
        several(_without_q, base_tensors(drop(QUANT_STATE))),
        BAD_INPUT,
        (STORED_Q,),
        pair="four-bit",
    ),
    "four-bit-state-no-json": Case(
        base_tensors(put(QUANT_STATE, torch.tensor(list(b"{'quant_type'"), dtype=torch.uint8))),
        BAD_INPUT,
        (BASE_WEIGHTS, QUANT_STATE),
        pair="four-bit",
    ),
    "four-bit-state-nested-too-deep": Case(
        base_tensors(put(QUANT_STATE, torch.tensor(list(b"[" * 100_000), dtype=torch.uint8))),
        BAD_INPUT,
        (QUANT_STATE,),
        pair="four-bit",
    ),
    "four-bit-state-a-list": Case(
        base_tensors(put(QUANT_STATE, torch.tensor(list(b"[1]"), dtype=torch.uint8))),
        BAD_INPUT,
        (QUANT_STATE,),
        pair="four-bit",
    ),
    "four-bit-block-of-zero": Case(
        quant_state(lambda facts: facts.update(blocksize=0)), BAD_INPUT, (QUANT_STATE, "0"), pair="four-bit"
    ),
    "four-bit-block-infinite": Case(
        quant_state(lambda facts: facts.update(blocksize=float("inf"))), BAD_INPUT, (QUANT_STATE,), pair="four-bit"
    ),
    "four-bit-block-of-32": Case(
        quant_state(lambda facts: facts.update(blocksize=32)), BAD_INPUT, (f"{STORED_Q}.weight", "128"), pair="four-bit"
    ),
    "four-bit-unknown-type": Case(
        quant_state(lambda facts: facts.update(quant_type="nf5")), BAD_INPUT, (QUANT_STATE, "nf5"), pair="four-bit"
    ),
    "four-bit-type-is-not-its-name": Case(
        quant_state(lambda facts: facts.update(quant_type="fp4")), BAD_INPUT, (QUANT_STATE, "fp4"), pair="four-bit"
    ),
    "four-bit-shape-lies": Case(
        quant_state(lambda facts: facts.update(shape=[32, 128])), BAD_INPUT, (f"{Q}.lora_A", "128"), pair="four-bit"
    ),
    "four-bit-negative-shape": Case(
        quant_state(lambda facts: facts.update(shape=[-64, -64])), BAD_INPUT, ("-64",), pair="four-bit"
    ),
    "four-bit-negative-shape-where-nothing-is-merged": Case(
        several(_without_q, quant_state(lambda facts: facts.update(shape=[-64, -64]))),
        BAD_INPUT,
        (QUANT_STATE, "-64"),
        pair="four-bit",
    ),
    "four-bit-offset-nan": Case(
        quant_state(lambda facts: facts.update(nested_offset=float("nan"))),
        BAD_INPUT,
        (f"{STORED_Q}.weight", "nan"),
        pair="four-bit",
        late=True,
    ),
    "four-bit-without-offset": Case(
        quant_state(lambda facts: facts.pop("nested_offset")),
        BAD_INPUT,
        (QUANT_STATE, "nested_offset"),
        pair="four-bit",
    ),
}

CASES = {**VALUES, **METHODS, **INT8, **FP8, **FOUR_BIT}


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_refused_by_name(pairs: Pairs, tmp_path: Path, name: str) -> None:
    assert_refused(CASES[name], pairs, Place.below(tmp_path))
