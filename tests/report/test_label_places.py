from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from qlora_export.report.label_places import Box, place_labels

INSIDE = Box(0, 0, 1000, 600)


@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_labels_cover_neither_each_other_nor_points(count: int) -> None:
    rng = np.random.default_rng(count)
    anchors = [(float(x), float(y)) for x, y in rng.uniform((200, 100), (800, 500), (count, 2))]
    sizes = [(60 + 10 * (number % 7), 14.0) for number in range(count)]
    points = [Box(x - 5, y - 5, 10, 10) for x, y in anchors]
    boxes = place_labels(anchors, sizes, INSIDE, points)
    assert [(box.width, box.height) for box in boxes] == sizes
    for one, other in combinations([*boxes, *points], 2):
        if one in boxes or other in boxes:
            assert one.covered(other) == 0
    assert all(box.covered(INSIDE) == pytest.approx(box.width * box.height) for box in boxes)


def test_points_at_one_place_have_labels_apart() -> None:
    boxes = place_labels([(500, 300)] * 6, [(90, 14)] * 6, INSIDE, [Box(495, 295, 10, 10)])
    assert all(one.covered(other) == 0 for one, other in combinations(boxes, 2))


def test_a_label_stays_near_and_inside() -> None:
    (alone,) = place_labels([(500, 300)], [(80, 14)], INSIDE)
    assert alone == Box(509, 293, 80, 14)
    (edge,) = place_labels([(990, 300)], [(80, 14)], INSIDE)
    assert edge.left + edge.width <= 1000


def test_where_there_is_no_room_the_least_is_covered() -> None:
    (crowded,) = place_labels([(50, 50)], [(80, 14)], Box(0, 0, 100, 100), [Box(0, 0, 100, 100)])
    assert crowded.width == 80
