"""A whole layer: what every step may only improve, what a small delta keeps, and one small layer to the last code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from qlora_export.quant.rounding.grid import Grid, fitted_double_quant_scales, sixteen_bit_scales
from qlora_export.quant.rounding.scale_search import absmax_scales
from qlora_export.quant.rounding.solving import Layer, Method, Start, solve
from qlora_export.quant.rounding.target import retention
from tests.quant.rounding.cases import INT4_LEVELS, NF4_LEVELS, hessian_of, objective, weights_of

FREE = Grid(NF4_LEVELS, 64, lambda scales: scales)


def fresh(scales: Tensor) -> Grid:
    """What double quantisation of these scales can store."""
    return Grid(NF4_LEVELS, 64, fitted_double_quant_scales(scales))


def trained(rows: int, columns: int, seed: int) -> tuple[Tensor, list[Start]]:
    """A base that lies on the grid of training, and the starts that a layer on it has."""
    weights = weights_of(rows, columns, seed=seed)
    grid = fresh(absmax_scales(weights, FREE))
    scales = grid.rule(absmax_scales(weights, FREE))
    return grid.decode(grid.nearest(weights, scales), scales), [(grid, scales), fresh]


def layer_of(base: Tensor, size: float, seed: int = 0, disturbed: float = 0.0) -> Layer:
    """A base with a delta of rank 4 and a relative size, and inputs that the prefix disturbs."""
    rows, columns = base.shape
    delta = weights_of(rows, 4, seed=seed + 1) @ weights_of(4, columns, seed=seed + 2)
    delta *= size * base.norm() / delta.norm().clamp_min(1e-30)
    hessian = hessian_of(columns, seed=seed)
    return Layer(base, delta, hessian, hessian * (1 - disturbed))


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (3, 128), (37, 192)])
def test_without_a_delta_the_base_comes_back(rows: int, columns: int) -> None:
    base, starts = trained(rows, columns, seed=rows)
    grid, scales = starts[0]  # type: ignore[misc]
    found = solve(layer_of(base, 0), FREE, starts, Method())
    assert found is not None
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.codes, grid.nearest(base, scales))
    assert torch.equal(found.values, base)
    assert (found.gain, found.shrinkage) == (1, 0)


@pytest.mark.parametrize("size", [0.01, 0.03, 0.1])
def test_a_small_delta_survives_where_nearest_drops_it(size: float) -> None:
    base, starts = trained(64, 128, seed=3)
    layer = layer_of(base, size)
    found = solve(layer, FREE, starts, Method())
    assert found is not None
    plain = fresh(absmax_scales(layer.merged, FREE))
    usual = plain.rule(absmax_scales(layer.merged, FREE))
    nearest = plain.decode(plain.nearest(layer.merged, usual), usual)
    if size < 0.1:
        assert retention(nearest - base, layer.delta, layer.hessian) < 0.5
    assert retention(found.values - base, layer.delta, layer.hessian) == pytest.approx(1, abs=0.25)
    if size > 0.01:  # below that a delta that is kept costs more error than one that is dropped whole
        better = objective(layer.merged, layer.hessian, found.values).sum()
        assert better < 0.9 * objective(layer.merged, layer.hessian, nearest).sum()


@pytest.mark.parametrize("levels", [NF4_LEVELS, INT4_LEVELS])
def test_every_step_helps(levels: tuple[float, ...]) -> None:
    base = weights_of(24, 128, seed=5)
    free = Grid(levels, 64, lambda scales: scales)
    stored = dataclasses.replace(free, rule=sixteen_bit_scales(torch.bfloat16))
    layer = layer_of(base, 0.05)
    errors = []
    for method in (Method(0, 0, False, 1), Method(0, 1, False, 1), Method(0, 2, False, 1), Method(0, 2, True, 1)):
        found = solve(layer, free, [(stored, None)], method)
        assert found is not None
        assert torch.equal(stored.rule(found.scales), found.scales)
        errors.append(objective(layer.merged, layer.hessian, found.values).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.1 * errors[-1]


def test_more_rounds_bring_the_delta_nearer() -> None:
    base, starts = trained(48, 128, seed=8)
    layer = layer_of(base, 0.01)
    once, often = (solve(layer, FREE, starts, Method(rounds=rounds)) for rounds in (1, 3))
    assert once is not None
    assert often is not None
    assert abs(often.shrinkage) <= abs(once.shrinkage)


def test_a_disturbed_prefix_moves_the_target() -> None:
    """Inputs that grew by a quarter ask for smaller weights."""
    base = weights_of(16, 192)
    hessian = hessian_of(192) + 1e-3 * torch.eye(192)
    layer = Layer(base, torch.zeros_like(base), hessian, hessian / 1.25)
    free = Grid(NF4_LEVELS, 64, lambda scales: scales)
    found = solve(layer, free, [(free, None)], Method())
    plain = solve(layer, free, [(free, None)], Method(correction=0))
    assert found is not None
    assert plain is not None
    assert found.values.norm() < 0.9 * plain.values.norm()


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_layer_whose_moments_say_nothing_has_no_solution(bad: float) -> None:
    base = weights_of(4, 64)
    hessian = torch.full((64, 64), bad)
    assert solve(Layer(base, base, hessian, hessian), FREE, [fresh], Method()) is None


def test_the_better_of_two_starts_is_taken() -> None:
    base, starts = trained(32, 128, seed=1)
    moved = weights_of(32, 128, seed=2) * 0.2
    kept = solve(layer_of(base, 0.01), FREE, starts, Method())
    left = solve(Layer(moved, torch.zeros_like(moved), hessian_of(128), hessian_of(128)), FREE, starts, Method())
    assert kept is not None
    assert left is not None
    assert kept.grid is starts[0][0]  # type: ignore[index]
    assert left.grid is not starts[0][0]  # type: ignore[index]


def golden_layer() -> Layer:
    """Weights and inputs of small whole numbers, the same on every machine."""
    rows, columns = torch.arange(3)[:, None], torch.arange(32)[None, :]
    base = ((rows * 37 + columns * 11) % 23 - 11) / 64
    delta = ((rows * 5 + columns * 3) % 7 - 3) / 512
    tokens, channels = torch.arange(48)[:, None], torch.arange(32)[None, :]
    inputs = ((tokens * 29 + channels * 17 + tokens * channels) % 31 - 15) / 8 + (channels % 5 == 0) * (tokens % 3)
    hessian = inputs.T @ inputs / 48
    return Layer(base, delta, hessian, hessian + torch.eye(32) / 16)


GOLDEN = {
    "nf4": (
        NF4_LEVELS,
        "07e6e6d5d4d4c3b2b1b190806f6e5e5f c0a0906f5f4e4e4e3d2c1c1c190806f5 2d1b1a191806f6e5e4e3e2e1d1d0b1a0",
        "0.2421875 0.1962891 0.1748047 0.1865234 0.1923828 0.1679688",
    ),
    "int4": (
        INT4_LEVELS,
        "08e7e7d6c6c5b5a4b3a3a2828f7e7d7f b2a1918f7f6e6d5d5c4b3b3a292918f6 4c3b2a291908f7f7f6f4e4e2d2c1a1a0",
        "0.02966309 0.02746582 0.02490234 0.02587891 0.02441406 0.01928711",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_codes_and_scales_of_a_small_layer_are_the_committed_ones(name: str) -> None:
    levels, codes, scales = GOLDEN[name]
    free = Grid(levels, 16, lambda values: values)
    stored = dataclasses.replace(free, rule=sixteen_bit_scales(torch.bfloat16))
    found = solve(golden_layer(), free, [(stored, None)], Method())
    assert found is not None
    assert " ".join("".join(f"{code:x}" for code in row) for row in found.codes.tolist()) == codes
    assert " ".join(f"{scale:.7g}" for scale in found.scales.reshape(-1).tolist()) == scales
