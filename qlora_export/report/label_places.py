"""Places for the labels of points in a plot, none over another, in pixels.

Each label tries places around its point, the nearest first, and takes the first that is free, or the one that covers
least. The points that have most neighbours choose first. Cost: labels times places times boxes, nothing for tens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DIRECTIONS = (0, 180, 90, 270, 45, 135, 315, 225, 20, 160, 340, 200)
DISTANCES = (9, 14, 22, 34, 48, 64, 84, 108)


@dataclass(frozen=True)
class Box:
    """A rectangle by its left lower corner and its size."""

    left: float
    bottom: float
    width: float
    height: float

    def covered(self, other: Box) -> float:
        """The area that both share."""
        width = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        height = min(self.bottom + self.height, other.bottom + other.height) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    inside: Box,
    taken: Sequence[Box] = (),
    scale: float = 1.0,
) -> list[Box]:
    """A box of each size for each anchor, within `inside` and clear of `taken`; distances are in units of `scale`."""
    boxes: dict[int, Box] = {}
    obstacles = list(taken)
    order = sorted(range(len(anchors)), key=lambda number: _room(anchors, number))
    for number in order:
        choices = _choices(anchors[number], sizes[number], scale)
        boxes[number] = min(choices, key=lambda box: _cost(box, inside, obstacles))
        obstacles.append(boxes[number])
    return [boxes[number] for number in range(len(anchors))]


def _room(anchors: Sequence[tuple[float, float]], number: int) -> float:
    """The distance to the nearest other point."""
    return min((math.dist(anchors[number], other) for n, other in enumerate(anchors) if n != number), default=0.0)


def _choices(anchor: tuple[float, float], size: tuple[float, float], scale: float) -> list[Box]:
    """Boxes whose nearest side is as far as each distance, the nearest first."""
    (x, y), (width, height) = anchor, size
    found = []
    for distance in DISTANCES:
        for degrees in DIRECTIONS:
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            centre_x = x + across * (distance * scale + width / 2)
            centre_y = y + up * (distance * scale + height / 2)
            found.append(Box(centre_x - width / 2, centre_y - height / 2, width, height))
    return found


def _cost(box: Box, inside: Box, obstacles: Sequence[Box]) -> float:
    """The area that is outside or over something else; ties go to the earlier choice."""
    outside = box.width * box.height - box.covered(inside)
    return round(outside + sum(box.covered(other) for other in obstacles), 3)
