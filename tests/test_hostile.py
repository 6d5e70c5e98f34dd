"""Broken and unmergeable sources: each is refused with its exit code and by name, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.inside import inside
from tests.helpers import zoo
from tests.helpers.files import edit_json, edit_tensors, folder_bytes
from tests.helpers.pico import load_qlora, save_base
from tests.processes import Finished

REFUSED, BAD_INPUT, USAGE = 4, 5, 2
CONFIG, WEIGHTS, INDEX = "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json"
BASE_WEIGHTS, BASE_INDEX, SIDECAR = "model.safetensors", "model.safetensors.index.json", "qlora_export.json"
STORED_Q = "model.layers.0.self_attn.q_proj"
Q, UP = f"base_model.model.{STORED_Q}", "base_model.model.model.layers.1.mlp.up_proj"
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
QUANT_STATE = f"{STORED_Q}.weight.quant_state.bitsandbytes__nf4"
EXPERTS = "base_model.model.model.layers.0.mlp.experts"
HUGE = 10**400
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """A base and an adapter that a case may break, and where the command is told to write."""

    base: Path
    adapter: Path
    out: Path

    @property
    def weights(self) -> Path:
        """The adapter's weights."""
        return self.adapter / WEIGHTS

    @property
    def base_weights(self) -> Path:
        """The base's weights."""
        return self.base / BASE_WEIGHTS

    @property
    def mark(self) -> Path:
        """A file that only code of a source would write."""
        return self.out.parent / "executed"


Breaker = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """What is broken in which pair, the exit code, and what the message must hold; `late` means while reading."""

    breaks: Breaker
    code: int
    says: tuple[str, ...]
    pair: str = "pico"
    recorded: bool = False
    late: bool = False


def settings(**changes: Any) -> Breaker:
    """Change keys of adapter_config.json."""
    return lambda place: edit_json(place.adapter / CONFIG, **changes)


def base_settings(**changes: Any) -> Breaker:
    """Change keys of config.json."""
    return lambda place: edit_json(place.base / "config.json", **changes)


def tensors(change: Callable[[Tensors], object]) -> Breaker:
    """Change the adapter's tensors."""
    return lambda place: edit_tensors(place.weights, lambda found: _discard(change(found)))


def base_tensors(change: Callable[[Tensors], object]) -> Breaker:
    """Change the base's tensors."""
    return lambda place: edit_tensors(place.base_weights, lambda found: _discard(change(found)))


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    """Put a tensor in, or another in its place."""
    return lambda found: found.update({name: tensor})


def map_one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    """Replace a tensor by what a function makes of it."""
    return lambda found: found.update({name: change(found[name]).contiguous()})


