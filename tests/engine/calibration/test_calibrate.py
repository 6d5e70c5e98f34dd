"""Calibrated rounding of whole models: which bytes it gives, that it gives them again, what it leaves to formats."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_export import engine
from qlora_export.blocks.activations import Activations, batches_of
from qlora_export.blocks.decoder import Call
from qlora_export.engine.calibration.block import Stream, Tokens, round_block
from qlora_export.engine.calibration.block_pass import CalibrationOptions
from qlora_export.engine.calibration.calibrate import calibrate
from qlora_export.engine.calibration.hessian import InputStatistics
from qlora_export.errors import Refused, UsageError
from qlora_export.planning.plan import Made, Plan, route_parts
from qlora_export.quant.rounding.solving import Method
from qlora_export.sources.sidecar import SIDECAR_NAME
from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.tensors.reading import SourceFiles
from tests.engine.calibration.conftest import Pico
from tests.engine.calibration.models import plan_of, save_family, windows_of
from tests.helpers.files import edit_tensors
from tests.helpers.pico import save_base

CALIBRATED = {"format": "nf4", "rounding": "calibrated"}
TOKENS = windows_of(16)
HASTY = Method(sweeps=0, fits_scales=False, rounds=1)
KEPT = {"merge": {"zero_delta": "keep"}}
pytestmark = pytest.mark.usefixtures("hasty_search")


def pico_plan(pico: Pico, out: Path, *artifacts: Any, **changes: Any) -> Plan:
    """A plan onto the base as it was trained on, which the sidecar tells."""
    changes = {"adapter": str(pico.adapter), "training_quantization": None, **changes}
    return plan_of(pico.base, pico.adapter, out, *artifacts, **changes)


def made_of(plan: Plan, out: Path, number: int = 0, tokens: Any = TOKENS, **options: Any) -> Made:
    """What calibration decides for an artifact of the plan, in a hurry if nothing else is said."""
    out.mkdir(exist_ok=True)
    return calibrate(plan, plan.artifacts[number], tokens, CalibrationOptions(out, **{"method": HASTY, **options}))


def blocks(made: Made) -> dict[str, bytes]:
    """The bytes of every part."""
    with SourceFiles() as files:
        return {name: files.read_bytes(part, 0, part.bytes).tobytes() for name, part in made.parts.items()}


@pytest.fixture(scope="module")
def undisturbed(hasty_search: None, pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    out = tmp_path_factory.mktemp("undisturbed")
    return out, made_of(pico_plan(pico, out, CALIBRATED), out)


def test_facts_tell_of_every_layer_what_it_lost(pico: Pico, tmp_path: Path) -> None:
    made = made_of(pico_plan(pico, tmp_path, CALIBRATED), tmp_path, method=Method())
    layers = made.facts["layers"]
    assert len(layers) == 14
    assert made.facts["sequences"] == 16
    assert made.facts["tokens_sha256"] == TOKENS.sha256
    for found in layers.values():
        assert 0 < found["output_error"] < 0.2
        assert found["weighted_survival"] == pytest.approx(1, abs=0.3)
    assert len({name.partition(".weight")[0] for name in made.parts}) == 14


@pytest.mark.parametrize("how", ["again", "spilled", "first block kept", "damaged", "interrupted"])
def test_the_bytes_are_the_same(undisturbed: tuple[Path, Made], pico: Pico, tmp_path: Path, how: str) -> None:
    whole, made = undisturbed
    options: dict[str, Any] = {}
    plan = pico_plan(pico, tmp_path, CALIBRATED)
    if how == "spilled":
        options["activation_bytes"] = 0
    if how in ("first block kept", "damaged"):
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
        last = next(tmp_path.glob("*.calibrated/block-0001.safetensors"))
        last.unlink() if how == "first block kept" else last.write_bytes(last.read_bytes()[:200])
    if how == "interrupted":

        def interrupt(done: int, total: int) -> None:
            if done == 10:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            made_of(plan, tmp_path, progress=interrupt)
        assert [path.name for path in tmp_path.glob("*/block*")] == ["block-0000.safetensors"]
    again = made_of(plan, tmp_path, **options)
    assert blocks(again) == blocks(made)
    assert again.facts == made.facts
    assert again.digest == made.digest


def test_artifacts_that_mix_formats_otherwise_share_no_blocks(pico: Pico, tmp_path: Path) -> None:
    """Parts of the same names and other sizes; every layer is calibrated on the grid of its own format."""
    plain = {"format": "w4a16", "name": "plain", "rounding": "calibrated", "options": {"group_size": 32}}
    mixed = {**plain, "name": "mixed", "overrides": {"*.v_proj": "fp8", "*.o_proj": "w8a16"}}
    plan = pico_plan(pico, tmp_path, plain, mixed)
    first, second = (made_of(plan, tmp_path, number) for number in (0, 1))
    assert len(first.facts["layers"]) == len(second.facts["layers"]) == 14
    assert not any("fallback" in found for found in second.facts["layers"].values())
    for item, made in zip(plan.artifacts, (first, second), strict=True):
        for route in item.routes.values():
            for part in route_parts(route):
                if part.name in made.parts:
                    assert made.parts[part.name].bytes == math.prod(part.shape) * ITEM_BYTES[part.dtype], part.name
    layers = [name for name in second.parts if "o_proj" in name]
    assert len(layers) == 6, "8 bits are calibrated, too"


@pytest.mark.parametrize("change", ["tokens", "method", "base", "adapter", "keep", "onto", "format"])
def test_blocks_of_another_run_are_not_taken(
    undisturbed: tuple[Path, Made], pico: Pico, tmp_path: Path, change: str
) -> None:
    whole, made = undisturbed
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    artifact: dict[str, Any] = CALIBRATED
    options: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    tokens = TOKENS
    if change == "tokens":
        tokens = windows_of(16, seed=1)
    elif change == "method":
        options["method"] = replace(HASTY, sweeps=1)
    elif change == "base":
        base = Path(shutil.copytree(pico.base, tmp_path / "base"))
        with (base / "model.safetensors").open("r+b") as file:
            file.seek(-2, 2)
            file.write(bytes(2))
        changes["base"] = str(base)
    elif change == "adapter":
        adapter = Path(shutil.copytree(pico.adapter, tmp_path / "adapter"))
        edit_tensors(
            adapter / "adapter_model.safetensors",
            lambda tensors: tensors.update({name: 2 * item for name, item in tensors.items()}),
        )
        changes["adapter"] = str(adapter)
    elif change == "keep":
        artifact = {**CALIBRATED, "keep": ["*.0.mlp.up_proj"]}
    elif change == "onto":
        artifact = {**CALIBRATED, "onto": "original"}
    else:
        artifact = {**CALIBRATED, "format": "fp4"}
    found = made_of(pico_plan(pico, tmp_path, artifact, **changes), tmp_path, tokens=tokens, **options)
    assert len(list(tmp_path.glob("*.calibrated"))) == 2
    paths = {tensor.path.parent for tensor in found.parts.values()}
    assert len(paths) == 1
    assert not paths & {tensor.path.parent for tensor in made.parts.values()}
    assert (found.facts == made.facts) == (change == "base")  # whose last norm was changed, behind all blocks


def tensors_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of an artifact."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def build(plan: Plan, made: Made, number: int, out: Path) -> None:
    """Build every artifact, one of them from what was decided."""
    items = list(plan.artifacts)
    items[number] = replace(items[number], made=made)
    engine.build(replace(plan, artifacts=tuple(items)), out, engine.BuildOptions(workers=1))


def test_a_delta_of_zero_gives_back_every_byte_of_training(pico: Pico, tmp_path: Path) -> None:
    """Codes, absmax, their second level and its offset; then the same onto that artifact, a base stored in 4 bits."""
    base = pico.base
    for turn in ("trained", "stored"):
        out, adapter = tmp_path / turn, Path(shutil.copytree(pico.untrained, tmp_path / f"on-{turn}"))
        if turn == "stored":
            (adapter / SIDECAR_NAME).unlink()
        changes = {"base": str(base), "adapter": str(adapter), "merge": {"zero_delta": "keep"}}
        plan = pico_plan(pico, out, "nf4-adapter", {**CALIBRATED, "name": "calibrated"}, **changes)
        made = made_of(plan, out, 1, method=Method())
        assert not [name for name, found in made.facts["layers"].items() if "fallback" in found]
        assert {found["output_error"] for found in made.facts["layers"].values()} == {0}
        build(plan, made, 1, out)
        trained, found = tensors_of(out / "nf4-adapter"), tensors_of(out / "calibrated")
        assert len([name for name in trained if name.endswith(".absmax")]) == 14
        assert found == trained
        base = out / "nf4-adapter"


def test_layers_that_cannot_be_calibrated_are_left_to_the_format(tmp_path: Path) -> None:
    """`down_proj` has 88 columns, no multiple of 64."""
    base = save_base(tmp_path / "base", seed=1)
    plan = plan_of(base, None, tmp_path, CALIBRATED)
    made = made_of(plan, tmp_path, tokens=windows_of(6))
    found = {name: facts.get("fallback") for name, facts in made.facts["layers"].items()}
    odd = {name for name in found if "down_proj" in name}
    assert len(odd) == 2
    assert {name for name, why in found.items() if why} == odd
    assert {found[name] for name in odd} == {"88 columns are no multiple of the group"}
    assert not any("down_proj" in name for name in made.parts)
    whole, plain = tmp_path / "whole", plan_of(base, None, tmp_path, {"format": "nf4", "name": "plain"})
    build(plan, made, 0, whole)
    engine.build(plain, whole, engine.BuildOptions(workers=1))
    calibrated, nearest = tensors_of(whole / "nf4-calibrated"), tensors_of(whole / "plain")
    changed = {
        name.split(".")[-2] for name in nearest if nearest[name] != calibrated[name] and name.endswith(".weight")
    }
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_moments_that_say_nothing_are_told(tmp_path: Path) -> None:
    """The second half of OPT's block sees zeros where a bias silences the first."""
    base, adapter = save_family("opt", tmp_path)
    name = "model.decoder.layers.0.fc1.bias"
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({name: torch.full((128,), -1e4)}))
    plan = plan_of(base, adapter, tmp_path, CALIBRATED)
    facts = made_of(plan, tmp_path, tokens=windows_of(6)).facts["layers"]
    silent = {name: found["fallback"] for name, found in facts.items() if "fallback" in found}
    assert silent == {"model.decoder.layers.0.fc2.weight": "the second moments of its inputs are singular"}


