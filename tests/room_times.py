"""How long each room of the tests took, set-up included, summed over the processes of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

SHOWN_SECONDS = 0.05


def room_of(test: str) -> str:
    """The folder below `tests`, for a file beside the rooms its name."""
    return test.partition("::")[0].split("/")[1]


def seconds_of_rooms(reports: Iterable[Any]) -> Counter[str]:
    """Seconds of each room, from pytest's reports of set-up, call and tear-down."""
    found: Counter[str] = Counter()
    for report in reports:
        found[room_of(report.nodeid)] += report.duration
    return found


def lines(seconds: Counter[str]) -> list[str]:
    """The longest first."""
    return [f"{spent:7.1f} s  {room}" for room, spent in seconds.most_common() if spent >= SHOWN_SECONDS]
