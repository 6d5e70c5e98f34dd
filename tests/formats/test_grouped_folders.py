"""Folders whose layers need whole blocks or groups: they load in plain transformers, and hold what they decode to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.loading import decompress, load_model
from qlora_export.runtimes.registry import load_runtime
from tests.formats.test_folders import TOKENS, decoded
from tests.helpers.files import folder_bytes
from tests.helpers.pico import save_adapter, save_base

FORMATS = ("fp8-block", "nvfp4a16", "mxfp4a16")
# Largest difference of log-probabilities that rounding activations may make.
ACTIVATIONS = {"fp8-block": 0.6}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every format of one model whose last blocks of rows are short, made by three workers."""
    folder = tmp_path_factory.mktemp("grouped")
    base = save_base(folder / "base", seed=1, hidden_size=128, intermediate_size=384, num_hidden_layers=1)
    adapter = save_adapter(base, folder / "adapter", seed=2)
    artifacts = [{"format": name, "keep": ["*.o_proj"]} for name in FORMATS]
    recipe = make_recipe({"base": str(base), "adapter": str(adapter), "artifacts": artifacts}, Path(), "test")
    plan = make_plan(recipe, folder / "out")
    built = {artifact.name: artifact for artifact in build(plan, folder / "out", BuildOptions(3))}
    return base, plan, built


@pytest.mark.parametrize("name", FORMATS)
def test_folders_compute_with_the_values_they_hold(released: Any, name: str) -> None:
    base, plan, built = released
    (item,) = [item for item in plan.artifacts if item.name == name]
    folder = built[name].path
    twin = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    shipped = load_model(folder, dtype="auto")
    decompress(shipped)
    for key, route in item.routes.items():
        values = decoded(route.form, route.spec, folder)
        twin.get_parameter(key).data = values
        assert torch.equal(shipped.get_parameter(key).float(), values), key
    with torch.no_grad():
        expected = torch.log_softmax(twin(input_ids=torch.tensor([TOKENS])).logits[0], -1).numpy()
    with load_runtime("transformers").open(folder) as session:
        found = session.log_probabilities(TOKENS)
    assert np.abs(found - expected).max() < ACTIVATIONS.get(name, 1e-4)
    assert (np.abs(found - expected).max() > 1e-3) == (name in ACTIVATIONS), "rounding is measured"
    assert all(0.7 < value < 1.3 for value in survival(plan, item, built[name]).values())


@pytest.mark.parametrize("name", FORMATS)
def test_plain_transformers_opens_them(released: Any, name: str) -> None:
    folder = released[2][name].path
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": "cpu"})
    with torch.no_grad():
        plain = torch.log_softmax(model(input_ids=torch.tensor([TOKENS])).logits[0].float(), -1).numpy()
    with load_runtime("transformers").open(folder) as session:
        assert (np.exp(plain) * (plain - session.log_probabilities(TOKENS))).sum(axis=1).max() < 0.02


def test_bytes_do_not_depend_on_the_workers(released: Any, tmp_path: Path) -> None:
    _, plan, built = released
    build(plan, tmp_path, BuildOptions(1))
    for name in FORMATS:
        assert folder_bytes(tmp_path / name) == folder_bytes(built[name].path)