def test_a_layer_that_no_token_reaches_is_told_so(tmp_path: Path) -> None:
    class Half(torch.nn.Module):
        """A block that uses one of its layers."""

        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            """Leave the other one out."""
            return hidden + self.used(hidden)

    batches = batches_of(windows_of(3).windows)
    hidden = Activations(batches, 8, tmp_path, 1 << 20)
    for number, batch in enumerate(batches):
        hidden[number] = torch.randn(*batch.tokens.shape, 8)
    told: dict[str, int] = {}

    def round_one(name: str, inputs: InputStatistics) -> torch.Tensor | None:
        told[name] = inputs.tokens
        return torch.zeros(8, 8) if name == "used" else None

    trained, rounded = Stream(Half(), hidden), Stream(Half(), hidden)
    whole = Tokens(batches, [Call((), {})] * len(batches), torch.device("cpu"))
    round_block(trained, rounded, whole, ["idle", "used"], round_one)
    assert told == {"used": sum(int(batch.valid.sum()) for batch in batches), "idle": 0}
    assert not rounded.block.used.weight.any()
    assert trained.block.used.weight.any()


def test_inputs_that_are_parts_of_one_another_have_moments_of_their_own(tmp_path: Path) -> None:
    class Split(torch.nn.Module):
        """Two layers whose inputs begin at the same place in memory."""

        def __init__(self) -> None:
            super().__init__()
            self.whole, self.part = torch.nn.Linear(8, 8), torch.nn.Linear(4, 8)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            """Give the second layer the first half."""
            return self.whole(hidden) + self.part(hidden[..., :4])

    batches = batches_of(windows_of(3).windows)
    hidden = Activations(batches, 8, tmp_path, 1 << 20)
    for number, batch in enumerate(batches):
        hidden[number] = torch.randn(*batch.tokens.shape, 8)
    shapes: dict[str, tuple[int, ...]] = {}

    def round_one(name: str, inputs: InputStatistics) -> None:
        shapes[name] = tuple(inputs.hessian.shape)

    whole = Tokens(batches, [Call((), {})] * len(batches), torch.device("cpu"))
    round_block(Stream(Split(), hidden), Stream(Split(), hidden), whole, ["whole", "part"], round_one)
    assert shapes == {"whole": (8, 8), "part": (4, 4)}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "phi3"])
