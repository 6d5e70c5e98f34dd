from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_export.errors import InputError, UsageError
from qlora_export.recipe.config import Limits
from qlora_export.recipe.load import load_recipe

GOOD: dict[str, Any] = {"base": "base", "adapter": "runs/7", "artifacts": [{"format": "bf16"}]}


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe.path(recipe.base) == tmp_path / "base"
    assert recipe.path("/absolute") == Path("/absolute")
    assert recipe.artifacts[0].name == "bf16"
    assert recipe.onto(recipe.artifacts[0]) == "as-trained"


def test_the_digest_is_of_facts_not_of_text(tmp_path: Path) -> None:
    one = load_recipe(write(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text("# a comment\nadapter: runs/7\nartifacts: [{format: bf16}]\nbase: base\n")
    assert load_recipe(other / "recipe.yaml").digest == one.digest
    assert load_recipe(write(tmp_path, merge={"onto": "original"})).digest != one.digest


@pytest.mark.parametrize(
    ("changes", "says", "hint"),
    [
        ({"artefacts": []}, "unknown key artefacts", "did you mean artifacts?"),
        ({"drift": {"text": "x", "limit": {}}}, "unknown key drift.limit", "did you mean limits?"),
        ({"drift": {"text": "x", "limits": {"mean_kll": 1}}}, "unknown key drift.limits.mean_kll", "mean_kl?"),
        ({"artifacts": [{"format": "bf16", "expct": "fail"}]}, "unknown key artifacts.0.expct", "expect?"),
        ({"artifacts": [{"format": "nf5"}]}, "unknown format 'nf5'", "did you mean nf4"),
        ({"artifacts": [{"format": "zzz"}]}, "unknown format 'zzz'", "known: fp32"),
        ({"artifacts": []}, "artifacts:", ""),
        ({"merge": {"onto": "trained"}}, "merge.onto:", ""),
        ({"artifacts": [{"format": "nf4"}, {"format": "nf4"}]}, "two artifacts are called 'nf4'", ""),
        ({"artifacts": [{"format": "nf4", "name": "../up"}]}, "cannot be the name of a folder", ""),
        ({"artifacts": [{"format": "nf4", "name": "a.partial"}]}, "cannot be the name of a folder", ""),
        ({"drift": {"text": "x", "limits": {"same_top1": 2}}}, "drift.limits.same_top1:", ""),
        ({"zzzzzz": 1}, "unknown key zzzzzz", "known keys: base"),
        ({"adapter": None}, "adapter is empty", "leave the key out"),
        ({"adapter": ""}, "adapter:", ""),
        ({"publish": {"to": "ftp:x"}}, "'ftp:x' is no destination", ""),
        ({"publish": {"to": "folder:x", "version": "v1.partial"}}, "'v1.partial' cannot be a version", ""),
        ({"publish": {"to": "folder:x", "version": "Latest"}}, "'Latest' cannot be a version", ""),
        ({"publish": {"to": "folder:x", "version": "v1.receipt.json"}}, "cannot be a version", ""),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, changes: dict[str, Any], says: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(write(tmp_path, **changes))
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_all_wrong_keys_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: x\nbas: y\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    for says in ("artifacts is missing", "unknown key bas"):
        assert says in caught.value.message


@pytest.mark.parametrize("content", ["a: [", "- 1", "", "\x00"])
def test_no_mapping(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UsageError, match="recipe.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


def test_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe(tmp_path / "recipe.yaml")


def test_stated_limits_win_and_null_switches_off() -> None:
    defaults = Limits(mean_kl=0.05, same_top1=0.95)
    stated = Limits.model_validate({"mean_kl": 0.1, "same_top1": None})
    assert stated.over(defaults) == Limits(mean_kl=0.1, same_top1=None)
    assert Limits().over(defaults) == defaults
