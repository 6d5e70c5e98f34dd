"""Bases that are broken: their files, their config and what transformers makes of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.files import edit_json
from tests.helpers.hostile import (
    BAD_INPUT,
    BASE_INDEX,
    BASE_WEIGHTS,
    REFUSED,
    Case,
    Pairs,
    Place,
    Tensors,
    assert_refused,
    base_remove,
    base_settings,
    base_tensors,
    base_text,
    drop,
    emptied,
    file_instead,
    linked_out,
    several,
)
from tests.helpers.pico import save_base


def _sharded_base(place: Place) -> list[str]:
    """The base in many shards; their names."""
    place.base_weights.unlink()
    save_base(place.base, seed=1, shard="100KB")
    return sorted(path.name for path in place.base.glob("*.safetensors"))


def _shard_is_missing(place: Place) -> None:
    (place.base / _sharded_base(place)[1]).unlink()


def _shard_is_elsewhere(place: Place) -> None:
    _sharded_base(place)
    path = place.base / BASE_INDEX
    table = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map={**table, "lm_head.weight": "../x.safetensors"})


def _base_shard_twice(place: Place) -> None:
    first, second, *_ = _sharded_base(place)
    shutil.copy(place.base / first, place.base / second)


def _rename_tensors(found: Tensors) -> None:
    for name in list(found):
        found[f"other.{name}"] = found.pop(name)


def _remote_code(place: Place) -> None:
    """A base that asks for code of its own, which would leave a mark."""
    (place.base / "configuration_evil.py").write_text(
        f"from pathlib import Path\nPath({str(place.mark)!r}).touch()\n"
        "from transformers import PretrainedConfig\nclass EvilConfig(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    edit_json(
        place.base / "config.json",
        model_type="evil",
        architectures=["EvilForCausalLM"],
        auto_map={"AutoConfig": "configuration_evil.EvilConfig"},
    )


FILES: dict[str, Case] = {
    "base-config-links-out": Case(linked_out("config.json", of_base=True), REFUSED, ("base/config.json",)),
    "base-weights-link-out": Case(linked_out(BASE_WEIGHTS, of_base=True), REFUSED, (BASE_WEIGHTS, "outside")),
    "tokenizer-links-out": Case(linked_out("tokenizer.json", of_base=True), REFUSED, ("tokenizer.json", "outside")),
    "base-pickle": Case(
        lambda place: place.base_weights.rename(place.base / "pytorch_model.bin"), REFUSED, ("pytorch_model.bin",)
    ),
    "base-index-leads-out": Case(_shard_is_elsewhere, REFUSED, (BASE_INDEX, "lm_head.weight", "../x")),
    "base-header-lies": Case(
        lambda place: place.base_weights.write_bytes(b"\xff" * 8 + place.base_weights.read_bytes()[8:]),
        BAD_INPUT,
        (f"base/{BASE_WEIGHTS}", str(2**64 - 1)),
    ),
    "base-tensor-in-two-shards": Case(_base_shard_twice, BAD_INPUT, ("/base", "is in both", "model-00001-of-")),
    "base-config-missing": Case(base_remove("config.json"), BAD_INPUT, ("config.json", "missing")),
    "base-config-no-json": Case(base_text("config.json", "{"), BAD_INPUT, ("base/config.json", "JSON")),
    "base-weights-missing": Case(base_remove(BASE_WEIGHTS), BAD_INPUT, ("/base", BASE_WEIGHTS)),
    "base-truncated": Case(
        lambda place: os.truncate(place.base_weights, place.base_weights.stat().st_size // 2),
        BAD_INPUT,
        (BASE_WEIGHTS,),
    ),
    "base-shard-missing": Case(_shard_is_missing, BAD_INPUT, ("model-00002-of-", "missing")),
    "base-one-file-and-index": Case(
        base_text(BASE_INDEX, json.dumps({"weight_map": {"lm_head.weight": BASE_WEIGHTS}})),
        BAD_INPUT,
        (BASE_WEIGHTS, BASE_INDEX),
    ),
    "empty-base": Case(emptied(of_base=True), BAD_INPUT, ("base/config.json", "missing")),
    "base-is-a-file": Case(file_instead(of_base=True), BAD_INPUT, ("/base", "folder")),
    "no-base": Case(lambda place: shutil.rmtree(place.base), BAD_INPUT, ("/base", "no such folder")),
}

MODELS: dict[str, Case] = {
    "unknown-model-and-names": Case(
        several(base_settings(model_type="evil"), base_tensors(_rename_tensors)), BAD_INPUT, ("config.json", "evil")
    ),
    "unknown-model": Case(base_settings(model_type="evil"), BAD_INPUT, ("config.json", "evil")),
    "no-model-type": Case(base_text("config.json", "{}"), BAD_INPUT, ("config.json", "model_type")),
    "remote-code": Case(_remote_code, BAD_INPUT, ("config.json", "custom code")),
    "remote-code-and-other-names": Case(
        several(_remote_code, base_tensors(_rename_tensors)), BAD_INPUT, ("config.json", "custom code")
    ),
    "layer-of-the-base-missing": Case(base_settings(num_hidden_layers=3), BAD_INPUT, ("layers.2",)),
    "norm-of-the-base-missing": Case(base_tensors(drop("model.norm.weight")), BAD_INPUT, ("model.norm.weight",)),
    "config-of-another-size": Case(base_settings(vocab_size=4096), BAD_INPUT, ("embed_tokens", "4096", "2048")),
    "expert-missing": Case(
        base_tensors(drop("layers.0.block_sparse_moe.experts.1.w1", "layers.0.mlp.experts.1.w1")),
        BAD_INPUT,
        ("experts",),
        pair="mixtral",
    ),
    "architecture-no-model": Case(
        base_settings(architectures=["GenerationConfig"]), REFUSED, ("GenerationConfig",), pair="mixtral"
    ),
    "architecture-a-number": Case(base_settings(architectures=7), BAD_INPUT, ("architectures",), pair="mixtral"),
}

CASES = {**FILES, **MODELS}


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_refused_by_name(pairs: Pairs, tmp_path: Path, name: str) -> None:
    assert_refused(CASES[name], pairs, Place.below(tmp_path))
