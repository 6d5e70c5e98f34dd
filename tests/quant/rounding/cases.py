"""Grids, weights and second moments of inputs that the tests of rounding share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_export.quant import ordered_codes
from qlora_export.quant.four_bit import FP4, NF4
from qlora_export.quant.rounding.grid import (
    Grid,
    ScaleRule,
    e4m3_scales,
    fitted_double_quant_scales,
    power_of_two_scales,
    sixteen_bit_scales,
)
from qlora_export.quant.rounding.scale_search import absmax_scales
from tests.helpers.values import random_values

NF4_LEVELS = tuple(float(level) for level in NF4.levels)
FP4_LEVELS = tuple(float(level) for level in FP4.levels)
INT4_LEVELS = tuple(float(level) for level in range(-8, 8))
INT8_LEVELS = tuple(float(level) for level in range(-128, 128))
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS, "int4": INT4_LEVELS, "int8": INT8_LEVELS}
LEVELS |= {"e2m1": ordered_codes.E2M1.levels, "e4m3": ordered_codes.E4M3.levels}
RULES: dict[str, ScaleRule] = {
    "bf16": sixteen_bit_scales(torch.bfloat16),
    "fp16": sixteen_bit_scales(torch.float16),
    "e4m3": e4m3_scales(256),
    "power": power_of_two_scales,
}
# How near to a tie, in parts of a scale, float32 and float64 may decide otherwise.
MARGIN = 3e-5

Float64 = NDArray[np.float64]


def weights_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Heavy-tailed weights [rows, columns]."""
    return torch.from_numpy(random_values(rows, columns, seed=seed))


def hessian_of(columns: int, seed: int = 0, tokens: int = 400) -> Tensor:
    """E[x x^T] of correlated inputs whose channels differ in size."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(tokens, columns)) @ generator.normal(size=(columns, columns)) / columns**0.5
    inputs *= (1 + np.arange(columns)) ** -0.4
    return torch.from_numpy((inputs.T @ inputs / tokens).astype(np.float32))


def grid_of(name: str, target: Tensor) -> Grid:
    """A grid by what is said of it: levels, scales, columns of a group, by rows of a block where they are several.

    A nested one has the second level that the target's absmax have.
    """
    kind, scales, shape = name.split("-")
    group, _, height = shape.partition("x")
    columns = int(group) if group != "row" else target.shape[1]
    free = Grid(LEVELS[kind], columns, lambda values: values, scales == "signed", int(height or 1))
    if scales == "nested":
        return replace(free, rule=fitted_double_quant_scales(absmax_scales(target, free)))
    return replace(free, rule=RULES[scales]) if scales in RULES else free


def of_blocks(grid: Grid, by_rows: Any) -> Any:
    """Sums over the rows that share their scales."""
    return np.add.reduceat(by_rows, np.arange(0, len(by_rows), grid.height), axis=0)


GRIDS = ["nf4-nested-64", "nf4-float-32", "int4-bf16-32", "int4-fp16-row", "int8-bf16-row"]
GRIDS += ["e4m3-bf16-row", "e4m3-fp16-64x4", "e2m1-e4m3-16", "e2m1-power-32", "int4-signed-64"]


def numbers(tensor: Tensor) -> Any:
    """As float64."""
    return tensor.double().numpy()


def objective(target: Any, hessian: Any, values: Any) -> Float64:
    """(Q - T) H (Q - T)^T of every row, in float64."""
    difference = np.asarray(values, np.float64) - np.asarray(target, np.float64)
    found: Float64 = (difference @ np.asarray(hessian, np.float64) * difference).sum(axis=1)
    return found


def nearest_level(levels: Any, value: float) -> tuple[int, float]:
    """The number of the nearest level, the lower of two, and how far the value is from a tie."""
    distances = np.abs(np.asarray(levels) - value)
    best = int(distances.argmin())
    others = np.delete(distances, best)
    return best, float(others.min() - distances[best]) / 2
