"""Placement of labels: they cover neither each other nor the points, and stay near what they name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from psacpo.evalharness.report.labels import place, spread

FRAME = (0.0, 0.0, 800.0, 600.0)
NONE = np.empty((0, 4))
NO_POINTS = np.empty((0, 2))


def boxes(centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.hstack([centres - sizes / 2, centres + sizes / 2])


def overlap(one: np.ndarray, two: np.ndarray) -> bool:
    return bool(one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3])


def test_a_tight_cluster_gets_labels_that_cover_nothing() -> None:
    draw = np.random.default_rng(0)
    anchors = np.array([400.0, 300.0]) + draw.normal(0, 25, (12, 2))
    sizes = np.tile([60.0, 14.0], (12, 1))
    centres = place(anchors, sizes, FRAME, radius=6, hard=NONE, soft=NO_POINTS)
    found = boxes(centres, sizes)
    for one, two in itertools.combinations(found, 2):
        assert not overlap(one, two)
    for box, anchor in itertools.product(found, anchors):
        assert not overlap(box, np.concatenate([anchor - 5, anchor + 5]))


def test_labels_stay_in_the_frame_and_off_hard_boxes() -> None:
    anchors = np.array([[2.0, 2.0], [798.0, 598.0]])
    sizes = np.tile([80.0, 16.0], (2, 1))
    hard = np.array([[5.0, 5.0, 100.0, 20.0]])
    found = boxes(place(anchors, sizes, FRAME, radius=6, hard=hard, soft=NO_POINTS), sizes)
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] <= [800, 600]).all()
    assert not any(overlap(box, hard[0]) for box in found)


def test_a_lone_label_is_close_and_leaves_a_line_free() -> None:
    anchors, sizes = np.array([[400.0, 300.0]]), np.array([[50.0, 14.0]])
    # A line that leaves the point upwards and to the right, where a label would go by preference.
    line = anchors[0] + np.linspace(0, 120, 60)[:, None] * np.array([1.0, 0.25])
    free = place(anchors, sizes, FRAME, radius=6, hard=NONE, soft=NO_POINTS)[0]
    moved = place(anchors, sizes, FRAME, radius=6, hard=NONE, soft=line)[0]
    inside = (np.abs(line - moved) < sizes[0] / 2).all(axis=1)
    assert np.linalg.norm(free - anchors[0]) < 40
    assert np.linalg.norm(moved - anchors[0]) < 40
    assert inside.sum() == 0


def test_no_labels_at_all() -> None:
    assert place(NO_POINTS, NO_POINTS, FRAME, radius=6, hard=NONE, soft=NO_POINTS).shape == (0, 2)


def test_spread_moves_only_what_is_too_close() -> None:
    assert spread([5.0, 1.0], 2.0, 0.0, 10.0) == [5.0, 1.0]
    assert spread([4.0, 4.0, 0.0], 2.0, 0.0, 10.0) == [4.0, 6.0, 0.0]


def test_spread_keeps_within_the_ends() -> None:
    assert spread([9.5, 10.0, 9.0], 2.0, 0.0, 10.0) == pytest.approx([8.0, 10.0, 6.0])
    assert spread([1.0, 1.0, 1.0], 9.0, 0.0, 10.0) == pytest.approx([0.0, 5.0, 10.0])  # no room: evenly
    assert spread([], 1.0, 0.0, 1.0) == []
