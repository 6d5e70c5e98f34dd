"""Adapters that are broken or of a kind that cannot be merged: their files, headers, settings and sidecars."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.files import edit_json
from tests.helpers.hostile import (
    BAD_INPUT,
    CONFIG,
    HEAD,
    INDEX,
    REFUSED,
    SIDECAR,
    STORED_Q,
    USAGE,
    WEIGHTS,
    Breaker,
    Case,
    Pairs,
    Place,
    Q,
    assert_refused,
    base_tensors,
    drop,
    emptied,
    file_instead,
    linked_out,
    map_one,
    put,
    remove,
    settings,
    several,
    several_changes,
    tensors,
    text,
)

HUGE = 10**400
SHARD, OTHER_SHARD = "adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"


def header(change: Callable[[dict[str, Any]], object]) -> Breaker:
    """Change the JSON header of the adapter's weights; the data stays."""

    def breaks(place: Place) -> None:
        raw = place.weights.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        table = json.loads(raw[8 : 8 + size])
        change(table)
        encoded = json.dumps(table).encode()
        place.weights.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :])

    return breaks


def sidecar(section: str, **changes: Any) -> Breaker:
    """Change keys in a section of the sidecar."""

    def breaks(place: Place) -> None:
        path = place.adapter / SIDECAR
        edit_json(path, **{section: {**json.loads(path.read_text())[section], **changes}})

    return breaks


def _sharded(**changes: str) -> Breaker:
    """An adapter in two shards, whose index says something else of these tensors."""

    def breaks(place: Place) -> None:
        found = load_file(place.weights)
        place.weights.unlink()
        table = {key: OTHER_SHARD if ".layers.1." in key else SHARD for key in found}
        for file in (SHARD, OTHER_SHARD):
            chosen = {key: found[key] for key in found if table[key] == file}
            save_file(chosen, place.adapter / file, metadata={"format": "pt"})
        (place.adapter / INDEX).write_text(json.dumps({"weight_map": {**table, **changes}}))

    return breaks


def _swap(place: Place) -> None:
    for name in ("base", "adapter"):
        (place.out.parent / name).rename(place.out.parent / f"{name}-moved")
    (place.out.parent / "base-moved").rename(place.adapter)
    (place.out.parent / "adapter-moved").rename(place.base)


def _pickle(place: Place) -> None:
    """The adapter's weights as a pickle that would leave a mark."""
    place.weights.unlink()
    (place.adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + bytes(place.mark) + b"'\ntR.")