def several_changes(*changes: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    """All of these, in order."""
    return lambda found: [change(found) for change in changes]


def drop(*parts: str) -> Callable[[Tensors], object]:
    """Leave out the tensors whose name holds one of these."""
    return lambda found: [found.pop(name) for name in list(found) if any(part in name for part in parts)]


def several(*breakers: Breaker) -> Breaker:
    """All of these, in order."""
    return lambda place: [breaks(place) for breaks in breakers]


def text(name: str, content: str) -> Breaker:
    """Write a file of the adapter."""
    return lambda place: (place.adapter / name).write_text(content)


def base_text(name: str, content: str) -> Breaker:
    """Write a file of the base."""
    return lambda place: (place.base / name).write_text(content)


def remove(*names: str) -> Breaker:
    """Remove files of the adapter."""
    return lambda place: _unlink(place.adapter, names)


def base_remove(*names: str) -> Breaker:
    """Remove files of the base."""
    return lambda place: _unlink(place.base, names)


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


def linked_out(name: str, of_base: bool = False) -> Breaker:
    """Move a file out of its folder and leave a link to it."""

    def breaks(place: Place) -> None:
        path = (place.base if of_base else place.adapter) / name
        outside = place.out.parent / f"outside-{name}"
        shutil.move(path, outside)
        path.symlink_to(outside)

    return breaks


def sidecar(section: str, **changes: Any) -> Breaker:
    """Change keys in a section of the sidecar."""

    def breaks(place: Place) -> None:
        path = place.adapter / SIDECAR
        edit_json(path, **{section: {**json.loads(path.read_text())[section], **changes}})

    return breaks


def quant_state(change: Callable[[dict[str, Any]], object]) -> Breaker:
    """Change the JSON state of a 4-bit weight."""

    def edit(found: Tensors) -> None:
        facts = json.loads(bytes(found[QUANT_STATE].tolist()))
        change(facts)
        found[QUANT_STATE] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    return base_tensors(edit)


def _unlink(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink()


def _discard(_: object) -> None:
    """Nothing, so that a change may be any expression."""


def _both(name: str, other: str) -> Callable[[Tensors], object]:
    """Copy the factors of one module to another."""

    def copy(found: Tensors) -> None:
        for side in "AB":
            found[f"{other}.lora_{side}.weight"] = found[f"{name}.lora_{side}.weight"].clone()

    return copy


def _whole_shards(place: Place) -> tuple[str, str]:
    """Cut the adapter's weights into two shards without an index; their names."""
    found = load_file(place.weights)
    names = ("adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors")
    for number, name in enumerate(names):
        chosen = {key: tensor for key, tensor in found.items() if (".layers.1." in key) == bool(number)}
        save_file(chosen, place.adapter / name, metadata={"format": "pt"})
    place.weights.unlink()
    return names


def _sharded(**changes: str) -> Breaker:
    """An adapter in two shards, whose index says something else of these tensors."""

    def breaks(place: Place) -> None:
        first, second = _whole_shards(place)
        table = {key: file for file in (first, second) for key in load_file(place.adapter / file)}
        (place.adapter / INDEX).write_text(json.dumps({"weight_map": {**table, **changes}}))

    return breaks


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


def _swap(place: Place) -> None:
    for name in ("base", "adapter"):
        (place.out.parent / name).rename(place.out.parent / f"{name}-moved")
    (place.out.parent / "base-moved").rename(place.adapter)
    (place.out.parent / "adapter-moved").rename(place.base)


def _emptied(of_base: bool) -> Breaker:
    def breaks(place: Place) -> None:
        folder = place.base if of_base else place.adapter
        shutil.rmtree(folder)
        folder.mkdir()

    return breaks


def _file_instead(of_base: bool) -> Breaker:
    def breaks(place: Place) -> None:
        folder = place.base if of_base else place.adapter
        shutil.rmtree(folder)
        folder.write_text("{}")

    return breaks


def _renamed(old: str, new: str) -> Breaker:
    return lambda place: (place.adapter / old).rename(place.adapter / new)


def _base_renamed(old: str, new: str) -> Breaker:
    return lambda place: (place.base / old).rename(place.base / new)


def _pickle(place: Place) -> None:
    """The adapter's weights as a pickle that would leave a mark."""
    place.weights.unlink()
    (place.adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + bytes(place.mark) + b"'\ntR.")


def _remote_code(**changes: Any) -> Breaker:
    """A base that asks for code of its own, which would leave a mark."""

    def breaks(place: Place) -> None:
        (place.base / "configuration_evil.py").write_text(
            f"from pathlib import Path\nPath({str(place.mark)!r}).touch()\n"
            "from transformers import PretrainedConfig\nclass EvilConfig(PretrainedConfig):\n    model_type = 'evil'\n"
        )
        edit_json(
            place.base / "config.json",
            **{
                "model_type": "evil",
                "architectures": ["EvilForCausalLM"],
                "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"},
                **changes,
            },
        )

    return breaks


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


def _nan_row(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 5] = float("nan")
    return tensor


def _embedding_factors(module: str, rows: int, columns: int) -> Callable[[Tensors], object]:
    """Factors as an embedding has them."""
    made = {"A": torch.ones(4, rows), "B": torch.ones(columns, 4)}
    return lambda found: found.update({f"{module}.lora_embedding_{side}": factor for side, factor in made.items()})


def _linear_factors(module: str, rows: int, columns: int) -> Callable[[Tensors], object]:
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


def _without_q(place: Place) -> None:
    """Take q_proj out of the adapter."""
    settings(target_modules=["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])(place)
    tensors(drop("q_proj"))(place)


def _base_shard_twice(place: Place) -> None:
    first, second, *_ = _sharded_base(place)
    shutil.copy(place.base / first, place.base / second)


def _unannounced_gptq(found: Tensors) -> None:
    del found[f"{STORED_Q}.weight"]
    found[f"{STORED_Q}.qweight"] = torch.ones(8, 64, dtype=torch.int32)
    found[f"{STORED_Q}.scales"] = torch.ones(1, 64, dtype=torch.float16)


def _magnitudes(found: Tensors) -> None:
    for name in [name for name in found if name.endswith("lora_B.weight")]:
        module = name.removesuffix(".lora_B.weight")
        found[f"{module}.lora_magnitude_vector"] = torch.ones(found[name].shape[0])


UNMERGEABLE: dict[str, Case] = {
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
    "zero-b": Case(tensors(put(f"{Q}.lora_B.weight", torch.zeros(64, 4))), REFUSED, (WEIGHTS, f"{Q}.lora_B.weight")),
    "zero-a": Case(tensors(put(f"{Q}.lora_A.weight", torch.zeros(4, 64))), REFUSED, (WEIGHTS, f"{Q}.lora_A.weight")),
    "pickle": Case(_pickle, REFUSED, ("adapter_model.bin",)),
    "index-leads-out": Case(_sharded(**{f"{Q}.lora_A.weight": "../evil.safetensors"}), REFUSED, (INDEX, Q, "../evil")),
    "weights-link-out": Case(linked_out(WEIGHTS), REFUSED, (WEIGHTS, f"outside-{WEIGHTS}")),
    "config-links-out": Case(linked_out(CONFIG), REFUSED, (CONFIG,)),
    "sidecar-links-out": Case(linked_out(SIDECAR), REFUSED, (SIDECAR,), recorded=True),
    "base-config-links-out": Case(linked_out("config.json", of_base=True), REFUSED, ("base/config.json",)),
    "base-weights-link-out": Case(linked_out(BASE_WEIGHTS, of_base=True), REFUSED, (BASE_WEIGHTS, "outside")),
    "tokenizer-links-out": Case(linked_out("tokenizer.json", of_base=True), REFUSED, ("tokenizer.json", "outside")),
    "base-pickle": Case(_base_renamed(BASE_WEIGHTS, "pytorch_model.bin"), REFUSED, ("pytorch_model.bin",)),
    "base-index-leads-out": Case(_shard_is_elsewhere, REFUSED, (BASE_INDEX, "lm_head.weight", "../x")),
    "gptq": Case(base_settings(quantization_config={"quant_method": "gptq", "bits": 4}), REFUSED, ("/base", "gptq")),
    "awq": Case(base_settings(quantization_config={"quant_method": "awq", "bits": 4}), REFUSED, ("/base", "awq")),
    "compressed": Case(
        base_settings(quantization_config={"quant_method": "compressed-tensors"}), REFUSED, ("compressed-tensors",)
    ),
    "quantization-as-a-list": Case(base_settings(quantization_config=["hqq"]), REFUSED, ("/base", "hqq")),
    "nested-gptq": Case(
        base_settings(vision_config={"quantization_config": {"quant_method": "gptq"}}), REFUSED, ("vision_config",)
    ),
    "fp8-without-scales": Case(_fp8(None), REFUSED, (BASE_WEIGHTS, f"{STORED_Q}.weight", "F8_E4M3")),
    "fp8-of-the-other-kind": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", lambda found: found.to(torch.float8_e5m2))),
        REFUSED,
        (BASE_WEIGHTS, f"{STORED_Q}.weight", "F8_E5M2"),
    ),
    "float64-base": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", torch.Tensor.double)), REFUSED, (f"{STORED_Q}.weight", "F64")
    ),
    "fp4-training": Case(sidecar("quantization", quant_type="fp4"), REFUSED, ("fp4",), recorded=True),
}

CONFIGS: dict[str, Case] = {
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
    "rank-of-other-size": Case(settings(r=8), BAD_INPUT, (WEIGHTS, f"{Q}.lora_A.weight", "[4, 64]", "[8, 64]")),
    "rank-huge": Case(settings(r=HUGE), BAD_INPUT, (CONFIG, "r")),
    "rank-huge-rslora": Case(settings(r=HUGE, use_rslora=True), BAD_INPUT, (CONFIG, "r")),
    "alpha-huge": Case(settings(lora_alpha=HUGE), BAD_INPUT, ("lora_alpha",)),
    "alpha-overflows-float32": Case(settings(lora_alpha=1e308), BAD_INPUT, ("lora_alpha",)),
    "alpha-vanishes-in-float32": Case(settings(lora_alpha=1e-60), BAD_INPUT, (STORED_Q, "lora_alpha")),
    "alpha-zero": Case(settings(lora_alpha=0), BAD_INPUT, (STORED_Q, "scale", "0", "lora_alpha")),
    "alpha-nan": Case(settings(lora_alpha=float("nan")), BAD_INPUT, (STORED_Q, "scale", "nan", "lora_alpha")),
    "alpha-infinite": Case(settings(lora_alpha=float("inf")), BAD_INPUT, (STORED_Q, "scale", "inf")),
    "alpha-zero-by-pattern": Case(
        settings(alpha_pattern={"layers.0.self_attn.q_proj": 0}), BAD_INPUT, (STORED_Q, "scale", "0")
    ),
    "rank-pattern-no-regex": Case(settings(rank_pattern={"(q_proj": 4}), BAD_INPUT, (CONFIG, "'(q_proj'")),
    "rank-pattern-inner-flags": Case(settings(rank_pattern={"(?i)Q_PROJ": 4}), BAD_INPUT, (CONFIG, "(?i)Q_PROJ")),
    "alpha-pattern-no-regex": Case(settings(alpha_pattern={"*": 4}), BAD_INPUT, (CONFIG, "'*'")),
    "targets-no-regex": Case(settings(target_modules="(q_proj"), BAD_INPUT, (CONFIG, "(q_proj")),
    "exclusions-no-regex": Case(settings(exclude_modules="(q_proj"), BAD_INPUT, (CONFIG, "(q_proj")),
    "blocks-do-not-divide": Case(
        settings(use_bdlora={"nblocks": 3, "target_modules_bd_a": ["q_proj"]}), BAD_INPUT, ("3 blocks", "4", STORED_Q)
    ),
    "blocks-stored-whole": Case(
        settings(use_bdlora={"nblocks": 2, "target_modules_bd_b": ["q_proj"]}),
        BAD_INPUT,
        (WEIGHTS, f"{Q}.lora_B.weight", "[64, 4]", "[64, 2]"),
    ),
    "blocks-no-settings": Case(settings(use_bdlora=True), BAD_INPUT, (CONFIG, "use_bdlora")),
    "layers-as-text": Case(
        several(settings(layers_to_transform="0"), tensors(drop("0.self_attn.q_proj"))),
        BAD_INPUT,
        ("layers_to_transform",),
    ),
    "layers-denied": Case(
        settings(layers_to_transform=[0], target_modules=LINEARS),
        BAD_INPUT,
        ("layers.1.", "no module that the config targets"),
    ),
    "tensors-of-an-excluded-module": Case(settings(exclude_modules=["q_proj"]), BAD_INPUT, ("q_proj",)),
    "tensors-of-a-module-not-targeted": Case(settings(target_modules=["q_proj"]), BAD_INPUT, ("k_proj",)),
}

MODULES: dict[str, Case] = {
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
    "nan": Case(tensors(map_one(f"{Q}.lora_A.weight", _nan_row)), BAD_INPUT, (WEIGHTS, f"{Q}.lora_A.weight", "1 ")),
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
    "tokens-without-tensor": Case(
        settings(trainable_token_indices=[3, 5, 17]), BAD_INPUT, (WEIGHTS, "trainable_token")
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
    "alpha-zero-of-a-parameter": Case(
        settings(alpha_pattern={"mlp.experts.gate_up_proj": 0}),
        BAD_INPUT,
        ("gate_up_proj", "scale", "0"),
        pair="mixtral",
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
    "classifier-without-head": Case(settings(task_type="SEQ_CLS"), BAD_INPUT, (WEIGHTS, "classifier's head")),
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

FILES: dict[str, Case] = {
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
        several(
            _sharded(),
            lambda place: shutil.copy(
                place.adapter / "adapter_model-00001-of-00002.safetensors",
                place.adapter / "adapter_model-00002-of-00002.safetensors",
            ),
        ),
        BAD_INPUT,
        ("is in both", "adapter_model-00001-of-00002"),
    ),
    "adapter-shard-missing": Case(
        several(_sharded(), remove("adapter_model-00002-of-00002.safetensors")),
        BAD_INPUT,
        ("adapter_model-00002-of-00002.safetensors", "missing"),
    ),
    "adapter-index-names-what-is-not-there": Case(
        _sharded(**{f"{HEAD}.lora_A.weight": "adapter_model-00001-of-00002.safetensors"}),
        BAD_INPUT,
        (INDEX, f"{HEAD}.lora_A.weight"),
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
    "swapped": Case(_swap, BAD_INPUT, ("base/config.json", "missing")),
    "empty-base": Case(_emptied(of_base=True), BAD_INPUT, ("base/config.json", "missing")),
    "empty-adapter": Case(_emptied(of_base=False), BAD_INPUT, (f"adapter/{CONFIG}", "missing")),
    "base-is-a-file": Case(_file_instead(of_base=True), BAD_INPUT, ("/base", "folder")),
    "adapter-is-a-file": Case(_file_instead(of_base=False), BAD_INPUT, ("/adapter", "folder")),
    "no-base": Case(lambda place: shutil.rmtree(place.base), BAD_INPUT, ("/base", "no such folder")),
    "out-is-in-the-adapter": Case(
        lambda place: place.out.symlink_to(place.adapter, target_is_directory=True), USAGE, ("lies in the source",)
    ),
}

BASES: dict[str, Case] = {
    "nan-in-the-base": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", _nan_row)),
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
    "unknown-model-and-names": Case(
        several(
            base_settings(model_type="evil"),
            base_tensors(lambda found: [found.update({f"other.{name}": found.pop(name)}) for name in list(found)]),
        ),
        BAD_INPUT,
        ("config.json", "evil"),
    ),
    "unknown-model": Case(base_settings(model_type="evil"), BAD_INPUT, ("config.json", "evil")),
    "no-model-type": Case(base_text("config.json", "{}"), BAD_INPUT, ("config.json", "model_type")),
    "remote-code": Case(_remote_code(), BAD_INPUT, ("config.json", "custom code")),
    "remote-code-and-other-names": Case(
        several(
            _remote_code(),
            base_tensors(lambda found: [found.update({f"other.{name}": found.pop(name)}) for name in list(found)]),
        ),
        BAD_INPUT,
        ("config.json", "custom code"),
    ),
    "layer-of-the-base-missing": Case(base_settings(num_hidden_layers=3), BAD_INPUT, ("layers.2",)),
    "norm-of-the-base-missing": Case(base_tensors(drop("model.norm.weight")), BAD_INPUT, ("model.norm.weight",)),
    "config-of-another-size": Case(base_settings(vocab_size=4096), BAD_INPUT, ("embed_tokens", "4096", "2048")),
    "gptq-tensors-unannounced": Case(base_tensors(_unannounced_gptq), BAD_INPUT, (f"{Q}.lora_A.weight",)),
    "integers-without-scales": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", torch.Tensor.char)), REFUSED, (BASE_WEIGHTS, STORED_Q, "I8")
    ),
    "bytes-without-scales": Case(
        base_tensors(map_one(f"{STORED_Q}.weight", torch.Tensor.byte)), REFUSED, (BASE_WEIGHTS, STORED_Q, "U8")
    ),
    "int8-without-scales": Case(_int8(SCB=None), BAD_INPUT, (BASE_WEIGHTS, STORED_Q)),
    "int8-with-too-few-scales": Case(_int8(SCB=torch.ones(63)), BAD_INPUT, (f"{STORED_Q}.SCB", "63", "64")),
    "int8-with-too-many-scales": Case(_int8(SCB=torch.ones(65)), BAD_INPUT, (f"{STORED_Q}.SCB", "65", "64")),
    "int8-with-integer-scales": Case(
        _int8(SCB=torch.ones(64, dtype=torch.int32)), BAD_INPUT, (f"{STORED_Q}.SCB", "I32")
    ),
    "int8-in-the-order-of-turing": Case(
        _int8(weight_format=torch.tensor(2, dtype=torch.uint8)), REFUSED, (f"{STORED_Q}.weight_format", "2")
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
    "quantization-as-a-word": Case(
        several(_fp8(torch.ones(4, 4)), base_settings(quantization_config="fp8")), BAD_INPUT, ("quantization_config",)
    ),
    "dtype-as-a-list": Case(base_settings(dtype=["bfloat16"]), BAD_INPUT, ("config.json", "dtype")),
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
    "four-bit-says-gptq": Case(base_settings(quantization_config="gptq"), REFUSED, ("/base", "gptq"), pair="four-bit"),
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

CASES = {**UNMERGEABLE, **CONFIGS, **MODULES, **FILES, **BASES}
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


@pytest.fixture(scope="session")
def pairs(
    tmp_path_factory: pytest.TempPathFactory, pico_base: Path, pico_adapter: Path
) -> Callable[[str], tuple[Path, Path]]:
    """A sound base and a sound adapter by name, each made once."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {"pico": (pico_base, pico_adapter)}
    kinds = {
        "mixtral": ("mixtral", "parameters"),
        "classifier": ("llama_classifier", "lora"),
        "multimodal": ("gemma3_multimodal", "lora"),
        "qwen2": ("qwen2", "lora"),
        "tied-embedding": ("qwen3", "embedding_tied"),
        "gpt2": ("gpt2", "lora"),
    }

    def pair(name: str) -> tuple[Path, Path]:
        if name in made:
            return made[name]
        base = folder / name / "base"
        if name == "four-bit":
            load_qlora(pico_base).save_pretrained(base)
            made[name] = (base, pico_adapter)
        else:
            architecture, variant = kinds[name]
            zoo.save_architecture(architecture, base, seed=3)
            made[name] = (base, zoo.save_variant(base, architecture, variant, folder / name / "adapter", seed=4))
        return made[name]

    return pair


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Where a case is built."""
    return Place(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def lay_out_pair(place: Place, pair: tuple[Path, Path], recorded: bool) -> None:
    """Copy a sound pair; without its record the base may be broken and the sidecar does not notice."""
    for source, target in zip(pair, (place.base, place.adapter), strict=True):
        shutil.copytree(source, target)
    if not recorded:
        (place.adapter / SIDECAR).unlink(missing_ok=True)


def build(place: Place, form: str = "bf16") -> Finished:
    """`qlora-export build`, run in this process."""
    sources = ["--base", place.base, "--adapter", place.adapter]
    return inside("build", *sources, "--format", form, "--onto", "original", "--out", place.out)


@pytest.mark.parametrize(
    "pair", ["pico", "four-bit", "mixtral", "classifier", "multimodal", "qwen2", "gpt2", "tied-embedding"]
)
def test_every_pair_is_sound_before_it_is_broken(
    pairs: Callable[[str], tuple[Path, Path]], place: Place, pair: str
) -> None:
    lay_out_pair(place, pairs(pair), recorded=False)
    assert build(place).returncode == 0
    assert (place.out / "bf16/manifest.json").exists()


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_refused_by_name(
    pairs: Callable[[str], tuple[Path, Path]],
    place: Place,
    name: str,
) -> None:
    case = CASES[name]
    lay_out_pair(place, pairs(case.pair), case.recorded)
    case.breaks(place)
    before = [folder_bytes(folder) for folder in (place.base, place.adapter)]
    found = build(place)
    assert found.returncode == case.code, found.stderr
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert "Traceback" not in found.stderr
    for words in case.says:
        assert words in found.stderr
    assert [folder_bytes(folder) for folder in (place.base, place.adapter)] == before
    assert not place.mark.exists()
    if case.late:
        assert not (place.out / "bf16").exists()
        assert not list(place.out.rglob("manifest.json"))
    elif not place.out.is_symlink():
        assert not place.out.exists()


@pytest.mark.parametrize("name", LIVE)
def test_what_peft_saves_is_merged_as_it_runs_or_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
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
