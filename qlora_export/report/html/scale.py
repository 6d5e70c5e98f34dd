"""Scales of an axis: where a value lies between two ends in pixels, and the round values to name beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_export.report.html.figures import significant

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
DIGITS = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,))


@dataclass(frozen=True)
class Scale:
    """From `low` at pixel `start` to `high` at pixel `end`, evenly or by powers of ten."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value; what lies outside is drawn at the end that is near."""
        value = min(max(value, self.low), self.high)
        return self.start + self._part(value) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the ends, no more than `most` of them where that is possible."""
        return self._powers(most) if self.logarithmic else self._even(most)

    def _part(self, value: float) -> float:
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def _even(self, most: int) -> list[float]:
        width = self.high - self.low
        power = 10.0 ** math.floor(math.log10(width / most))
        step = next((power * step for step in STEPS if width / (power * step) <= most), power * 10)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]

    def _powers(self, most: int) -> list[float]:
        """Powers of ten, with as many digits between them as there is room for."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        for digits in DIGITS:
            values = [digit * 10.0**power for power in range(first - 1, last + 1) for digit in digits]
            found = [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
            if len(found) <= most:
                return found
        stride = math.ceil((last - first + 1) / most)
        return [10.0**power for power in range(first, last + 1, stride)]


def tick_text(value: float) -> str:
    """The words beside a tick; a power of ten where the number would be long."""
    if value and not 0.001 <= abs(value) < 10_000:
        return significant(value, 2)
    return f"{value:g}".replace("-", "\u2212")


def around(values: Sequence[float], factor: float) -> tuple[float, float]:
    """The ends of a logarithmic axis: the values with room on both sides."""
    return min(values) / factor, max(values) * factor
