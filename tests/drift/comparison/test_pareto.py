from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_export.drift.comparison.pareto import front, points, recommend
from qlora_export.drift.comparison.rows import Comparison, Row, by_size
from qlora_export.drift.gate import judge
from qlora_export.drift.results import Verdict
from qlora_export.recipe.config import Limits
from tests import sampling


def judged(compared: Comparison, limits: Limits) -> Comparison:
    """The comparison as these limits judge it."""
    rows = []
    for row in compared.rows:
        if row.measured is not None:
            verdict = judge(row.measured.entry.drift, limits, 10_000, 0)
            entry = replace(row.measured.entry, verdict=verdict, limits=limits)
            row = replace(row, measured=replace(row.measured, entry=entry))
        rows.append(row)
    return replace(compared, rows=tuple(rows), limits=limits)


def test_the_smallest_that_passes_is_taken(compared: Comparison) -> None:
    found = recommend(judged(compared, Limits(survival_min=0.99)))
    assert found.name == "int8"
    assert len(found.why) == 1
    assert found.why[0].startswith("nf4-nearest is smaller and does not pass: lowest survival is")
    assert recommend(judged(compared, Limits())).name == "nf4-nearest"


def test_when_none_passes_the_limits_in_the_way_are_named(compared: Comparison) -> None:
    found = recommend(judged(compared, Limits(mean_kl=0.01, survival_min=1.5)))
    assert found.name is None
    assert "lowest survival stops 5 of 5, the limit is at least 1.5: nearest is" in "\n".join(found.why)
    assert "mean KL stops 1 of 5, the limit is at most 0.01: nearest is nf4-adapter with 0" in "\n".join(found.why)


def test_what_is_not_decided_is_told(compared: Comparison) -> None:
    verdict = Verdict("inconclusive", ("same top-1: about 500 more tokens are needed to decide",))
    rows = [
        replace(row, measured=replace(row.measured, entry=replace(row.measured.entry, verdict=verdict)))
        for row in compared.rows
        if row.measured is not None
    ]
    found = recommend(replace(compared, rows=tuple(rows)))
    assert found.name is None
    assert "about 500 more tokens" in found.why[-1]
    assert recommend(replace(compared, rows=())).why == ("nothing could be measured",)


def test_rows_go_by_size_and_those_without_numbers_last(compared: Comparison) -> None:
    names = [row.name for row in compared.rows]
    assert names[:5] == ["nf4-nearest", "int8", "nf4-adapter", "bf16", "fp32"]
    assert by_size(list(reversed(compared.rows)))[:5] == compared.rows[:5]
    assert set(names[5:]) == {"nf4-calibrated", "w4a16"}
    assert isinstance(compared.rows[-1], Row)


def test_the_front_of_the_comparison(compared: Comparison) -> None:
    best = front(points(compared))
    assert best == ["nf4-nearest", "int8", "nf4-adapter"]


numbers = st.integers(0, 4).map(float)


@settings(max_examples=sampling.examples(50))
@given(st.dictionaries(st.integers(0, 30).map(str), st.tuples(numbers, numbers), min_size=1))
def test_the_front_is_what_nothing_dominates(places: dict[str, tuple[float, float]]) -> None:
    found = front(places)
    for name, (size, drift) in places.items():
        better = [
            other
            for other, (other_size, other_drift) in places.items()
            if other_size <= size and other_drift <= drift and (other_size, other_drift) != (size, drift)
        ]
        twins = [other for other in found if places[other] == (size, drift)]
        assert (not better) == (len(twins) == 1), name
    assert found == sorted(found, key=lambda name: places[name])
