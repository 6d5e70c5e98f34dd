"""Dithering onto codes against a plain version in numpy, and what it promises of zero and of the mean."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from qlora_export.quant.four_bit import NF4, pack
from qlora_export.quant.stochastic_rounding import dither, key_of

BLOCK = 64


def plain(numbers: Any, scales: Any, delta: Any, seed: int, name: str) -> tuple[Any, Any]:
    """One weight after the other, with Python's integers for random numbers."""
    start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    mask, found, grown = (1 << 64) - 1, numbers.copy(), scales.copy()
    for block in range(scales.size):
        rows = slice(block * BLOCK, min((block + 1) * BLOCK, numbers.size))
        if not delta[rows].any():
            continue
        if scales[block] > 0:
            places = NF4.levels[numbers[rows]] + delta[rows] / scales[block]
            reach = max(np.float32(1), np.abs(places).max())
            grown[block] = scales[block] * reach
        else:
            places, reach = delta[rows], np.abs(delta[rows]).max()
            grown[block] = reach
        for index, place in enumerate(places / reach):
            above = np.flatnonzero(NF4.levels >= place)[0]
            below = above if NF4.levels[above] == place else above - 1
            mixed = (start + (block * BLOCK + index + 1) * 0x9E3779B97F4A7C15) & mask
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
            chance = np.float32((mixed ^ (mixed >> 31)) >> 40) * np.float32(2.0**-24)
            span = NF4.levels[above] - NF4.levels[below]
            rises = above != below and chance < (place - NF4.levels[below]) / span
            found[block * BLOCK + index] = above if rises else below
    return found, grown


def unpacked(codes: Any, size: int) -> Any:
    return np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:size]


@pytest.mark.parametrize("size", [640, 64 * 3 + 7, 1])
@pytest.mark.parametrize("spread", [0.001, 0.05, 2.0])
def test_codes_and_scales_are_those_of_the_plain_version(size: int, spread: float) -> None:
    random = np.random.default_rng(size)
    numbers = random.integers(0, 16, size).astype(np.uint8)
    scales = random.uniform(0.01, 0.1, -(-size // BLOCK)).astype(np.float32)
    scales[-1] = 0
    delta = (random.standard_normal(size) * spread * 0.05).astype(np.float32)
    delta[: BLOCK // 2] = 0
    expected, grown = plain(numbers, scales, delta, 7, "layer")
    found = dither(pack(numbers, NF4), scales, delta, BLOCK, key_of(7, "layer"), 0)
    assert np.array_equal(unpacked(found, size), expected)
    assert np.array_equal(scales, grown)


def test_without_a_delta_nothing_changes() -> None:
    random = np.random.default_rng(1)
    codes = random.integers(0, 256, 320).astype(np.uint8)
    scales = random.uniform(0.01, 0.1, 10).astype(np.float32)
    before = scales.copy()
    assert np.array_equal(dither(codes, scales, np.zeros(640, np.float32), BLOCK, key_of(0, "x"), 0), codes)
    assert np.array_equal(scales, before)


def test_pieces_give_the_bytes_of_the_whole_and_seeds_and_names_give_others() -> None:
    random = np.random.default_rng(2)
    codes, scales = random.integers(0, 256, 320).astype(np.uint8), np.full(10, 0.05, np.float32)
    delta = (random.standard_normal(640) * 0.002).astype(np.float32)

    def made(seed: int, name: str, cut: int) -> bytes:
        parts = [(0, cut), (cut, 640)]
        return b"".join(
            dither(codes[a // 2 : b // 2], scales[a // 64 : b // 64].copy(), delta[a:b], BLOCK, key_of(seed, name), a)
            .tobytes()
            for a, b in parts
        )  # fmt: skip

    assert made(0, "x", 640) == made(0, "x", 128)
    assert len({made(0, "x", 64), made(1, "x", 64), made(0, "y", 64)}) == 3


def test_the_mean_is_the_value_even_where_it_would_clip() -> None:
    """400,000 roundings of the same delta: within five standard errors, no half step lost."""
    numbers = np.tile(np.arange(16, dtype=np.uint8), 25_000)
    scales = np.full(numbers.size // BLOCK, 0.5, np.float32)
    delta = np.full(numbers.size, 0.01, np.float32)
    found = dither(pack(numbers, NF4), scales, delta, BLOCK, key_of(0, "x"), 0)
    values = NF4.levels[unpacked(found, numbers.size)].astype(np.float64) * np.repeat(scales, BLOCK)
    change = values - NF4.levels[numbers].astype(np.float64) * 0.5
    assert scales[0] == np.float32(0.5) * np.float32(1.02)
    assert change.mean() == pytest.approx(0.01, abs=5 * change.std() / np.sqrt(change.size))
