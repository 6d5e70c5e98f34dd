"""Folders of every merged quantised format load in plain transformers, and compute what their bytes decode to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.errors import PlanRefused
from qlora_export.formats.base import Format
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.as_trained import open_as_trained
from qlora_export.runtimes.loading import decompress, load_model
from qlora_export.runtimes.registry import load_runtime
from qlora_export.tensors.dtypes import round_to
from qlora_export.tensors.header import read_header
from tests.helpers.files import folder_bytes
from tests.helpers.pico import RecipeMaker, save_adapter, save_base
from tests.helpers.zoo import save_architecture, save_variant

TOKENS = [3, 41, 17, 9, 5, 62, 23, 17, 88, 5]
GROUPED = {"format": "w4a16", "options": {"group_size": 32}, "keep": ["*.down_proj"]}
ARTIFACTS: list[Any] = ["fp4", "int8", GROUPED, "w8a16", "w8a8", "fp8"]
NAMES = [item if isinstance(item, str) else item["format"] for item in ARTIFACTS]
# Largest difference of log-probabilities that rounding activations may make.
ACTIVATIONS = {"w8a8": 0.2, "fp8": 0.6}


def decoded(form: Format, spec: Any, folder: Path) -> torch.Tensor:
    """What the shipped bytes of a tensor decode to, rounded as it is multiplied: int8 is not."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    stored = read_header(path)
    raw = {
        part.name: np.frombuffer(data, np.uint8, stored[part.name].bytes, stored[part.name].offset)
        for part in form.parts(spec)
    }
    values = form.decode(spec, raw, range(spec.rows))
    values = values if form.name == "int8" else round_to(values, form.dense_dtype)
    return torch.from_numpy(values.reshape(spec.shape))


@pytest.mark.parametrize("tied", [False, True])
def test_folders_compute_with_the_values_they_hold(pico_recipe: RecipeMaker, tmp_path: Path, tied: bool) -> None:
    base = save_base(tmp_path / "base", seed=1, tie_word_embeddings=tied)
    adapter = save_adapter(base, tmp_path / "adapter", seed=2)
    plan = make_plan(pico_recipe(*ARTIFACTS, base=str(base), adapter=str(adapter)), tmp_path / "out")
    artifacts = {artifact.name: artifact for artifact in build(plan, tmp_path / "out", BuildOptions())}
    assert list(artifacts) == NAMES
    for item in plan.artifacts:
        folder = tmp_path / "out" / item.name
        twin = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        shipped = load_model(folder, dtype="auto")
        decompress(shipped)
        for name, route in item.routes.items():
            assert route.form is not None
            values = decoded(route.form, route.spec, folder)
            twin.get_parameter(name).data = values
            if item.form.quantises and item.form.name not in ("fp4", "int8"):
                assert torch.equal(shipped.get_parameter(name).float(), values), name
        with torch.no_grad():
            expected = torch.log_softmax(twin(input_ids=torch.tensor([TOKENS])).logits[0], -1).numpy()
        with load_runtime("transformers").open(folder) as session:
            found = session.log_probabilities(TOKENS)
        assert np.abs(found - expected).max() < ACTIVATIONS.get(item.form.name, 1e-4), item.name
        assert (np.abs(found - expected).max() > 1e-3) == (item.form.name in ACTIVATIONS), "rounding is measured"
        assert all(0.8 < value < 1.2 for value in survival(plan, item, artifacts[item.name]).values())


@pytest.mark.parametrize("item", ARTIFACTS[1:], ids=NAMES[1:])
def test_plain_transformers_opens_them(pico_recipe: RecipeMaker, tmp_path: Path, item: Any) -> None:
    """As the card says, in 16 bits, without a warning; what is kept stays as it is.

    Not fp4: where the CPU has AVX512-BF16, bitsandbytes computes 4-bit layers of no such odd sizes.
    """
    plan = make_plan(pico_recipe(item), tmp_path)
    build(plan, tmp_path, BuildOptions())
    folder = tmp_path / plan.artifacts[0].name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": "cpu"})
    with torch.no_grad():
        plain = torch.log_softmax(model(input_ids=torch.tensor([TOKENS])).logits[0].float(), -1).numpy()
    with load_runtime("transformers").open(folder) as session:
        assert (np.exp(plain) * (plain - session.log_probabilities(TOKENS))).sum(axis=1).max() < 0.02
    dense = {name for name, route in plan.artifacts[0].routes.items() if route.form and not route.form.quantises}
    assert "lm_head.weight" in dense
    assert ("model.layers.0.mlp.down_proj.weight" in dense) == (plan.artifacts[0].form.name == "w4a16")


