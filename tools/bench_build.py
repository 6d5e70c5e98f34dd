"""Measure a build against the disk and against peft, side by side on a model this tool makes.

    python tools/bench_build.py [--weights 1.2e9] [--json] [--work FOLDER]

Every row is a whole process on a warm page cache: `cat` reads the base, `cp` copies it with fsync, `qlora-export build`
makes one format (or three in one pass), peft loads, merges and saves. Ratios are what counts on a shared machine;
seconds are there to see how long one must wait. Resident memory is the peak that the kernel reports for the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qlora_export.contracts import Part, Piece
from qlora_export.tensors.layout import Layout, lay_out
from qlora_export.tensors.writing import ShardWriter

PEFT_MERGE = """
import sys, torch, transformers, peft
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@dataclass(frozen=True)
class Shape:
    """A Llama of these sizes."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] of the linear layers of one block."""
        key_value = self.hidden // 4
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
    shape = Shape(hidden, hidden * 4, 1, 32000 if hidden > 256 else 2048, hidden // 64)
    per_layer = Shape(hidden, hidden * 4, 2, shape.vocabulary, shape.heads).weights - shape.weights
    layers = max(1, round((weights - shape.weights) / per_layer) + 1)
    return Shape(hidden, hidden * 4, layers, shape.vocabulary, shape.heads)


def make_base(folder: Path, shape: Shape) -> None:
    """Write a base of random bf16 weights in shards of about 1 GB."""
    parts = [Part("model.embed_tokens.weight", "BF16", (shape.vocabulary, shape.hidden))]
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}"
        parts += [Part(f"{stem}.{name}.weight", "BF16", size) for name, size in shape.linears.items()]
        parts += [
            Part(f"{stem}.{name}.weight", "BF16", (shape.hidden,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    parts.append(Part("model.norm.weight", "BF16", (shape.hidden,)))
    write(folder, lay_out([[part] for part in parts], 1_000_000_000), seed=1)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // 4,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


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
    if (index := layout.index()) is not None:
        (folder / "model.safetensors.index.json").write_bytes(index)


@dataclass(frozen=True)
class Cost:
    """Wall seconds and peak resident bytes of a process."""

    seconds: float
    resident_bytes: int


def cost(words: list[str]) -> Cost:
    """Run a process and measure it."""
    started = time.perf_counter()
    silence = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    pid = os.posix_spawn(words[0], words, os.environ, file_actions=silence)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)}: ended with status {status}")
    return Cost(time.perf_counter() - started, usage.ru_maxrss * 1024)


def build_words(work: Path, formats: list[str], out: Path) -> list[str]:
    """The command line of a build."""
    words = [sys.executable, "-m", "qlora_export", "build", "--out", str(out)]
    words += ["--base", str(work / "base"), "--adapter", str(work / "adapter")]
    return words + [word for name in formats for word in ("--format", name)]


def measure(work: Path, with_peft: bool) -> dict[str, Cost]:
    """All rows, in the order of the table."""
    shell = shutil.which("sh") or "/bin/sh"
    base, copy, out = work / "base", work / "copy", work / "out"
    cost([shell, "-c", f"cat {base}/*.safetensors > /dev/null"])
    rows = {"cat": cost([shell, "-c", f"cat {base}/*.safetensors > /dev/null"])}
    rows["cp"] = cost([shell, "-c", f"cp -r {base} {copy} && sync {copy}/*"])
    shutil.rmtree(copy)
    for name, formats in {"bf16": ["bf16"], "nf4": ["nf4"], "three formats": ["bf16", "nf4", "nf4-adapter"]}.items():
        rows[name] = cost(build_words(work, formats, out))
        shutil.rmtree(out)
    if with_peft:
        rows["peft"] = cost([sys.executable, "-c", PEFT_MERGE, str(base), str(work / "adapter"), str(out)])
        shutil.rmtree(out)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=1.2e9)
    parser.add_argument("--work", type=Path, help="folder for the model and outputs [default: a temporary one]")
    parser.add_argument("--dora", action="store_true", help="a DoRA adapter instead of a plain one")
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape = shape_of(options.weights)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        make_base(work / "base", shape)
        make_adapter(work / "adapter", shape, options.dora)
        rows = measure(work, options.peft)
    ratios = {f"{name}_to_cp": rows[name].seconds / rows["cp"].seconds for name in ("bf16", "nf4", "three formats")}
    if "peft" in rows:
        ratios["speedup_over_peft"] = rows["peft"].seconds / rows["nf4"].seconds
        ratios["memory_vs_peft"] = rows["nf4"].resident_bytes / rows["peft"].resident_bytes
    if options.json:
        data = {"weights": shape.weights, "rows": {k: asdict(v) for k, v in rows.items()}, "ratios": ratios}
        print(json.dumps(data, indent=2))
        return
    print(f"{shape.weights / 1e9:.2f} B weights, {shape.layers} layers, rank-16 adapter on all linear layers")
    for label, row in rows.items():
        print(f"{label:<14} {row.seconds:7.1f} s {row.resident_bytes / 1e6:9.0f} MB")
    for label, ratio in ratios.items():
        print(f"{label:<24} {ratio:6.2f}")


if __name__ == "__main__":
    main()