KINDS: dict[str, Case] = {
    "alora": Case(settings(alora_invocation_tokens=[7, 9]), REFUSED, (CONFIG, "aLoRA", "[7, 9]")),
    "arrow": Case(settings(arrow_config={"top_k": 3}), REFUSED, (CONFIG, "Arrow", "3")),
    "qalora": Case(settings(use_qalora=True, qalora_group_size=16), REFUSED, (CONFIG, "QA-LoRA")),
    "layer-replication": Case(settings(layer_replication=[[0, 2], [1, 2]]), REFUSED, (CONFIG, "[[0, 2], [1, 2]]")),
    "kasa": Case(settings(kasa_config={"beta": 0.0001}), REFUSED, (CONFIG, "KaSA", "0.0001")),
    "x-lora": Case(settings(peft_type="XLORA", adapters={"0": "a"}), REFUSED, (CONFIG, "XLORA")),
    "adalora": Case(settings(peft_type="ADALORA", init_r=12, target_r=8), REFUSED, (CONFIG, "ADALORA")),
    "adalora-as-peft-saves-it": Case(
        settings(peft_type="ADALORA", rank_pattern={f"{STORED_Q}.lora_E": [True, False]}), REFUSED, (CONFIG, "ADALORA")
    ),
    "oft-as-peft-saves-it": Case(settings(peft_type="OFT", r=0, oft_block_size=32), REFUSED, (CONFIG, "OFT")),
    "ia3": Case(text(CONFIG, json.dumps({"peft_type": "IA3", "target_modules": ["k_proj"]})), REFUSED, (CONFIG, "IA3")),
    "ia3-with-nulls": Case(settings(peft_type="IA3", r=None, lora_alpha=None), REFUSED, (CONFIG, "IA3")),
    "prompt-tuning": Case(
        several(
            text(CONFIG, json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"})),
            tensors(several_changes(dict.clear, put("prompt_embeddings", torch.ones(4, 64)))),
        ),
        REFUSED,
        (CONFIG, "PROMPT_TUNING"),
    ),
    "pissa": Case(settings(init_lora_weights="pissa_niter_16"), REFUSED, (CONFIG, "pissa_niter_16")),
    "olora": Case(settings(init_lora_weights="olora"), REFUSED, (CONFIG, "olora")),
    "corda": Case(settings(init_lora_weights="corda"), REFUSED, (CONFIG, "corda")),
    "lora-ga": Case(settings(init_lora_weights="lora_ga"), REFUSED, (CONFIG, "lora_ga")),
    "loftq": Case(settings(init_lora_weights="loftq"), REFUSED, (CONFIG, "loftq")),
    "init-of-a-later-peft": Case(settings(init_lora_weights="milora"), REFUSED, (CONFIG, "milora")),
    "unknown-setting": Case(settings(use_later_lora=True), REFUSED, (CONFIG, "use_later_lora")),
    "token-classifier": Case(settings(task_type="TOKEN_CLS"), REFUSED, (CONFIG, "TOKEN_CLS")),
}

SETTINGS: dict[str, Case] = {
    "config-missing": Case(remove(CONFIG), BAD_INPUT, (CONFIG, "missing")),
    "config-no-json": Case(text(CONFIG, "{'r': 4}"), BAD_INPUT, (CONFIG, "JSON")),
    "config-list": Case(text(CONFIG, "[1, 2]"), BAD_INPUT, (CONFIG, "list")),
    "config-nested-too-deep": Case(text(CONFIG, "[" * 100_000), BAD_INPUT, (CONFIG,)),
    "config-binary": Case(
        lambda place: (place.adapter / CONFIG).write_bytes(b"\xff\xfe\x00"), BAD_INPUT, (CONFIG, "JSON")
    ),
    "config-folder": Case(
        several(remove(CONFIG), lambda place: (place.adapter / CONFIG).mkdir()), BAD_INPUT, (CONFIG,)
    ),
    "rank-null": Case(settings(r=None), BAD_INPUT, (CONFIG, "r:")),
    "rank-negative": Case(settings(r=-4), BAD_INPUT, (CONFIG, "r:")),
    "rank-huge": Case(settings(r=HUGE), BAD_INPUT, (CONFIG, "r")),
    "rank-huge-rslora": Case(settings(r=HUGE, use_rslora=True), BAD_INPUT, (CONFIG, "r")),
    "alpha-huge": Case(settings(lora_alpha=HUGE), BAD_INPUT, ("lora_alpha",)),
    "rank-pattern-no-regex": Case(settings(rank_pattern={"(q_proj": 4}), BAD_INPUT, (CONFIG, "'(q_proj'")),
    "rank-pattern-inner-flags": Case(settings(rank_pattern={"(?i)Q_PROJ": 4}), BAD_INPUT, (CONFIG, "(?i)Q_PROJ")),
    "alpha-pattern-no-regex": Case(settings(alpha_pattern={"*": 4}), BAD_INPUT, (CONFIG, "'*'")),
    "targets-no-regex": Case(settings(target_modules="(q_proj"), BAD_INPUT, (CONFIG, "(q_proj")),
    "exclusions-no-regex": Case(settings(exclude_modules="(q_proj"), BAD_INPUT, (CONFIG, "(q_proj")),
    "blocks-no-settings": Case(settings(use_bdlora=True), BAD_INPUT, (CONFIG, "use_bdlora")),
    "layers-as-text": Case(
        several(settings(layers_to_transform="0"), tensors(drop("0.self_attn.q_proj"))),
        BAD_INPUT,
        ("layers_to_transform",),
    ),
}

FILES: dict[str, Case] = {
    "pickle": Case(_pickle, REFUSED, ("adapter_model.bin",)),
    "index-leads-out": Case(_sharded(**{f"{Q}.lora_A.weight": "../evil.safetensors"}), REFUSED, (INDEX, Q, "../evil")),
    "weights-link-out": Case(linked_out(WEIGHTS), REFUSED, (WEIGHTS, f"outside-{WEIGHTS}")),
    "config-links-out": Case(linked_out(CONFIG), REFUSED, (CONFIG,)),
    "sidecar-links-out": Case(linked_out(SIDECAR), REFUSED, (SIDECAR,), recorded=True),
    "weights-missing": Case(remove(WEIGHTS), BAD_INPUT, (WEIGHTS, "missing")),
    "weights-truncated": Case(
        lambda place: os.truncate(place.weights, place.weights.stat().st_size - 100), BAD_INPUT, (WEIGHTS, "bytes")
    ),
    "weights-empty": Case(lambda place: place.weights.write_bytes(b""), BAD_INPUT, (WEIGHTS, "0 bytes")),
    "weights-too-long": Case(
        lambda place: place.weights.write_bytes(place.weights.read_bytes() + b"x"), BAD_INPUT, (WEIGHTS, "bytes")
    ),
    "weights-link-to-themselves": Case(
        several(remove(WEIGHTS), lambda place: place.weights.symlink_to(WEIGHTS)), BAD_INPUT, (WEIGHTS, "missing")
    ),
    "header-length-lies": Case(
        lambda place: place.weights.write_bytes(struct.pack("<Q", 2**40) + place.weights.read_bytes()[8:]),
        BAD_INPUT,
        (WEIGHTS, str(2**40)),
    ),
    "header-no-json": Case(
        lambda place: place.weights.write_bytes(struct.pack("<Q", 4) + b"evil"), BAD_INPUT, (WEIGHTS, "JSON")
    ),
    "header-nested-too-deep": Case(
        lambda place: place.weights.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000), BAD_INPUT, (WEIGHTS,)
    ),
    "overlapping-tensors": Case(
        header(
            lambda table: table[f"{Q}.lora_B.weight"].update(data_offsets=table[f"{Q}.lora_A.weight"]["data_offsets"])
        ),
        BAD_INPUT,
        (WEIGHTS, f"{Q}.lora_", "byte"),
    ),
    "unknown-dtype": Case(
        header(lambda table: table[f"{Q}.lora_A.weight"].update(dtype="F4")), BAD_INPUT, (f"{Q}.lora_A.weight", "F4")
    ),
    "shape-lies": Case(
        header(lambda table: table[f"{Q}.lora_A.weight"].update(shape=[4, 65])),
        BAD_INPUT,
        (f"{Q}.lora_A.weight", "1040"),
    ),
    "negative-shape": Case(
        header(lambda table: table[f"{Q}.lora_A.weight"].update(shape=[-4, -64])), BAD_INPUT, (f"{Q}.lora_A.weight",)
    ),
    "huge-shape": Case(
        header(lambda table: table[f"{Q}.lora_A.weight"].update(shape=[10**4000, 10**4000])),
        BAD_INPUT,
        (f"{Q}.lora_A.weight",),
    ),
    "tensor-twice-in-two-shards": Case(
        several(_sharded(), lambda place: shutil.copy(place.adapter / SHARD, place.adapter / OTHER_SHARD)),
        BAD_INPUT,
        ("is in both", "adapter_model-00001-of-00002"),
    ),
    "adapter-shard-missing": Case(several(_sharded(), remove(OTHER_SHARD)), BAD_INPUT, (OTHER_SHARD, "missing")),
    "adapter-index-names-what-is-not-there": Case(
        _sharded(**{f"{HEAD}.lora_A.weight": SHARD}), BAD_INPUT, (INDEX, f"{HEAD}.lora_A.weight")
    ),
    "adapter-index-empty": Case(
        several(_sharded(), text(INDEX, json.dumps({"weight_map": {}}))), BAD_INPUT, (INDEX, "weight_map")
    ),
    "weights-are-a-folder": Case(
        several(remove(WEIGHTS), lambda place: place.weights.mkdir()), BAD_INPUT, (WEIGHTS, "folder")
    ),
    "tokenizer-is-a-folder": Case(
        lambda place: (place.adapter / "tokenizer.json").mkdir(), BAD_INPUT, ("tokenizer.json",)
    ),
    "tokenizer-links-nowhere": Case(
        lambda place: (place.adapter / "tokenizer.json").symlink_to("nowhere"), REFUSED, ("tokenizer.json",)
    ),
    "tokenizer-is-a-pipe": Case(
        lambda place: os.mkfifo(place.adapter / "tokenizer.json"), BAD_INPUT, ("tokenizer.json",)
    ),
    "config-is-a-pipe": Case(
        several(remove(CONFIG), lambda place: os.mkfifo(place.adapter / CONFIG)), BAD_INPUT, (CONFIG,)
    ),
    "swapped": Case(_swap, BAD_INPUT, ("base/config.json", "missing")),
    "empty-adapter": Case(emptied(of_base=False), BAD_INPUT, (f"adapter/{CONFIG}", "missing")),
    "adapter-is-a-file": Case(file_instead(of_base=False), BAD_INPUT, ("/adapter", "folder")),
    "out-is-in-the-adapter": Case(
        lambda place: place.out.symlink_to(place.adapter, target_is_directory=True), USAGE, ("lies in the source",)
    ),
}

