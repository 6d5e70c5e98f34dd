"""What every format promises, checked for each name in the catalog on odd shapes and several blocks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from qlora_export.catalog import FORMATS
from qlora_export.formats.base import Format
from qlora_export.formats.registry import load_format
from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.types import TensorSpec, TrainingQuantization
from tests.helpers.values import random_values

SHAPES = [(64, 64), (129, 88), (3, 5), (200, 96), (1, 1), (7, 640), (37, 256), (24, 384), (300, 256)]
# Largest error a format may leave, relative to the largest magnitude of the tensor.
BOUNDS = {
    "fp32": 0.0,
    "bf16": 2**-8,
    "fp16": 2**-11,
    "nf4": 0.17,
    "fp4": 0.17,
    "nf4-adapter": 0.17,
    "nf4-lowrank": 0.17,
}
BOUNDS |= {"int8": 0.006, "w4a16": 0.075, "w8a16": 0.009, "w8a8": 0.009, "fp8": 0.04}
BOUNDS |= {"fp8-block": 0.04, "gptq": 0.075, "awq": 0.08, "nvfp4a16": 0.18, "mxfp4a16": 0.26}


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> Format:
    return load_format(request.param, TrainingQuantization())


def encode(form: Format, spec: TensorSpec, values: Any, cuts: list[int]) -> dict[str, Any]:
    """Encode in the given blocks of rows; every planned byte must be written exactly once."""
    parts = {part.name: part for part in form.parts(spec)}
    sizes = {name: math.prod(part.shape) * ITEM_BYTES[part.dtype] for name, part in parts.items()}
    raw = {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
    written = {name: np.zeros(size, np.int64) for name, size in sizes.items()}
    encoder = form.open(spec)

    def put(pieces: Any) -> None:
        for piece in pieces:
            place = slice(piece.offset, piece.offset + piece.data.nbytes)
            raw[piece.part][place] = piece.data.reshape(-1).view(np.uint8)
            written[piece.part][place] += 1

    blocks = list(itertools.pairwise(cuts))
    for first, last in reversed(blocks):
        put(encoder.encode(values[first * spec.columns : last * spec.columns].copy(), first))
    put(encoder.seal())
    for name, counts in written.items():
        assert (counts == 1).all(), f"{name}: every planned byte is written once"
    return raw


def cuts(form: Format, spec: TensorSpec, height: int) -> list[int]:
    step = form.row_multiple(spec) * height
    return [*range(0, spec.rows, step), spec.rows]


def spec_of(form: Format, shape: tuple[int, int]) -> TensorSpec:
    """A layer of this shape, if the format can hold it."""
    spec = TensorSpec("layer.weight", "BF16", shape)
    if form.obstacle(spec, False):
        pytest.skip("the plan refuses this shape")
    return spec


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_do_not_depend_on_the_blocks(form: Format, shape: tuple[int, int]) -> None:
    spec = spec_of(form, shape)
    values = random_values(*shape).reshape(-1)
    whole = encode(form, spec, values, [0, spec.rows])
    for height in (1, 3):
        pieces = encode(form, spec, values, cuts(form, spec, height))
        assert {name: raw.tobytes() for name, raw in pieces.items()} == {k: v.tobytes() for k, v in whole.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_comes_back_within_the_bound(form: Format, shape: tuple[int, int]) -> None:
    spec = spec_of(form, shape)
    values = random_values(*shape).reshape(-1)
    raw = encode(form, spec, values, [0, spec.rows])
    decoded = form.decode(spec, raw, range(spec.rows))
    assert np.abs(decoded - values).max() <= BOUNDS[form.name] * np.abs(values).max()
    step = form.row_multiple(spec)
    if step < spec.rows:
        tail = form.decode(spec, raw, range(step, spec.rows))
        np.testing.assert_array_equal(tail, decoded[step * spec.columns :])


def test_every_format_has_a_bound_and_its_own_name(form: Format) -> None:
    assert form.name in BOUNDS
    assert form.dense_dtype in ITEM_BYTES
    assert form.quantises == (form.quantization_config([]) is not None)


def test_parts_are_named_after_the_tensor(form: Format) -> None:
    names = [part.name for part in form.parts(TensorSpec("a.b.weight", "BF16", (64, 128)))]
    assert names[0] in ("a.b.weight", "a.b.weight_packed", "a.b.qweight")
    assert all(name.startswith("a.b.") for name in names)
    assert len(set(names)) == len(names)
