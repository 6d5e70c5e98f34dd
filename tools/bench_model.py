"""Models to measure on: a Llama of random bf16 weights of any size, and a random adapter on all its linear layers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qlora_export.tensors.layout import Layout, lay_out
from qlora_export.tensors.writing import ShardWriter
from qlora_export.types import Part, Piece


@dataclass(frozen=True)
class Shape:
    """A Llama of these sizes."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    key_value_heads: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] of the linear layers of one block."""
        key_value = self.hidden // self.heads * self.key_value_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def weights(self) -> int:
        """Number of weights."""
        block = sum(rows * columns for rows, columns in self.linears.values()) + 2 * self.hidden
        return self.layers * block + self.vocabulary * self.hidden + self.hidden


def shape_of(weights: float) -> Shape:
    """A shape of about this many weights, with the proportions of Llama-3.2-1B from 0.3 B on."""
    hidden = 2048 if weights >= 3e8 else 256
    heads = hidden // 64
    shape = Shape(hidden, hidden * 4, 1, 32000 if hidden > 256 else 2048, heads, heads // 4)
    per_layer = replace(shape, layers=2).weights - shape.weights
    return replace(shape, layers=max(1, round((weights - shape.weights) / per_layer) + 1))


def make_base(folder: Path, shape: Shape) -> None:
    """Write a base of random bf16 weights in shards of about 1 GB."""
    layout = base_layout(shape, 1_000_000_000)
    write(folder, layout, seed=1)
    describe(folder, shape, layout)


def make_sparse_base(folder: Path, shape: Shape) -> None:
    """Lay out a base of zeros in shards of about 5 GB that take no room on the disk."""
    layout = base_layout(shape, 5_000_000_000)
    folder.mkdir(parents=True)
    for shard in layout.shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.bytes)
    describe(folder, shape, layout)


def base_layout(shape: Shape, shard_bytes: int) -> Layout:
    """Where the tensors of a base lie."""
    parts = [Part("model.embed_tokens.weight", "BF16", (shape.vocabulary, shape.hidden))]
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}"
        parts += [Part(f"{stem}.{name}.weight", "BF16", size) for name, size in shape.linears.items()]
        parts += [
            Part(f"{stem}.{name}.weight", "BF16", (shape.hidden,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    parts.append(Part("model.norm.weight", "BF16", (shape.hidden,)))
    return lay_out([[part] for part in parts], shard_bytes)


def describe(folder: Path, shape: Shape, layout: Layout) -> None:
    """Write config and index."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    if (index := layout.index()) is not None:
        (folder / "model.safetensors.index.json").write_bytes(index)


def make_adapter(folder: Path, shape: Shape, dora: bool, rank: int = 16) -> None:
    """Write a random rank-16 adapter on all linear layers, with magnitudes for DoRA."""
    parts = []
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.linears.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            parts.append(Part(f"{stem}.lora_A.weight", "BF16", (rank, columns)))
            parts.append(Part(f"{stem}.lora_B.weight", "BF16", (rows, rank)))
            if dora:
                parts.append(Part(f"{stem}.lora_magnitude_vector", "BF16", (rows,)))
    write(folder, lay_out([[part] for part in parts], 1 << 60), seed=2)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    names = [name.rpartition(".")[2] for name in shape.linears]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "target_modules": names}
    config["use_dora"] = dora
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write(folder: Path, layout: Layout, seed: int) -> None:
    """Fill every place of a layout with random bf16 values of about 0.02."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pool = (rng.standard_normal(1 << 22).astype(np.float32) * 0.02).view(np.uint32) >> 16
    pool16 = pool.astype(np.uint16)
    with ShardWriter(folder, layout) as writer:
        for name, place in layout.places.items():
            for offset in range(0, place.bytes, pool16.nbytes):
                start = int(rng.integers(0, 1 << 20))
                count = min(pool16.nbytes, place.bytes - offset) // 2
                values = np.roll(pool16, start)[:count]
                writer.write(Piece(name, offset, values.view(np.uint8)))
