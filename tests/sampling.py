"""What `make test` leaves to `make test-all`: most cases of the tests that need minutes by nature.

A test marked `sampled(count)` runs that many of its cases, drawn by a seed; `sampled(count, per="fault")` that many for
each value of the parameter `fault`. Loops over cases inside a test ask `some`, hypothesis tests `examples`. With
`--all-cases` all of them run. `--sample-seed` draws others; a case that is named on the command line always runs.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

ALL_CASES = "TESTS_ALL_CASES"
SEED = "TESTS_SAMPLE_SEED"
Value = TypeVar("Value")


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("sampling")
    group.addoption("--all-cases", action="store_true", help="run every case of the tests marked `sampled`")
    group.addoption("--sample-seed", type=int, default=1, help="draw other cases of them (default: 1)")


def configure(config: pytest.Config) -> None:
    """Tell the modules of tests, which are imported later, in this process and in the workers."""
    os.environ[ALL_CASES] = str(int(config.getoption("all_cases")))
    os.environ[SEED] = str(config.getoption("sample_seed"))


def all_cases() -> bool:
    return os.environ.get(ALL_CASES) == "1"


def some(values: Sequence[Value], count: int, name: str = "") -> list[Value]:
    """That many of the values, in their order; drawn by the seed and a name, so that tests draw independently."""
    if all_cases() or count >= len(values):
        return list(values)
    draw = random.Random(f"{os.environ.get(SEED, '1')} {name}")
    return [values[place] for place in sorted(draw.sample(range(len(values)), count))]


def examples(every: int) -> int:
    """How many examples hypothesis tries, of as many as it tries with all cases."""
    return every if all_cases() else max(5, every // 4)


def left_out(items: Iterable[pytest.Item], named: Sequence[str]) -> set[pytest.Item]:
    """The cases that are not drawn and not named on the command line."""
    groups: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    counts: dict[tuple[str, str], int] = {}
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is not None:
            per = marker.kwargs.get("per")
            value = repr(item.callspec.params[per]) if per else ""  # type: ignore[attr-defined]
            key = item.nodeid.partition("[")[0], value
            groups[key].append(item)
            counts[key] = marker.args[0]
    drawn = {item for key, group in groups.items() for item in some(group, counts[key], " ".join(key))}
    return {item for group in groups.values() for item in group if item not in drawn and item.nodeid not in named}


def cases_of(test: str, request: pytest.FixtureRequest) -> list[Mapping[str, Any]]:
    """Parameters of each case of a test of this module that is run: what a fixture need prepare."""
    return [
        item.callspec.params  # type: ignore[attr-defined]
        for item in request.session.items
        if item.path == request.path and item.originalname == test  # type: ignore[attr-defined]
    ]
