"""GPTQ and AWQ: a decoder written bit by bit, the readers of ONNX Runtime GenAI, transformers' configs, `w4a16`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from onnxruntime_genai.models.loaders.awq import AWQModel
from onnxruntime_genai.models.loaders.gptq import GPTQModel
from safetensors.torch import load_file
from transformers.utils.quantization_config import AwqConfig, GPTQConfig

from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.errors import InputError, UsageError
from qlora_export.formats.base import Format
from qlora_export.formats.registry import load_format
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import ArtifactPlan
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.gptq_awq import decoded, load_interleaved
from qlora_export.runtimes.registry import load_runtime
from qlora_export.types import TensorSpec, TrainingQuantization
from tests.formats.test_contract import cuts, encode
from tests.helpers.files import edit_json, edit_tensors
from tests.helpers.pico import save_adapter, save_base
from tests.helpers.values import random_values

SHAPES = [(8, 128), (40, 384), (136, 640)]
NAMES = ("gptq", "awq")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TOKENS = [3, 41, 17, 9, 5, 62, 23, 17, 88, 5]
ITEM = {"F16": np.float16, "I32": np.int32}


def tensors_of(form: Format, spec: TensorSpec, raw: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The parts by their last names."""
    return {
        part.name.rpartition(".")[2]: raw[part.name].view(ITEM[part.dtype]).reshape(part.shape)
        for part in form.parts(spec)
    }


