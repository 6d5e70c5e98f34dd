"""What can be chosen on the grid of a format: assembled, decoded and read back for every format that tells a grid."""

from __future__ import annotations

import json
import math
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qlora_export.catalog import FORMATS
from qlora_export.formats.base import Chosen, CorrectedFormat, GridFormat, LevelGrid
from qlora_export.formats.registry import load_format
from qlora_export.quant import double_quant
from qlora_export.quant.rounding.grid import e4m3_scales, power_of_two_scales
from qlora_export.tensors.dtypes import ITEM_BYTES, round_to
from qlora_export.types import Options, TensorSpec, TrainingQuantization
from tests.formats.compressed_tensors.test_compressed_tensors import NAMES, decompressed
from tests.formats.test_contract import cuts, encode
from tests.helpers.values import random_values

SHAPES = [(1, 64), (7, 640), (37, 256), (24, 384), (129, 128), (3, 88), (300, 256)]
GRID_FORMATS: list[tuple[str, dict[str, Any]]] = [
    (name, {})
    for name in FORMATS
    if isinstance(form := load_format(name, TrainingQuantization()), GridFormat)
    and not isinstance(form, CorrectedFormat)
]
CASES: list[tuple[str, Options]] = [*GRID_FORMATS, ("w4a16", {"group_size": 32}), ("w4a16", {"group_size": 64})]
CASES += [("w4a16", {"group_size": 32, "symmetric": False})]
TWO_ZEROS = ("fp4", "fp8", "fp8-block", "nvfp4a16", "mxfp4a16")
TRAININGS = {
    "double": TrainingQuantization(),
    "single": TrainingQuantization(double_quant=False, block_size=32),
    "fp16": TrainingQuantization(storage_dtype="F16", block_size=128),
}