def test_other_families_are_rounded_and_built(family: str, tmp_path: Path) -> None:
    """Layers that are stored [in, out], fused layers, and experts, which stay dense."""
    base, adapter = save_family(family, tmp_path)
    plan = plan_of(base, adapter, tmp_path, CALIBRATED)
    made = made_of(plan, tmp_path, tokens=windows_of(24))
    assert not any("fallback" in found for found in made.facts["layers"].values())
    assert not any("expert" in name for name in made.parts)
    assert all(found["output_error"] < 0.15 for found in made.facts["layers"].values())
    build(plan, made, 0, tmp_path)
    shipped = tensors_of(tmp_path / "nf4-calibrated")
    assert {name: shipped[name] for name in made.parts} == blocks(made)


def test_kept_layers_stay_dense_and_are_not_told_of(pico: Pico, tmp_path: Path) -> None:
    plan = pico_plan(pico, tmp_path, {**CALIBRATED, "keep": ["*.o_proj", "*.1.mlp.*"]})
    layers = made_of(plan, tmp_path).facts["layers"]
    assert len(layers) == 14 - 2 - 3
    assert not any("o_proj" in name or "layers.1.mlp" in name for name in layers)


@pytest.mark.parametrize("form", ["w4a16", "w8a8", "fp4"])
def test_other_grids_and_the_original_base(pico: Pico, tmp_path: Path, form: str) -> None:
    artifact: dict[str, Any] = {"format": form, "rounding": "calibrated", "onto": "original"}
    if form == "w4a16":
        artifact["options"] = {"group_size": 32}
    made = made_of(pico_plan(pico, tmp_path, artifact), tmp_path)
    bound = {"w4a16": 0.15, "w8a8": 0.02, "fp4": 0.2}[form]
    assert len(made.facts["layers"]) == 14
    assert all(found["output_error"] < bound for found in made.facts["layers"].values())


def test_an_unknown_architecture_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.XLMConfig(
        vocab_size=96, emb_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64, n_langs=1
    )
    transformers.XLMWithLMHeadModel(config).save_pretrained(tmp_path / "base")
    plan = plan_of(tmp_path / "base", None, tmp_path / "out", CALIBRATED)
    with pytest.raises(Refused, match=r"XLM\w+") as error:
        made_of(plan, tmp_path / "out")
    assert error.value.exit_code == 4
    assert "without calibration" in error.value.hint
    assert not list((tmp_path / "out").iterdir())


def test_another_thing_in_the_folders_place_is_named(
    pico: Pico, undisturbed: tuple[Path, Made], tmp_path: Path
) -> None:
    name = next(undisturbed[0].glob("*.calibrated")).name
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="exists and is no folder"):
        made_of(pico_plan(pico, tmp_path, CALIBRATED), tmp_path)
    assert (tmp_path / name).read_text() == "mine"