def naive(name: str, parts: dict[str, np.ndarray[Any, Any]], group: int) -> tuple[Any, Any, Any]:
    """Nibbles [out, in], zero points and scales [out, groups], one nibble at a time, by the published layouts."""
    groups, outputs = parts["scales"].shape
    inputs = groups * group
    nibbles, zeros = np.empty((outputs, inputs), np.int64), np.empty((outputs, groups), np.int64)
    for output in range(outputs):
        place = output % 8 if name == "gptq" else AWQ_ORDER.index(output % 8)
        for number in range(groups):
            stored = (int(parts["qzeros"][number, output // 8]) >> (4 * place)) & 15
            zeros[output, number] = stored + 1 if name == "gptq" else stored
        for column in range(inputs):
            if name == "gptq":
                word, shift = parts["qweight"][column // 8, output], 4 * (column % 8)
            else:
                word, shift = parts["qweight"][column, output // 8], 4 * place
            nibbles[output, column] = (int(word) >> shift) & 15
    return nibbles, zeros, parts["scales"].T.astype(np.float64)


def made(
    name: str, shape: tuple[int, int], group: int = 128, dtype: str = "BF16", scale: float = 0.02
) -> tuple[Format, TensorSpec, Any, dict[str, Any]]:
    form = load_format(name, TrainingQuantization(storage_dtype=dtype), {"group_size": group})
    spec = TensorSpec("x.weight", "F32", shape)
    values = random_values(*shape, scale=scale)
    values[0, :group] = 0
    values[1] = np.abs(values[1])
    return form, spec, values, encode(form, spec, values.reshape(-1).copy(), cuts(form, spec, 3))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_as_near_as_its_grid_allows(name: str, group: int, dtype: str) -> None:
    """Read bit by bit, half a step from the weight, a little more where the dtype rounded; decoded twice the same."""
    for shape in SHAPES[:2]:
        form, spec, values, raw = made(name, shape, group, dtype)
        parts = tensors_of(form, spec, raw)
        nibbles, zeros, scales = naive(name, parts, group)
        assert (zeros == 8).all() or name == "awq"
        steps = scales.repeat(group, 1)
        found = (nibbles - zeros.repeat(group, 1)) * steps
        off = np.abs(found - values) - np.abs(values) * 2**-8
        inside = (nibbles > 0) & (nibbles < 15)
        assert (off <= steps * np.where(inside, 0.54, 1.05)).all(), "an integer zero moves the ends of a range"
        np.testing.assert_array_equal(form.decode(spec, raw, range(spec.rows)).reshape(shape), found.astype(np.float32))
        ours = decoded({f"x.{key}": torch.from_numpy(part) for key, part in parts.items()}, name, torch.float32)
        assert set(ours) == {"x.weight"}
        np.testing.assert_array_equal(ours["x.weight"].numpy(), found.astype(np.float32))
        if dtype == "BF16":
            assert (scales == torch.from_numpy(scales).bfloat16().double().numpy()).all()


def test_the_integers_of_gptq_are_those_of_w4a16() -> None:
    for dtype in ("BF16", "F16"):
        form, spec, values, raw = made("gptq", SHAPES[2], dtype=dtype)
        twin = load_format("w4a16", TrainingQuantization(storage_dtype=dtype))
        other = encode(twin, spec, values.reshape(-1), [0, spec.rows])
        rows = range(1, spec.rows)  # the first holds a group of zeros, whose scale is free
        np.testing.assert_array_equal(form.decode(spec, raw, rows), twin.decode(spec, other, rows))


def test_a_group_of_any_size_has_a_scale_in_float16() -> None:
    for name in NAMES:
        form, spec, _, raw = made(name, (8, 128), scale=1e-9)
        assert (tensors_of(form, spec, raw)["scales"] > 0).all()
        assert np.abs(form.decode(spec, raw, range(8))).max() < 1e-6
        with pytest.raises(InputError, match=f"needs a scale of .*, {name} stores scales in float16, up to 65504"):
            list(form.open(spec).encode(np.full(1024, 1e6, np.float32), 0))
    form = load_format("gptq", TrainingQuantization(storage_dtype="F16"))
    with pytest.raises(InputError, match="tensor x.weight holds 70000, which the model's dtype F16 cannot"):
        list(form.open(spec).encode(np.full(1024, 70000, np.float32), 0))


def test_layers_that_do_not_fit_are_obstacles() -> None:
    for name in NAMES:
        form = load_format(name, TrainingQuantization())
        assert form.obstacle(TensorSpec("x.weight", "BF16", (16, 88)), False) == (
            "88 columns are no multiple of the group of 128"
        )
        assert "12 rows are no multiple of 8" in str(form.obstacle(TensorSpec("x.weight", "BF16", (12, 128)), False))
        assert "Conv1D" in str(form.obstacle(TensorSpec("x.weight", "BF16", (16, 128)), True))
        with pytest.raises(UsageError, match=f"{name}: group_size 48; known: 32, 64, 128"):
            load_format(name, TrainingQuantization(), {"group_size": 48})


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, ArtifactPlan, Any]]:
    """Both artifacts of one pico model, and both with one projection kept dense."""
    folder = tmp_path_factory.mktemp("interleaved")
    base = save_base(folder / "base", seed=1, intermediate_size=96)
    adapter = save_adapter(base, folder / "adapter", seed=2)
    artifacts: list[Any] = [{"format": name, "options": {"group_size": 32}} for name in NAMES]
    artifacts += [{**item, "name": f"{item['format']}-kept", "keep": ["*.0.*down_proj"]} for item in artifacts]
    recipe = make_recipe({"base": str(base), "adapter": str(adapter), "artifacts": artifacts}, Path(), "test")
    plan = make_plan(recipe, folder / "out")
    built = {artifact.name: artifact for artifact in build(plan, folder / "out", BuildOptions())}
    items = {item.name: item for item in plan.artifacts}
    return lambda name: (plan, items[name], built[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_runtime_computes_with_the_bytes_of_the_folder(
    released: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, item, artifact = released(f"{name}-kept")
    capsys.readouterr()
    shipped = load_interleaved(artifact.path)
    assert capsys.readouterr() == ("", "")
    assert shipped.dtype == torch.bfloat16
    tensors = load_file(artifact.path / "model.safetensors")
    for module, route in ((key.removesuffix(".weight"), item.routes[key]) for key in item.routes):
        if f"{module}.qweight" in tensors:
            raw = {part.name: _bytes(tensors[part.name]) for part in route.form.parts(route.spec)}
            values = route.form.decode(route.spec, raw, range(route.spec.rows)).reshape(route.spec.shape)
            expected = torch.from_numpy(values).bfloat16()
        else:
            expected = tensors[f"{module}.weight"]
        assert torch.equal(shipped.get_parameter(f"{module}.weight"), expected), module
    assert "model.layers.0.mlp.down_proj.weight" in tensors
    assert "model.layers.1.mlp.down_proj.qweight" in tensors
    with load_runtime("transformers").open(artifact.path) as session, torch.no_grad():
        logits = shipped.float()(input_ids=torch.tensor([TOKENS])).logits[0]
        assert np.abs(session.log_probabilities(TOKENS) - torch.log_softmax(logits, -1).numpy()).max() < 1e-5
    assert all(0.7 < value < 1.3 for value in survival(plan, item, artifact).values())


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_the_onnx_builder_reads_the_same_integers(released: Any, name: str) -> None:
    """The reader of ONNX Runtime GenAI unpacks, computes and packs again: [out, groups, group / 2] bytes, low first."""
    _, _, artifact = released(name)
    stated = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    attributes = {"config": stated, "use_g_idx": False}
    kind = GPTQModel if name == "gptq" else AWQModel
    read = kind(name, str(artifact.path), attributes, 64, 32, 96, 2)
    tensors = load_file(artifact.path / "model.safetensors")
    for layer in (0, 1):
        for stem in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            kinds, _, leaf = stem.partition(".")
            found = getattr(getattr(read.layers[layer], kinds), leaf)
            key = f"model.layers.{layer}.{stem}"
            parts = {part: tensors[f"{key}.{part}"].numpy() for part in ("qweight", "qzeros", "scales")}
            nibbles, zeros, scales = naive(name, parts, 32)
            packed = found.qweight.numpy().reshape(len(nibbles), -1)
            np.testing.assert_array_equal(packed & 15, nibbles[:, 0::2])
            np.testing.assert_array_equal(packed >> 4, nibbles[:, 1::2])
            np.testing.assert_array_equal(found.scales.float().numpy().reshape(scales.shape), scales.astype(np.float32))
            stored = found.qzeros.numpy().reshape(len(zeros), -1)
            unpacked = np.stack([stored & 15, stored >> 4], 2).reshape(len(zeros), -1)[:, : zeros.shape[1]]
            np.testing.assert_array_equal(unpacked, zeros)


def test_the_tables_are_those_of_the_loaders(released: Any) -> None:
    _, _, artifact = released("gptq-kept")
    stated = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    config = GPTQConfig.from_dict(stated)
    assert (config.bits, config.group_size, config.sym, config.desc_act) == (4, 32, True, False)
    assert stated["checkpoint_format"] == "gptq"
    assert list(stated["dynamic"]) == [
        r"-:^model\.embed_tokens$",
        r"-:^model\.layers\.0\.mlp\.down_proj$",
    ]
    _, _, artifact = released("awq-kept")
    stated = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    config = AwqConfig.from_dict(stated)
    assert (config.bits, config.group_size, config.zero_point, config.format) == (4, 32, True, "gemm")
    assert config.modules_to_not_convert == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.down_proj"]


def test_plain_transformers_needs_gptqmodel(released: Any) -> None:
    """Should it open these folders by itself one day, the runtime should let it."""
    for name in NAMES:
        with pytest.raises(ImportError, match="requires (optimum|gptqmodel)"):
            transformers.AutoModelForCausalLM.from_pretrained(released(name)[2].path)


def test_a_folder_that_is_not_as_it_states_does_not_open(released: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(released("gptq")[2].path, tmp_path / "gptq"))
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config={**stated, "checkpoint_format": "gptq_v2"})
    with pytest.raises(InputError, match="has checkpoint_format 'gptq_v2', expected 'gptq'"):
        load_interleaved(folder)
    edit_json(folder / "config.json", quantization_config=stated, hidden_size=32)
    with pytest.raises(InputError, match="transformers cannot load it"):
        load_interleaved(folder)
    edit_json(folder / "config.json", quantization_config=stated, hidden_size=64)
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.scales"))
    with pytest.raises(InputError, match="up_proj.qweight: there is no model.layers.0.mlp.up_proj.scales"):
        load_interleaved(folder)
