from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_export.cli.recipe_template import PLACEHOLDER
from qlora_export.recipe.load import load_recipe
from tests.cli.inside import inside
from tests.cli.test_cli import started
from tests.helpers.files import edit_json

COMMIT = "4e20de362430cd3b72f300e6b0f18e50e7166e08"


@pytest.fixture
def workplace(pico_base: Path, pico_adapter: Path, tmp_path: Path) -> Path:
    """A folder with a base, an adapter of it that knows its Hub id, and a text."""
    shutil.copytree(pico_base, tmp_path / "models/base")
    shutil.copytree(pico_adapter, tmp_path / "runs/7")
    edit_json(tmp_path / "runs/7/adapter_config.json", base_model_name_or_path="acme/pico")
    (tmp_path / "holdout.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "release").mkdir()
    return tmp_path


FLAGS = ["--base", "models/base", "--adapter", "runs/7"]


def test_the_recipe_loads_and_plans_from_where_it_lies(workplace: Path) -> None:
    words = [*FLAGS, "--to", "hub:acme/bot-{name}", "--text", "holdout.jsonl", "--out", "release/recipe.yaml"]
    found = started("init", *words, cwd=workplace)
    assert found.returncode == 0, found.stderr
    assert "release/recipe.yaml" in found.stdout
    recipe = load_recipe(workplace / "release/recipe.yaml")
    assert (recipe.base, recipe.adapter, recipe.base_id) == ("../models/base", "../runs/7", "acme/pico")
    assert [item.format for item in recipe.artifacts] == ["bf16", "nf4-adapter"]
    assert recipe.drift is not None
    assert recipe.drift.text == "../holdout.jsonl"
    assert recipe.publish is not None
    assert (recipe.publish.to, recipe.publish.visibility) == ("hub:acme/bot-{name}", "private")
    planned = inside("plan", "release/recipe.yaml", "--json", cwd=workplace)
    assert planned.returncode == 0, planned.stderr
    assert [item["name"] for item in json.loads(planned.stdout)["artifacts"]] == ["bf16", "nf4-adapter"]


def test_nothing_is_overwritten(workplace: Path) -> None:
    (workplace / "recipe.yaml").write_text("mine")
    found = inside("init", *FLAGS, cwd=workplace)
    assert found.returncode == 2
    assert "recipe.yaml: exists" in found.stderr
    assert (workplace / "recipe.yaml").read_text() == "mine"
    assert inside("init", *FLAGS, "--out", "nowhere/recipe.yaml", cwd=workplace).returncode == 2


def test_what_is_not_known_is_a_marked_placeholder(workplace: Path) -> None:
    found = inside("init", *FLAGS, "--out", "-", cwd=workplace)
    assert found.returncode == 0, found.stderr
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("  text:")]
    assert f"text: {PLACEHOLDER}" in line
    assert "<- REPLACE" in line
    (workplace / "recipe.yaml").write_text(found.stdout)
    recipe = load_recipe(workplace / "recipe.yaml")
    assert recipe.publish is None
    assert recipe.base == "models/base"
    checked = inside("check", "recipe.yaml", cwd=workplace)
    assert checked.returncode == 5
    assert PLACEHOLDER in checked.stderr


def test_every_commented_key_is_one_that_recipes_have(workplace: Path) -> None:
    text = inside("init", *FLAGS, "--out", "-", cwd=workplace).stdout
    keys = ("publish:", "  to:", "  visibility:", "  as:", "  version:", "  card:", "  tokens:", "  window_tokens:")
    lines = []
    for line in text.splitlines():
        bare = line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line.replace("#   ", "  ", 1)
        lines.append(bare if bare.startswith((*keys, "  - format", "training_quantization")) else line)
    (workplace / "recipe.yaml").write_text("\n".join(lines))
    recipe = load_recipe(workplace / "recipe.yaml")
    assert recipe.publish is not None
    assert (recipe.publish.version, recipe.publish.card.license) == ("v1", "apache-2.0")
    assert recipe.drift is not None
    assert recipe.drift.tokens == 20000
    assert len(recipe.artifacts) == 5


def test_the_base_is_the_one_that_the_adapter_names(workplace: Path) -> None:
    edit_json(workplace / "runs/7/adapter_config.json", revision=COMMIT)
    found = inside("init", "--adapter", "runs/7", "--out", "-", cwd=workplace)
    assert found.returncode == 0, found.stderr
    assert f"\nbase: acme/pico@{COMMIT}\n" in found.stdout
    assert "base_id:" not in found.stdout
    edit_json(workplace / "runs/7/adapter_config.json", revision=None)
    assert "not pinned yet" in inside("init", "--adapter", "runs/7", "--out", "-", cwd=workplace).stdout
    edit_json(workplace / "runs/7/adapter_config.json", base_model_name_or_path="/gone/base")
    found = inside("init", "--adapter", "runs/7", "--out", "-", cwd=workplace)
    assert found.returncode == 5
    assert "'/gone/base' is no folder here" in found.stderr


def test_training_that_nobody_recorded_is_said_and_a_model_alone_is_released(workplace: Path) -> None:
    (workplace / "runs/7/qlora_export.json").unlink()
    found = inside("init", *FLAGS, "--out", "-", cwd=workplace).stdout
    assert "# training_quantization: nf4" in found
    edit_json(workplace / "models/base/config.json", dtype="float16")
    found = inside("init", "--base", "models/base", "--out", "-", cwd=workplace).stdout
    (workplace / "recipe.yaml").write_text(found)
    recipe = load_recipe(workplace / "recipe.yaml")
    assert recipe.adapter is None
    assert [item.format for item in recipe.artifacts] == ["fp16"]


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        ([], 2, "no base"),
        (["--base", "nowhere/at/all"], 5, "nowhere/at/all"),
        (["--base", "models/base", "--adapter", "holdout.jsonl"], 5, "holdout.jsonl"),
        (["--base", "models/base", "--to", "ftp:acme"], 2, "is no destination"),
    ],
)
def test_what_cannot_begin_a_recipe(workplace: Path, flags: list[str], code: int, says: str) -> None:
    found = inside("init", *flags, cwd=workplace)
    assert found.returncode == code, found.stderr
    assert says in found.stderr
    assert not (workplace / "recipe.yaml").exists()