SIDECARS: dict[str, Case] = {
    "fp4-training": Case(sidecar("quantization", quant_type="fp4"), REFUSED, ("fp4",), recorded=True),
    "sidecar-of-another-base": Case(
        sidecar("base", headers_sha256="0" * 64), BAD_INPUT, ("/base", "000000000000"), recorded=True
    ),
    "sidecar-modules-of-another-base": Case(
        sidecar(
            "modules", **{"model.layers.9.mlp.up_proj": {"codes_sha256": "", "absmax_sha256": "", "nested_offset": 1}}
        ),
        BAD_INPUT,
        ("/base", "model.layers.9.mlp.up_proj"),
        recorded=True,
    ),
    "sidecar-of-other-values": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", torch.Tensor.neg)),
        BAD_INPUT,
        (STORED_Q, "codes", "sha256"),
        recorded=True,
        late=True,
    ),
    "sidecar-of-a-later-schema": Case(text(SIDECAR, '{"schema": 2}'), BAD_INPUT, (SIDECAR, "2"), recorded=True),
    "sidecar-no-json": Case(text(SIDECAR, "{"), BAD_INPUT, (SIDECAR, "JSON"), recorded=True),
    "sidecar-block-of-zero": Case(sidecar("quantization", block_size=0), BAD_INPUT, (SIDECAR, "0"), recorded=True),
    "sidecar-block-infinite": Case(
        sidecar("quantization", block_size=float("inf")), BAD_INPUT, (SIDECAR,), recorded=True
    ),
    "sidecar-module-a-word": Case(sidecar("modules", **{STORED_Q: "evil"}), BAD_INPUT, (SIDECAR,), recorded=True),
}

CASES = {**KINDS, **SETTINGS, **FILES, **SIDECARS}


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_refused_by_name(pairs: Pairs, tmp_path: Path, name: str) -> None:
    assert_refused(CASES[name], pairs, Place.below(tmp_path))
