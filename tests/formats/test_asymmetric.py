"""Packed groups with zero points: decoded here as the library decodes them, since transformers does not open them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.errors import InputError, UsageError
from qlora_export.formats.mixed import mix
from qlora_export.formats.registry import load_format
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.asymmetric_int4 import decoded, load_asymmetric
from qlora_export.runtimes.registry import load_runtime
from qlora_export.types import TensorSpec, TrainingQuantization
from tests.formats.test_contract import cuts, encode
from tests.formats.test_folders import TOKENS
from tests.helpers.files import edit_json, edit_tensors, folder_bytes
from tests.helpers.pico import save_adapter, save_base
from tests.helpers.values import random_values

SIZES = (32, 128)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both group sizes of a model with layers of 384 rows, one projection of each kept dense, by three workers."""
    folder = tmp_path_factory.mktemp("asymmetric")
    base = save_base(folder / "base", seed=1, hidden_size=128, intermediate_size=384, num_hidden_layers=1)
    adapter = save_adapter(base, folder / "adapter", seed=2)
    artifacts: list[Any] = [
        {"format": "w4a16", "name": f"g{size}", "keep": ["*.o_proj"], "rounding": rounding}
        | {"options": {"group_size": size, "symmetric": False}}
        for size, rounding in zip(SIZES, ("nearest", "search"), strict=True)
    ]
    recipe = make_recipe({"base": str(base), "adapter": str(adapter), "artifacts": artifacts}, Path(), "test")
    plan = make_plan(recipe, folder / "out")
    return plan, {artifact.name: artifact for artifact in build(plan, folder / "out", BuildOptions(3))}


@pytest.mark.parametrize("name", [f"g{size}" for size in SIZES])
def test_the_runtime_computes_with_what_the_library_decodes(released: Any, name: str) -> None:
    plan, built = released
    (item,) = [item for item in plan.artifacts if item.name == name]
    folder = built[name].path
    tensors = load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    library = BaseCompressor.get_value_from_registry(config.format)
    shipped = load_asymmetric(folder)
    assert shipped.dtype == torch.bfloat16
    modules = [key.removesuffix("_packed").removesuffix(".weight") for key in tensors if key.endswith("_packed")]
    assert len(modules) == 6
    for module in modules:
        state = {key.removeprefix(f"{module}."): part for key, part in tensors.items() if key.startswith(f"{module}.")}
        expected = library.decompress(state, config.config_groups["group_0"])["weight"]
        assert torch.equal(shipped.get_parameter(f"{module}.weight"), expected), module
        assert (state["weight_zero_point"] != torch.tensor(-0x77777778, dtype=torch.int32)).any(), "zero points differ"
    kept = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(shipped.get_parameter(kept), tensors[kept])
    with load_runtime("transformers").open(folder) as session, torch.no_grad():
        logits = shipped.float()(input_ids=torch.tensor([TOKENS])).logits[0]
        assert np.abs(session.log_probabilities(TOKENS) - torch.log_softmax(logits, -1).numpy()).max() < 1e-5
    assert all(0.7 < value < 1.3 for value in survival(plan, item, built[name]).values())


def test_bytes_do_not_depend_on_the_workers(released: Any, tmp_path: Path) -> None:
    plan, built = released
    build(plan, tmp_path, BuildOptions(1))
    for name, artifact in built.items():
        assert folder_bytes(tmp_path / name) == folder_bytes(artifact.path)


def test_plain_transformers_does_not_open_it(released: Any) -> None:
    """Should it open these folders by itself one day, the runtime should let it."""
    with pytest.raises((RuntimeError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(released[1]["g32"].path)


@pytest.mark.parametrize("rows", [1, 8, 13, 300])
def test_the_last_word_of_zero_points_may_be_short(rows: int) -> None:
    form: Any = load_format("w4a16", TrainingQuantization(), {"group_size": 64, "symmetric": False})
    spec = TensorSpec("x.weight", "BF16", (rows, 128))
    raw = encode(form, spec, random_values(rows, 128).reshape(-1), cuts(form, spec, 2))
    dtypes = {"I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16}
    tensors = {
        part.name: torch.from_numpy(raw[part.name]).view(dtypes[part.dtype]).reshape(part.shape)
        for part in form.parts(spec)
    }
    ours = torch.from_numpy(form.decode(spec, raw, range(rows)).reshape(rows, 128)).bfloat16()
    assert torch.equal(decoded(tensors, torch.bfloat16)["x.weight"], ours)
    assert not tensors


def test_it_does_not_mix() -> None:
    form = load_format("w4a16", TrainingQuantization(), {"symmetric": False})
    other = load_format("fp8", TrainingQuantization())
    for main, beside in ((form, other), (other, form)):
        with pytest.raises(UsageError, match="w4a16 with zero points does not mix with other formats"):
            mix(main, {"x": beside}, {})


def test_a_folder_that_is_not_as_it_states_does_not_open(released: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(released[1]["g32"].path, tmp_path / "g32"))
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = stated["config_groups"].values()
    for changed, message in (
        ({"weights": {**group["weights"], "num_bits": 8}}, "has num_bits 8, expected 4"),
        ({"input_activations": {"num_bits": 8}}, "rounds activations, expected none"),
    ):
        edit_json(folder / "config.json", quantization_config={**stated, "config_groups": {"g": {**group, **changed}}})
        with pytest.raises(InputError, match=message):
            load_asymmetric(folder)
    edit_json(folder / "config.json", quantization_config={**stated, "config_groups": {"a": group, "b": group}})
    with pytest.raises(InputError, match="has 2 groups, expected 1"):
        load_asymmetric(folder)
    edit_json(folder / "config.json", quantization_config=stated)
    zeros = "model.layers.0.mlp.up_proj.weight_zero_point"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(zeros))
    with pytest.raises(InputError, match=f"up_proj.weight_packed: there is no {zeros}"):
        load_asymmetric(folder)
