"""Several adapters: what peft's own add_weighted_adapter makes of them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_export.engine import BuildOptions, build
from qlora_export.errors import PlanRefused, UsageError
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.load import make_recipe
from qlora_export.training import record
from tests.helpers.files import folder_bytes
from tests.helpers.pico import load_qlora
from tests.helpers.zoo import TOKENS, reload_logits, save_architecture, save_variant

METHODS = [
    ("sum", {}),
    ("linear", {}),
    ("ties", {"density": 0.6}),
    ("ties", {"density": 0.4, "majority_sign": "frequency"}),
    ("magnitude_prune", {"density": 0.5}),
    ("svd", {"svd_rank": 5}),
    ("ties_svd", {"density": 0.5, "svd_rank": 3}),
    ("magnitude_prune_svd", {"density": 0.7}),
]
PEFT_NAMES = {"sum": "cat", "majority_sign": "majority_sign_method"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base and two adapters of one rank, on modules that overlap."""
    folder = tmp_path_factory.mktemp("pair")
    base = save_architecture("llama", folder / "base", seed=3)
    first = save_variant(base, "llama", "lora", folder / "first", seed=4)
    return base, first, save_variant(base, "llama", "rslora", folder / "second", seed=5)


def planned(pair: tuple[Path, Path, Path], out: Path, weights: tuple[float, float], **merge: Any) -> Plan:
    adapters = [{"path": str(path), "weight": weight} for path, weight in zip(pair[1:], weights, strict=True)]
    data = {"base": str(pair[0]), "adapter": adapters, "merge": {"onto": "original", **merge}, "artifacts": ["fp32"]}
    return make_plan(make_recipe(data, Path(), "test"), out)


def peft_logits(pair: tuple[Path, Path, Path], weights: tuple[float, float], method: str, settings: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.PeftModel.from_pretrained(model, pair[1], adapter_name="first")
        live.load_adapter(pair[2], adapter_name="second")
        options = {PEFT_NAMES.get(key, key): value for key, value in settings.items()}
        live.add_weighted_adapter(
            ["first", "second"], list(weights), "both", combination_type=PEFT_NAMES.get(method, method), **options
        )
        live.set_adapter("both")
    with torch.no_grad():
        return live.eval()(input_ids=torch.tensor([TOKENS])).logits.numpy()


@pytest.mark.sampled(1, per="case")
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3)])
@pytest.mark.parametrize("case", METHODS, ids=str)
def test_the_combination_is_pefts(
    pair: tuple[Path, Path, Path], tmp_path: Path, case: tuple[str, Any], weights: tuple[float, float]
) -> None:
    method, settings = case
    plan = planned(pair, tmp_path, weights, combine=method, **settings)
    build(plan, tmp_path, BuildOptions())
    found = reload_logits(tmp_path / "fp32", "llama", TOKENS)
    assert np.abs(found - peft_logits(pair, weights, method, settings)).max() < 2e-5
    assert any(f"combined by {method}" in note for note in plan.assumptions)
    manifest = json.loads((tmp_path / "fp32/manifest.json").read_text())
    assert [item["weight"] for item in manifest["sources"]["combined_from"]] == list(weights)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_pruning_is_seeded(pair: tuple[Path, Path, Path], tmp_path: Path, method: str) -> None:
    torch.manual_seed(1)
    first = planned(pair, tmp_path / "a", (1, 1), combine=method)
    state = torch.random.get_rng_state()
    again = planned(pair, tmp_path / "b", (1, 1), combine=method)
    other = planned(pair, tmp_path / "b", (1, 1), combine=method, seed=1)
    assert first.adapter is not None and again.adapter is not None and other.adapter is not None
    assert folder_bytes(first.adapter.folder) == folder_bytes(again.adapter.folder)
    assert folder_bytes(first.adapter.folder) != folder_bytes(other.adapter.folder)
    assert torch.equal(state, torch.random.get_rng_state())
    tensors = load_file(first.adapter.weights)
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in tensors.values())


def test_one_adapter_with_a_weight_is_scaled(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data = {"base": str(pair[0]), "adapter": [{"path": str(pair[1]), "weight": 0.5}], "artifacts": ["fp32"]}
    plan = make_plan(make_recipe({**data, "merge": {"onto": "original"}}, Path(), "test"), tmp_path)
    build(plan, tmp_path, BuildOptions())
    merged, base = load_file(tmp_path / "fp32/model.safetensors"), load_file(pair[0] / "model.safetensors")
    a, b = (load_file(pair[1] / "adapter_model.safetensors")[f"{Q}.lora_{side}.weight"] for side in "AB")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[name], base[name] + 0.5 * 2 * (b @ a))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("variant", "merge", "says"),
    [
        ("dora", {}, "use_dora = True"),
        ("modules_to_save", {}, "modules_to_save = ['lm_head']"),
        ("patterns", {"combine": "ties"}, "the ranks of model.layers.0.self_attn.q_proj differ"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    pair: tuple[Path, Path, Path], tmp_path: Path, variant: str, merge: dict[str, Any], says: str
) -> None:
    other = save_variant(pair[0], "llama", variant, tmp_path / "other", seed=6)
    with pytest.raises(PlanRefused) as caught:
        planned((pair[0], pair[1], other), tmp_path / "out", (1, 1), **merge)
    assert says in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_combination_is_made_again_when_its_parts_or_its_bytes_change(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    copies = tuple(Path(shutil.copytree(path, tmp_path / path.name)) for path in pair[1:])
    parts = (pair[0], *copies)
    first = planned(parts, tmp_path / "out", (1, 1)).adapter  # type: ignore[arg-type]
    assert first is not None
    before = folder_bytes(first.folder)
    first.weights.write_bytes(first.weights.read_bytes()[:-4] + b"\\0\\0\\0\\1")
    again = planned(parts, tmp_path / "out", (1, 1)).adapter  # type: ignore[arg-type]
    assert again is not None
    assert (again.folder, folder_bytes(again.folder)) == (first.folder, before)
    record(load_qlora(pair[0]), copies[0], pair[0])
    recorded = planned(parts, tmp_path / "out", (1, 1))  # type: ignore[arg-type]
    assert recorded.live_training.provenance == "sidecar"


@pytest.mark.parametrize(("weight", "says"), [(0, "a weight of 0"), (float("nan"), "finite number")])
def test_a_weight_that_leaves_nothing(pair: tuple[Path, Path, Path], tmp_path: Path, weight: float, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        planned(pair, tmp_path / "out", (weight, 1))


def test_a_weight_that_vanishes_is_refused_before_anything_is_written(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanRefused, match="its weight 1e-60 leaves nothing"):
        planned(pair, tmp_path / "out", (1e-60, 1))
    assert not (tmp_path / "out").exists()
