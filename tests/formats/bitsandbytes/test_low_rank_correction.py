"""nf4-lowrank: the rank that a budget holds, where the factors lie, and what is decoded from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qlora_export.errors import UsageError
from qlora_export.formats.base import CorrectedFormat
from qlora_export.formats.bitsandbytes.low_rank_correction import WEIGHTS_FILE
from qlora_export.formats.registry import load_format
from qlora_export.formats.served_weight import served_rows
from qlora_export.tensors.dtypes import round_to, widen
from qlora_export.types import TensorSpec, TrainingQuantization
from tests.formats.test_contract import encode
from tests.helpers.values import random_values

LAYERS = {"model.a": TensorSpec("a.weight", "BF16", (96, 128)), "model.b": TensorSpec("b.weight", "BF16", (64, 192))}


def corrected(layers: dict[str, TensorSpec] = LAYERS, **options: Any) -> Any:
    """The format with these options, for these layers."""
    form = load_format("nf4-lowrank", TrainingQuantization(), options)
    assert isinstance(form, CorrectedFormat)
    return form.corrected(layers)


@pytest.mark.parametrize(("size", "rank"), [(4096, 12), (8192, 25)])
def test_the_usual_budget(size: int, rank: int) -> None:
    spec = TensorSpec("q.weight", "BF16", (size, size))
    form = corrected({"q": spec})
    assert form.rank == rank
    bits = 8 * sum(int(np.prod(part.shape)) * 2 for part in form.parts(spec) if part.file)
    assert bits / spec.size <= 0.1 < bits / spec.size * (rank + 1) / rank


def test_one_rank_for_all_layers_within_the_budget() -> None:
    weights, both = 96 * 128 + 64 * 192, 96 + 128 + 64 + 192
    for rank in (1, 2, 7):
        bits = 16 * both * rank / weights
        assert corrected(correction_bits=bits).rank == rank
        assert corrected(correction_bits=bits * 1.05).rank == rank
    assert corrected(rank=5).rank == 5


def test_a_budget_without_room_is_an_error_with_a_way_out() -> None:
    with pytest.raises(UsageError, match="correction_bits 0.1 hold no component") as caught:
        corrected()
    hint = str(caught.value.hint)
    needed = float(hint.partition("correction_bits: ")[2].partition("}")[0])
    assert corrected(correction_bits=needed).rank == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "correction_bits": 0.5}, "not both"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"correction_bits": 0}, "correction_bits is 0"),
        ({"correction_bits": float("nan")}, "correction_bits is nan"),
        ({"correction_bits": float("inf")}, "correction_bits is inf"),
        ({"correction_bits": "much"}, "correction_bits is 'much'"),
        ({"bits": 1}, "has no option 'bits'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_format("nf4-lowrank", TrainingQuantization(), options)


def test_factors_lie_in_a_file_of_their_own_by_live_names() -> None:
    form, spec = corrected(rank=3), LAYERS["model.a"]
    beside = [(part.name, part.dtype, part.shape) for part in form.parts(spec) if part.file == WEIGHTS_FILE]
    assert beside == [
        ("base_model.model.model.a.lora_A.weight", "BF16", (3, 128)),
        ("base_model.model.model.a.lora_B.weight", "BF16", (96, 3)),
    ]
    plain = load_format("nf4", TrainingQuantization())
    assert tuple(part for part in form.parts(spec) if not part.file) == plain.parts(spec)
    assert form.parts(TensorSpec("other.weight", "BF16", (96, 128))) == plain.parts(
        TensorSpec("other.weight", "BF16", (96, 128))
    )
    config = form.adapter_config()
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 3, ["model.a", "model.b"])


def test_what_no_calibration_decided_has_factors_of_zeros() -> None:
    form, spec = corrected(rank=3), LAYERS["model.b"]
    values = random_values(*spec.shape).reshape(-1)
    raw = encode(form, spec, values, [0, 16, spec.rows])
    assert not any(raw[part.name].any() for part in form.parts(spec) if part.file)
    plain = load_format("nf4", TrainingQuantization())
    expected = encode(plain, spec, values, [0, spec.rows])
    assert {name: raw[name].tobytes() for name in expected} == {name: part.tobytes() for name, part in expected.items()}


def test_what_serving_multiplies_with_is_the_rounded_weight_and_the_product() -> None:
    form, spec = corrected(rank=3), LAYERS["model.a"]
    raw = encode(form, spec, random_values(*spec.shape).reshape(-1), [0, spec.rows])
    b, a = random_values(96, 3, seed=1), random_values(3, 128, seed=2)
    for piece in form.factors(spec, b, a):
        raw[piece.part] = piece.data
    stored_a, stored_b = (widen(raw[part.name], "BF16").reshape(part.shape) for part in form.parts(spec)[-2:])
    np.testing.assert_allclose(stored_a, a, rtol=2**-8)
    product = stored_b.astype(np.float64) @ stored_a
    weights = form.stored.decode(spec, raw, range(96))
    exact = weights.reshape(spec.shape) + product
    np.testing.assert_allclose(form.decode(spec, raw, range(96)).reshape(spec.shape), exact, atol=1e-8)
    served = round_to(weights.copy(), "BF16").reshape(spec.shape) + product
    assert np.abs(served - exact).max() > 1e-6
    np.testing.assert_allclose(served_rows(form, spec, raw, range(96), "BF16").reshape(spec.shape), served, atol=1e-8)
    tail = served_rows(form, spec, raw, range(32, 64), "BF16").reshape(32, 128)
    np.testing.assert_allclose(tail, served[32:64], atol=1e-8)
