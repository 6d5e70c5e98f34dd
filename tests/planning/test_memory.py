"""What a build takes: estimated, limited, and compared with what the kernel counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_export.cli.options import byte_count
from qlora_export.errors import EnvironmentProblem, UsageError
from qlora_export.planning.make import make_plan
from qlora_export.planning.memory import peak_memory_bytes, workers_within
from qlora_export.recipe.load import make_recipe
from qlora_export.tensors.layout import lay_out
from qlora_export.types import Part
from tests.cli.inside import inside
from tests.helpers.pico import RecipeMaker

HIDDEN, HEAD = 8192, 128
# Builds, and says how much memory the process took at its peak.
CHILD = """
import sys
from pathlib import Path
from qlora_export.engine import BuildOptions, build
from qlora_export.planning.memory import peak_memory_bytes
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe

base, out, name = sys.argv[1:]
plan = make_plan(make_recipe({"base": base, "artifacts": [{"format": name}]}, Path(), "child"), Path(out))
build(plan, Path(out), BuildOptions(workers=2))
# Not getrusage: what it tells begins with the size of the process that started this one.
(line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(line.split()[1]) * 1024, peak_memory_bytes(plan, 2))
"""


def sparse_base(folder: Path, rows: int) -> Path:
    """A Llama of one layer, with one head, whose zeros take no room on the disk."""
    stem, square = "model.layers.0", (HIDDEN, HIDDEN)
    shapes = {f"{stem}.self_attn.{name}_proj.weight": (HEAD, HIDDEN) for name in "qkv"}
    shapes |= {f"{stem}.self_attn.o_proj.weight": (HIDDEN, HEAD)}
    shapes |= {f"{stem}.mlp.{name}_proj.weight": square for name in ("gate", "up", "down")}
    shapes |= {"model.embed_tokens.weight": (rows, HIDDEN)}
    norms = ("model.norm.weight", f"{stem}.input_layernorm.weight", f"{stem}.post_attention_layernorm.weight")
    parts = [Part(name, "BF16", shape) for name, shape in shapes.items()]
    parts += [Part(name, "BF16", (HIDDEN,)) for name in norms]
    (shard,) = lay_out([[part] for part in parts], 1 << 60).shards
    folder.mkdir()
    with (folder / shard.file).open("wb") as file:
        file.write(shard.header)
        file.truncate(shard.bytes)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "vocab_size": rows,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_largest_tensor_does_not_matter(tmp_path: Path) -> None:
    """An embedding of a third of a gigabyte within the memory of a small one."""
    base = sparse_base(tmp_path / "base", 20_000)
    words = [sys.executable, "-c", CHILD, str(base), str(tmp_path / "out"), "nf4"]
    found = subprocess.run(words, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    peak, estimate = (int(word) for word in found.stdout.split())
    assert peak < 300_000_000
    assert peak < estimate * 1.15


def test_fewer_workers_run_where_that_keeps_the_limit(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    plan = make_plan(pico_recipe("nf4"), tmp_path)
    needs = [peak_memory_bytes(plan, workers) for workers in range(1, 5)]
    assert needs == sorted(needs)
    assert len(set(needs)) == 4
    assert [workers_within(plan, 4, need) for need in needs] == [1, 2, 3, 4]
    assert workers_within(plan, 4, None) == 4
    with pytest.raises(EnvironmentProblem, match=r"takes about \d+ MB of memory with one worker, --memory-limit is"):
        workers_within(plan, 4, needs[0] - 1)


def test_a_recipe_of_more_artifacts_takes_more(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    one, three = (make_plan(pico_recipe(*names), tmp_path) for names in (["nf4"], ["nf4", "bf16", "fp32"]))
    assert peak_memory_bytes(one, 2) < peak_memory_bytes(three, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("800MB", 800_000_000), ("1GiB", 1 << 30), ("1.5 GB", 1_500_000_000), ("2e9", 2_000_000_000), ("512MiB", 1 << 29)],
)
def test_bytes_as_people_write_them(text: str, expected: int) -> None:
    assert byte_count(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1.2.3GB", "1 XB", "GB"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(UsageError, match="is no number of bytes"):
        byte_count(text)


def test_the_command_refuses_before_it_writes(pico_base: Path, pico_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["build", "--base", pico_base, "--adapter", pico_adapter, "--format", "nf4", "--out", out]
    found = inside(*words, "--memory-limit", "100MB")
    assert found.returncode == 6
    assert "--memory-limit is 100 MB" in found.stderr
    assert not out.exists()


def test_a_plan_is_made_from_a_recipe_of_no_adapter(tmp_path: Path) -> None:
    base = sparse_base(tmp_path / "base", 1000)
    recipe = make_recipe({"base": str(base), "artifacts": [{"format": "bf16"}]}, Path(), "test")
    assert peak_memory_bytes(make_plan(recipe, tmp_path / "out"), 1) < 1 << 28
