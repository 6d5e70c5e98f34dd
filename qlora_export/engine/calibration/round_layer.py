"""One linear layer: from its values, the grid of its format and the statistics of its inputs to the bytes it ships."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_export.blocks.live_parameters import BaseGrid, LayerValues
from qlora_export.engine.calibration.hessian import InputStatistics
from qlora_export.formats.base import Chosen, CorrectedFormat, GridFormat, LevelGrid
from qlora_export.formats.served_weight import served_rows
from qlora_export.quant.floats import UInt8
from qlora_export.quant.rounding.coordinate_descent import row_objective
from qlora_export.quant.rounding.grid import (
    DoubleQuantScales,
    Grid,
    ScaleRule,
    e4m3_scales,
    fitted_double_quant_scales,
    power_of_two_scales,
    sixteen_bit_scales,
)
from qlora_export.quant.rounding.low_rank_correction import low_rank_correction
from qlora_export.quant.rounding.solving import Layer, Method, Solution, Start, solve, target_of
from qlora_export.quant.rounding.target import retention
from qlora_export.types import TORCH_NAMES, Float32, TensorSpec

# What rounding to float16 and then to bfloat16 changes at most, relative to the value.
LARGEST_ROUNDING = 2.0**-8
Parts = dict[str, np.ndarray[Any, np.dtype[np.uint8]]]


@dataclass(frozen=True)
class RoundedLayer:
    """The parts of a layer, the weight [out, in] that serving multiplies with, and what is known of its error."""

    parts: Parts
    values: Float32
    facts: dict[str, Any]


def round_layer(
    form: GridFormat, found: LayerValues, inputs: InputStatistics, method: Method, compute_dtype: str
) -> RoundedLayer | str:
    """Round a layer by its statistics, or say why it cannot be; raises InputError for what the format refuses."""
    level_grid = form.grid(found.spec)
    if level_grid is None:
        return f"{found.spec.columns} columns are no multiple of the group"
    if not inputs.tokens:
        return "no token reached it"
    _require_encodable(form, found)
    device = inputs.hessian.device
    base, merged = (torch.from_numpy(values).to(device) for values in (found.base, found.merged))
    layer = Layer(base, merged - base, inputs.hessian, inputs.crossed)
    starts = _starts(level_grid, found, device)
    wanted = replace(layer, base=_on_grid(base, starts[0]))
    solution = solve(wanted, _grid(level_grid, lambda scales: scales), starts, method)
    if solution is None:
        return "the second moments of its inputs are singular"
    parts = assembled(form, found.spec, solution.grid, solution.codes, solution.scales)
    if isinstance(form, CorrectedFormat) and form.corrects(found.spec):
        plain = served(form.stored, found.spec, parts, compute_dtype)
        parts |= correction_parts(form, found.spec, plain, target_of(layer, method), layer.hessian)
    values = served(form, found.spec, parts, compute_dtype)
    facts = _facts(layer, solution, torch.from_numpy(values).to(device))
    return RoundedLayer(parts, values, facts)


def assembled(form: GridFormat, spec: TensorSpec, grid: Grid, codes: Tensor, scales: Tensor) -> Parts:
    """The bytes of every part, from codes [rows, columns] and scales [blocks, groups] on a grid."""
    nested = grid.rule if isinstance(grid.rule, DoubleQuantScales) else None
    chosen = Chosen(
        codes.to(torch.uint8).cpu().numpy(),
        np.ascontiguousarray(scales.cpu().numpy()),
        nested.offset if nested else 0.0,
        nested.nested_absmax.cpu().numpy() if nested else None,
    )
    return {
        piece.part: np.ascontiguousarray(piece.data).reshape(-1).view(np.uint8) for piece in form.assemble(spec, chosen)
    }


def served(form: GridFormat, spec: TensorSpec, parts: Parts, compute_dtype: str) -> Float32:
    """The weight [out, in] as it is multiplied with."""
    flat = served_rows(form, spec, parts, range(spec.rows), compute_dtype)
    shaped: Float32 = flat.reshape(spec.rows, spec.columns)
    return shaped


def stored_grid(level_grid: LevelGrid, chosen: Chosen) -> Grid:
    """The grid that stored parts lie on, with the second level they have."""
    if chosen.nested_absmax is None:
        return _grid(level_grid, _rule(level_grid))
    return _grid(level_grid, DoubleQuantScales(chosen.offset, torch.from_numpy(np.array(chosen.nested_absmax))))


def _require_encodable(form: GridFormat, found: LayerValues) -> None:
    """What rounding to nearest refuses, values beyond the format's range, a search would clip without a word."""
    encoder = form.open(found.spec)
    for pieces in (encoder.encode(found.merged.reshape(-1).copy(), 0), encoder.seal()):
        for _ in pieces:
            pass


