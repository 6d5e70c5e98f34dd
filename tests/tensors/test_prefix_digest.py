from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_export.tensors.prefix_digest import PrefixDigest
from tests import sampling


@settings(max_examples=sampling.examples(60))
@given(
    cuts=st.lists(st.integers(0, 5000), max_size=8), chance=st.randoms(use_true_random=False), size=st.integers(0, 5000)
)
def test_ranges_in_any_order_give_the_digest_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], chance: Random, size: int
) -> None:
    content = bytes(index * 7 % 251 for index in range(size))
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(content)
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    ranges = list(pairwise(edges))
    chance.shuffle(ranges)
    digest = PrefixDigest(path, size)
    for first, last in ranges:
        digest.mark(first, last - first)
        digest.advance(chance.choice([1, 500]))
    assert digest.sha256() == hashlib.sha256(content).hexdigest()


def test_a_gap_is_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    digest = PrefixDigest(path, 10)
    digest.mark(0, 4)
    digest.mark(5, 5)
    digest.advance()
    with pytest.raises(ValueError, match="4 of 10 bytes are written"):
        digest.sha256()


def test_a_file_that_became_shorter_is_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    digest = PrefixDigest(path, 20)
    digest.mark(0, 20)
    with pytest.raises(ValueError, match="ends at byte 10 of 20"):
        digest.sha256()
