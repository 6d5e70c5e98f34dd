"""One layer of every format that tells a grid: never worse than rounded to nearest, and refused where that is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.blocks.live_parameters import LayerValues
from qlora_export.engine.calibration.hessian import InputStatistics
from qlora_export.engine.calibration.round_layer import RoundedLayer, round_layer
from qlora_export.errors import InputError
from qlora_export.formats.registry import load_format
from qlora_export.planning.survival_estimate import round_trip
from qlora_export.quant.rounding.solving import Method
from qlora_export.tensors.dtypes import round_to
from qlora_export.types import Float32, TensorSpec, TrainingQuantization
from tests.formats.test_grids import GRID_FORMATS
from tests.helpers.values import random_values

ROWS, COLUMNS = 136, 128


def inputs_of(seed: int) -> InputStatistics:
    """What correlated inputs of channels of unlike sizes leave."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(400, COLUMNS)) @ generator.normal(size=(COLUMNS, COLUMNS)) / COLUMNS**0.5
    inputs *= (1 + np.arange(COLUMNS)) ** -0.4
    seen = torch.from_numpy(inputs.astype(np.float32))
    statistics = InputStatistics(COLUMNS, torch.device("cpu"))
    statistics.add(seen, seen)
    return statistics


def output_error(found: Float32, wanted: Float32, inputs: InputStatistics) -> float:
    """tr (Q - T) H (Q - T)^T in float64."""
    difference = (found - wanted).astype(np.float64)
    return float((difference @ inputs.hessian.double().numpy() * difference).sum())


@pytest.mark.sampled(1, per="name")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", [name for name, _ in GRID_FORMATS if name != "nf4-adapter"])
def test_without_a_delta_on_undisturbed_inputs_it_is_never_worse_than_nearest(name: str, seed: int) -> None:
    form: Any = load_format(name, TrainingQuantization())
    spec = TensorSpec("x.weight", "BF16", (ROWS, COLUMNS))
    weights, inputs = random_values(ROWS, COLUMNS, seed=seed), inputs_of(seed)
    made = round_layer(form, LayerValues(spec, weights, weights.copy(), None), inputs, Method(), "BF16")
    assert isinstance(made, RoundedLayer)
    nearest = round_to(round_trip(form, spec, weights.reshape(-1).copy()), "BF16").reshape(ROWS, COLUMNS)
    assert output_error(made.values, weights, inputs) < 0.9 * output_error(nearest, weights, inputs)
    decoded = round_to(form.decode(spec, made.parts, range(ROWS)), "BF16").reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(decoded, made.values)


def test_what_the_format_refuses_is_refused_before_it_is_clipped() -> None:
    form: Any = load_format("nvfp4a16", TrainingQuantization())
    spec = TensorSpec("x.weight", "BF16", (ROWS, COLUMNS))
    weights = random_values(ROWS, COLUMNS)
    weights[7, 3] = 11
    with pytest.raises(
        InputError, match="x.weight holds 11, nvfp4a16 with a global scale of 256 ends at 10.5"
    ) as caught:
        round_layer(form, LayerValues(spec, weights, weights, None), inputs_of(0), Method(), "BF16")
    assert caught.value.hint == "options: {global_scale: 128} for this artifact"