def _facts(layer: Layer, solution: Solution, values: Tensor) -> dict[str, Any]:
    energy = row_objective(torch.zeros_like(values), layer.hessian, layer.merged).sum(dtype=torch.float64)
    error = row_objective(layer.merged, layer.hessian, values).sum(dtype=torch.float64)
    return {
        "output_error": float((error / energy).clamp_min(0).sqrt()) if energy > 0 else 0.0,
        "weighted_survival": retention(values - layer.base, layer.delta, layer.hessian) if layer.delta.any() else None,
        "gain": solution.gain,
        "damping": solution.damping,
    }


def _grid(level_grid: LevelGrid, rule: ScaleRule) -> Grid:
    return Grid(level_grid.levels, level_grid.group, rule, height=level_grid.height)


def _rule(level_grid: LevelGrid) -> ScaleRule:
    """What can be stored of a scale that has no second level."""
    if level_grid.scales in ("F16", "BF16"):
        return sixteen_bit_scales(getattr(torch, TORCH_NAMES[level_grid.scales]))
    if level_grid.scales == "F8_E4M3":
        return e4m3_scales(level_grid.global_scale)
    if level_grid.scales == "F8_E8M0":
        return power_of_two_scales
    return lambda scales: scales


def _starts(level_grid: LevelGrid, found: LayerValues, device: torch.device) -> list[Start]:
    """The base's own scales where it lies on the same grid, and fresh ones."""
    known, stored = None, None
    if found.base_grid is not None and _same_grid(level_grid, found.base_grid, found.spec.size):
        stored = found.base_grid.stored
        known = torch.from_numpy(stored.scales).to(device).reshape(found.spec.rows, -1)
    if level_grid.scales != "nested":
        return [(_grid(level_grid, _rule(level_grid)), known)]
    starts: list[Start] = [lambda scales: _grid(level_grid, fitted_double_quant_scales(scales))]
    if stored is not None and stored.nested_absmax is not None:
        rule = DoubleQuantScales(stored.offset, torch.from_numpy(stored.nested_absmax).to(device))
        starts.insert(0, (_grid(level_grid, rule), known))
    return starts


def _same_grid(level_grid: LevelGrid, base_grid: BaseGrid, size: int) -> bool:
    levels = tuple(float(level) for level in base_grid.grid.levels)
    return base_grid.stored.scales.size * level_grid.group == size and level_grid.levels == levels


def _on_grid(base: Tensor, start: Start) -> Tensor:
    """The base [rows, columns] as it lies on the grid that it is known to be on, before the last rounding of dtypes.

    What is shipped passes that rounding again; left in the target, it would pass for a wish to move scales.
    """
    if not isinstance(start, tuple) or start[1] is None:
        return base
    grid, scales = start
    exact = grid.decode(grid.nearest(base, scales), scales)
    return torch.where((base - exact).abs() <= LARGEST_ROUNDING * exact.abs(), exact, base)


def correction_parts(
    form: CorrectedFormat, spec: TensorSpec, rounded: Float32, target: Tensor, hessian: Tensor
) -> dict[str, UInt8]:
    """The bytes of the factors for a weight [out, in] that was rounded, by the second moments of its inputs."""
    error = target - torch.from_numpy(rounded).to(target.device)
    b, a = low_rank_correction(error, hessian, form.rank, lambda factor: factor.bfloat16().float())
    pieces = form.factors(spec, b.cpu().numpy(), a.cpu().numpy())
    return {piece.part: np.ascontiguousarray(piece.data) for piece in pieces}