def test_bytes_do_not_depend_on_the_workers(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = pico_recipe(*ARTIFACTS)
    for workers in (1, 3):
        out = tmp_path / str(workers)
        build(make_plan(recipe, out), out, BuildOptions(workers))
    for name in NAMES:
        assert folder_bytes(tmp_path / "1" / name) == folder_bytes(tmp_path / "3" / name)


def test_layers_that_do_not_fit_are_refused_by_name_all_at_once(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = pico_recipe("w4a16", {"format": "w4a16", "name": "small", "options": {"group_size": 64}})
    with pytest.raises(PlanRefused) as caught:
        make_plan(recipe, tmp_path)
    assert len(caught.value.problems) == 8
    assert (
        "artifact small: w4a16 cannot hold model.layers.*.mlp.down_proj (2 layers): "
        "88 columns are no multiple of the group of 64"
    ) in caught.value.message
    assert "model.layers.*.self_attn.q_proj (2 layers): 64 columns are no multiple of the group of 128" in str(
        caught.value.message
    )
    hints = [problem.hint for problem in caught.value.problems if "small" in problem.message]
    assert hints == [
        'keep: ["model.layers.*.mlp.down_proj"] leaves it dense; other formats and options have other limits'
    ]


def test_options_that_are_wrong_are_a_problem_of_the_plan(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    wrong = [{"format": "bf16", "options": {"a": 1}}, {"format": "w4a16", "options": {"group": 64}}]
    with pytest.raises(PlanRefused) as caught:
        make_plan(pico_recipe(*wrong), tmp_path)
    assert [problem.message for problem in caught.value.problems] == [
        "artifact bf16: bf16 has no options",
        "artifact w4a16: w4a16 has no option 'group'; known: group_size, symmetric",
    ]


@pytest.mark.parametrize(
    ("architecture", "form", "says"),
    [
        ("gpt2", "fp8", "cannot hold transformer.h.*.attn.c_attn (2 layers): its module is a Conv1D"),
        ("mixtral", "w8a16", "transformers does not load w8a16 beside dense experts"),
        ("gemma3_multimodal", "w8a16", "transformers does not load packed layers of a vision tower"),
    ],
)
def test_what_transformers_cannot_load_is_refused(tmp_path: Path, architecture: str, form: str, says: str) -> None:

    base = save_architecture(architecture, tmp_path / "base", seed=3, dtype=torch.bfloat16)
    adapter = save_variant(base, architecture, "lora", tmp_path / "adapter", seed=5)
    data = {"base": str(base), "adapter": str(adapter), "artifacts": [form]}
    with pytest.raises(PlanRefused) as caught:
        make_plan(make_recipe(data, Path(), "test"), tmp_path / "out")
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("architecture", "form", "keep"),
    [("gemma3_multimodal", "w8a16", ["*vision_tower*"]), ("mixtral", "fp8", []), ("gpt2", "int8", [])],
)
def test_other_architectures_load(tmp_path: Path, architecture: str, form: str, keep: list[str]) -> None:

    base = save_architecture(architecture, tmp_path / "base", seed=3, dtype=torch.bfloat16)
    adapter = save_variant(base, architecture, "lora", tmp_path / "adapter", seed=5)
    data = {"base": str(base), "adapter": str(adapter), "artifacts": [{"format": form, "keep": keep}]}
    plan = make_plan(make_recipe(data, Path(), "test"), tmp_path / "out")
    build(plan, tmp_path / "out", BuildOptions())
    assert plan.adapter is not None
    reference = open_as_trained(plan.checkpoint, plan.adapter, plan.live_training).tuned().log_probabilities(TOKENS)
    with load_runtime("transformers").open(tmp_path / "out" / form) as session:
        found = session.log_probabilities(TOKENS)
    assert (np.exp(reference) * (reference - found)).sum(axis=1).mean() < 0.01
