from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from qlora_export.drift.comparison.costs import Cost, Span, cost_of, fp32_cost, linear_modules, low_rank_cost
from qlora_export.drift.comparison.rows import Comparison, Measured
from qlora_export.planning.make import make_plan
from qlora_export.runtimes.loading import load_model
from tests.helpers.pico import RecipeMaker, save_base

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1}


def measured(compared: Comparison, name: str) -> Measured:
    found = next(row.measured for row in compared.rows if row.name == name)
    assert found is not None
    return found


def cost(compared: Comparison, name: str) -> Cost:
    found = measured(compared, name).cost
    assert found is not None
    return found


def stored_bytes(folder: Path) -> int:
    """Bytes of everything that belongs to the linear layers of a folder, and of an adapter in it."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if "_proj" in name:
                    tensor = file.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
    return total


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "nf4-nearest", "nf4-adapter"])
def test_the_bytes_are_those_of_the_folder(name: str, compared: Comparison) -> None:
    found = cost(compared, name)
    assert found.weight_bytes == stored_bytes(measured(compared, name).entry.artifact.path)
    assert found.bits_per_weight == pytest.approx(8 * found.weight_bytes / compared.weights)


def test_the_bits_are_those_of_the_formats(compared: Comparison) -> None:
    assert cost(compared, "fp32").bits_per_weight == 32
    assert cost(compared, "bf16").bits_per_weight == 16
    assert 8 < cost(compared, "int8").bits_per_weight < 9
    beside = compared.low_rank
    assert beside is not None
    kept = cost(compared, "nf4-adapter").bits_per_weight - cost(compared, "nf4-nearest").bits_per_weight
    assert kept == pytest.approx(beside.bits_per_weight)


def test_multiplications_are_those_that_pytorch_counts(compared: Comparison) -> None:
    model = load_model(measured(compared, "fp32").entry.artifact.path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    by_operation = counter.get_flop_counts()["Global"]
    linear = sum(count for operation, count in by_operation.items() if str(operation) in ("aten.mm", "aten.addmm"))
    assert cost(compared, "fp32").flops_per_token == linear == compared.fp32_cost.flops_per_token


def test_weight_only_formats_multiply_as_often_and_an_adapter_more(compared: Comparison) -> None:
    whole = cost(compared, "fp32").flops_per_token
    assert cost(compared, "bf16").flops_per_token == cost(compared, "nf4-nearest").flops_per_token == whole
    assert compared.low_rank is not None
    more = 2 * compared.low_rank.factored_parameters
    assert cost(compared, "nf4-adapter").flops_per_token == whole + more
    assert [cost(compared, name).arithmetic for name in ("bf16", "int8", "nf4-nearest")] == ["float", "int8", "float"]


def test_a_correction_beside_the_weights_is_stored_and_multiplied(tmp_path: Path, pico_recipe: RecipeMaker) -> None:
    artifacts = [{"format": "nf4", "rounding": "nearest"}, {"format": "nf4-lowrank", "options": {"rank": 3}}]
    plan = make_plan(pico_recipe(*artifacts, calibration={"text": "calibration.txt"}), tmp_path)
    linear = linear_modules(plan.artifacts)
    plain, corrected = (cost_of(plan, item, linear) for item in plan.artifacts)
    shapes = [plan.model.outputs[f"{module}.weight"].spec.shape for module in linear]
    factors = 3 * sum(rows + columns for rows, columns in shapes)
    assert corrected.flops_per_token == plain.flops_per_token + 2 * factors
    assert corrected.weight_bytes == plain.weight_bytes + 2 * factors
    assert corrected.bytes_per_token == plain.bytes_per_token + 2 * factors


def test_a_token_reads_every_weight_and_one_row_of_the_embedding(compared: Comparison) -> None:
    found = cost(compared, "fp32")
    embedding = 4 * 2048 * 64
    whole = measured(compared, "fp32").entry.artifact.path / "model.safetensors"
    with safe_open(whole, "pt") as file:
        stored = sum(file.get_tensor(name).numel() * 4 for name in file.keys())  # noqa: SIM118
    assert found.bytes_per_token == stored - embedding + 4 * 64
    assert cost(compared, "nf4-nearest").bytes_per_token < found.bytes_per_token


def test_the_adapters_arithmetic(compared: Comparison) -> None:
    found = compared.low_rank
    assert found is not None
    shapes = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (88, 64), (88, 64), (64, 88)]
    assert found.matrices == len(shapes)
    assert found.ranks == Span(4, 4)
    assert found.full_parameters == compared.weights == sum(rows * columns for rows, columns in shapes)
    assert found.factored_parameters == sum(4 * (rows + columns) for rows, columns in shapes)
    assert found.bytes == 4 * found.factored_parameters
    assert [found.break_even_rank.min, found.break_even_rank.max] == pytest.approx([64 * 32 / 96, 88 * 64 / 152])


def test_a_tied_head_is_read_and_multiplied(tmp_path: Path, pico_recipe: RecipeMaker) -> None:
    base = save_base(tmp_path / "tied", seed=3, tie_word_embeddings=True)
    plan = make_plan(pico_recipe("bf16", base=str(base), adapter=None), tmp_path / "out")
    linear = linear_modules(make_plan(pico_recipe("int8", base=str(base), adapter=None), tmp_path / "out").artifacts)
    found = cost_of(plan, plan.artifacts[0], linear)
    assert found.bytes_per_token == plan.artifacts[0].layout.total_bytes - 8 - _header_bytes(plan.artifacts[0])
    assert found.flops_per_token == 2 * (2048 * 64 + fp32_cost(plan, linear)[1].weight_bytes // 4)
    assert low_rank_cost(plan, linear) is None


def _header_bytes(item: object) -> int:
    shards = item.layout.shards  # type: ignore[attr-defined]
    return sum(len(shard.header) for shard in shards) - 8