def chosen_at_random(spec: TensorSpec, grid: LevelGrid) -> Chosen:
    """Any codes, and scales that can be stored."""
    generator = np.random.default_rng(spec.size)
    codes = generator.integers(0, len(grid.levels), spec.shape).astype(np.uint8)
    blocks = -(-spec.rows // grid.height)
    wanted = np.abs(random_values(blocks, spec.columns // grid.group, seed=spec.rows)) + np.float32(0.01)
    if grid.scales in ("F8_E4M3", "F8_E8M0"):
        rule = power_of_two_scales if grid.scales == "F8_E8M0" else e4m3_scales(grid.global_scale)
        return Chosen(codes, rule(torch.from_numpy(wanted)).numpy())
    if grid.scales != "nested":
        return Chosen(codes, round_to(wanted.reshape(-1), grid.scales).reshape(wanted.shape))
    flat = wanted.reshape(-1)
    offset = double_quant.mean(flat)
    stored, nested_absmax = double_quant.encode(flat, offset)
    scales = double_quant.decode(stored, nested_absmax, offset).reshape(wanted.shape)
    return Chosen(codes, scales, float(offset), nested_absmax)


def assemble(form: GridFormat, spec: TensorSpec, chosen: Chosen) -> dict[str, Any]:
    """The parts, each of whose bytes is written once."""
    sizes = {part.name: math.prod(part.shape) * ITEM_BYTES[part.dtype] for part in form.parts(spec)}
    raw = {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
    written = {name: np.zeros(size, np.int64) for name, size in sizes.items()}
    for piece in form.assemble(spec, chosen):
        place = slice(piece.offset, piece.offset + piece.data.nbytes)
        raw[piece.part][place] = piece.data.reshape(-1).view(np.uint8)
        written[piece.part][place] += 1
    assert all((counts == 1).all() for counts in written.values())
    return raw


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_what_was_chosen_is_what_is_shipped(name: str, options: Options, shape: tuple[int, int], training: str) -> None:
    form: Any = load_format(name, TRAININGS[training], options)
    spec = TensorSpec("x.weight", "BF16", shape)
    if form.obstacle(spec, False) is not None or (grid := form.grid(spec)) is None:
        pytest.skip("the shape has no whole groups")
    assert list(grid.levels) == sorted(grid.levels)
    assert shape[1] % grid.group == 0
    chosen = chosen_at_random(spec, grid)
    raw = assemble(form, spec, chosen)
    levels = np.array(grid.levels, np.float32)
    scales = chosen.scales.repeat(grid.group, axis=1).repeat(grid.height, axis=0)[: spec.rows]
    found = form.decode(spec, raw, range(spec.rows)).reshape(shape)
    # bitsandbytes multiplies codes by the absmax first, and then by what a level is of it.
    np.testing.assert_allclose(found, levels[chosen.codes] * scales, rtol=2.0**-22 if name == "int8" else 0)
    back = form.chosen(spec, raw)
    np.testing.assert_array_equal(levels[back.codes], levels[chosen.codes])
    assert back.scales.tobytes() == chosen.scales.tobytes()
    assert back.offset == chosen.offset
    again = assemble(form, spec, back)
    if len(set(grid.levels)) == len(grid.levels):  # fp4 has two zeros
        assert {name: part.tobytes() for name, part in again.items()} == {k: v.tobytes() for k, v in raw.items()}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_what_the_format_itself_rounded_comes_back_to_the_byte(name: str, options: Options, training: str) -> None:
    """For NF4 that is the base of training: codes, absmax, their second level and its offset."""
    form: Any = load_format(name, TRAININGS[training], options)
    for rows, columns in ((5, 640), (300, 256)):
        spec = TensorSpec("x.weight", "BF16", (rows, columns))
        values = random_values(rows, columns, seed=rows)
        raw = encode(form, spec, values.reshape(-1), [0, rows])
        if name == "awq" or "symmetric" in options:  # has zero points of its own
            continue
        found = assemble(form, spec, form.chosen(spec, raw))
        if name in TWO_ZEROS:
            ours, theirs = (form.decode(spec, parts, range(rows)) for parts in (found, raw))
            np.testing.assert_array_equal(ours, theirs)
            continue
        assert {part: raw[part].tobytes() for part in raw} == {part: found[part].tobytes() for part in found}


@pytest.mark.parametrize("training", ["double", "single"])
@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-adapter"])
def test_bitsandbytes_reads_the_same_values(name: str, training: str) -> None:
    form: Any = load_format(name, TRAININGS[training])
    for shape in ((9, 128), (300, 256)):
        spec = TensorSpec("x.weight", "BF16", shape)
        chosen = chosen_at_random(spec, form.grid(spec))
        raw = {part: torch.from_numpy(data) for part, data in assemble(form, spec, chosen).items()}
        state = {
            part.name.removeprefix("x.weight."): raw[part.name].view(
                torch.uint8 if part.dtype == "U8" else torch.float32
            )
            for part in form.parts(spec)
        }
        stated = json.loads(state[form.state_suffix].numpy().tobytes())
        assert stated["shape"] == list(shape)
        found = bnb.QuantState.from_dict({key: state[key] for key in state if key != "x.weight"}, torch.device("cpu"))
        found.dtype = torch.float32
        theirs = bnb.dequantize_4bit(raw["x.weight"].reshape(-1, 1), found).numpy()
        np.testing.assert_array_equal(
            theirs, form.decode(spec, assemble(form, spec, chosen), range(shape[0])).reshape(shape)
        )


def test_a_layer_of_bitsandbytes_reads_the_same_int8() -> None:
    form: Any = load_format("int8", TrainingQuantization())
    spec = TensorSpec("x.weight", "BF16", (37, 88))
    raw = assemble(form, spec, chosen_at_random(spec, form.grid(spec)))
    codes = torch.from_numpy(raw["x.weight"]).view(torch.int8).reshape(37, 88)
    theirs = bnb.int8_vectorwise_dequant(codes, torch.from_numpy(raw["x.SCB"]).view(torch.float32))
    np.testing.assert_array_equal(theirs.numpy(), form.decode(spec, raw, range(37)).reshape(37, 88))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[("w4a16", {"group_size": size}) for size in (32, 64, 128)],
        ("w4a16", {"symmetric": False}),
        *[(name, {}) for name in ("w8a16", "w8a8", "fp8", "fp8-block", "nvfp4a16", "mxfp4a16")],
        ("nvfp4a16", {"global_scale": 1024}),
    ],
    ids=str,
)
def test_compressed_tensors_reads_the_same_values(name: str, options: Options) -> None:
    form: Any = load_format(name, TrainingQuantization(), options)
    for shape in ((9, 128), (33, 384), (300, 256)):
        spec = TensorSpec("x.weight", "BF16", shape)
        raw = assemble(form, spec, chosen_at_random(spec, form.grid(spec)))
        dtypes = {name: dtype for dtype, name in NAMES.items()}
        state = {
            part.name.removeprefix("x."): torch.from_numpy(raw[part.name]).view(dtypes[part.dtype]).reshape(part.shape)
            for part in form.parts(spec)
        }
        ours = torch.from_numpy(form.decode(spec, raw, range(shape[0])).reshape(shape)).bfloat16()
        assert torch.equal(ours, decompressed(form, state))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "nf4-adapter"], ids=str)
def test_search_leaves_less_than_nearest_whatever_the_cut(name: str, options: Options, dtype: str) -> None:
    training = TrainingQuantization(storage_dtype=dtype)
    plain: Any = load_format(name, training, options)
    assert "search" in plain.roundings
    searched = plain.rounded("search", training, 0)
    spec = TensorSpec("x.weight", "BF16", (296, 256))
    values = round_to(random_values(*spec.shape).reshape(-1), dtype)
    values[:512] = 0
    whole = encode(searched, spec, values, [0, spec.rows])
    pieces = encode(searched, spec, values, cuts(searched, spec, 1))
    assert {part: raw.tobytes() for part, raw in pieces.items()} == {part: raw.tobytes() for part, raw in whole.items()}
    least, most = (
        np.square(form.decode(spec, encode(form, spec, values, [0, spec.rows]), range(spec.rows)) - values).sum()
        for form in (searched, plain)
    )
    assert least < most
