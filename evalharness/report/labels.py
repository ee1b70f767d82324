"""Where labels go so that they cover neither each other nor the points: pure geometry, in pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ANGLES = np.deg2rad(np.arange(0, 360, 15))
_GAPS = (0.0, 6.0, 14.0, 26.0, 42.0, 62.0, 86.0)


def place(
    anchors: Array,
    sizes: Array,
    frame: Sequence[float],
    *,
    radius: float,
    hard: Array,
    soft: Array,
    order: Sequence[int] | None = None,
    scale: float = 1.0,
) -> Array:
    """Choose a centre for each label, one after the other, each at the least cost given those before it.

    Args:
        anchors: What each label names. Shape (labels, 2).
        sizes: Width and height of each label. Shape (labels, 2).
        frame: x0, y0, x1, y1 of the area that labels should not leave.
        radius: Half the size of a marker; labels keep that distance from every anchor.
        hard: Boxes x0, y0, x1, y1 that must not be covered. Shape (boxes, 4).
        soft: Points on lines that had better not be covered. Shape (points, 2).
        order: The sequence in which labels choose; by default the crowded ones first.
        scale: Pixels per unit of distance, for figures of another resolution.

    Returns:
        Centres. Shape (labels, 2).
    """
    count = len(anchors)
    centres = np.array(anchors, dtype=float).reshape(count, 2)
    markers = np.hstack([anchors - radius, anchors + radius]).reshape(count, 4)
    blocked = np.vstack([markers, hard.reshape(-1, 4)])
    for index in _crowded_first(anchors) if order is None else order:
        candidates = _candidates(anchors[index], sizes[index], radius, scale)
        boxes = np.hstack([candidates - sizes[index] / 2, candidates + sizes[index] / 2])
        area = float(np.prod(sizes[index]))
        shared = _overlap(boxes, blocked)
        # Even a corner counts for more than a longer way.
        cost = 100.0 * shared.sum(axis=1) / area + 6.0 * (shared > 0).sum(axis=1)
        cost += 100.0 * _outside(boxes, frame) / area
        cost += 0.35 / scale * _points_inside(boxes, soft)
        away = np.linalg.norm(candidates - anchors[index], axis=1) / scale
        # Right above or right of the point reads best where nothing else decides.
        lean = candidates - anchors[index]
        cost += 0.05 * away - 0.004 * (lean[:, 0] + lean[:, 1]) / scale
        best = int(np.argmin(cost))
        centres[index] = candidates[best]
        blocked = np.vstack([blocked, boxes[best] + np.array([-1, -1, 1, 1]) * 1.5 * scale])
    return centres


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions on a line near the wanted ones, at least `gap` apart and within [low, high] if they fit there.

    The result is in the order of `wanted`.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    room = max(0.0, high - low)
    gap = min(gap, room / max(1, len(wanted) - 1)) if len(wanted) > 1 else gap
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], low, placed[-1] + gap if placed else low))
    limit = high
    for k in range(len(placed) - 1, -1, -1):
        placed[k] = max(low, min(placed[k], limit))
        limit = placed[k] - gap
    result = [0.0] * len(wanted)
    for position, i in zip(placed, order, strict=True):
        result[i] = position
    return result


def _crowded_first(anchors: Array) -> list[int]:
    distance = np.linalg.norm(anchors[:, None] - anchors[None], axis=2) + np.diag(np.full(len(anchors), np.inf))
    return [int(i) for i in np.argsort(distance.min(axis=1), kind="stable")] if len(anchors) > 1 else [0] * len(anchors)


def _candidates(anchor: Array, size: Array, radius: float, scale: float) -> Array:
    """Centres around the anchor whose boxes clear the marker by each of a few gaps. Shape (candidates, 2)."""
    directions = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
    # From the centre of a box to its edge along a direction.
    with np.errstate(divide="ignore"):
        reach = np.min(np.abs(size / 2 / np.where(np.abs(directions) < 1e-9, 1e-9, directions)), axis=1)
    return np.concatenate([anchor + directions * (radius * 1.15 + reach + gap * scale)[:, None] for gap in _GAPS])


def _overlap(boxes: Array, others: Array) -> Array:
    """Shared area of each box with each other one. Shape (boxes, others)."""
    width = np.minimum(boxes[:, None, 2], others[None, :, 2]) - np.maximum(boxes[:, None, 0], others[None, :, 0])
    height = np.minimum(boxes[:, None, 3], others[None, :, 3]) - np.maximum(boxes[:, None, 1], others[None, :, 1])
    shared: Array = np.clip(width, 0, None) * np.clip(height, 0, None)
    return shared


def _outside(boxes: Array, frame: Sequence[float]) -> Array:
    """Area of each box outside the frame. Shape (boxes,)."""
    area: Array = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    inside: Array = _overlap(boxes, np.array([frame], dtype=float))[:, 0]
    return area - inside


def _points_inside(boxes: Array, points: Array) -> Array:
    """How many points each box covers. Shape (boxes,)."""
    points = points.reshape(-1, 2)
    x, y = points[None, :, 0], points[None, :, 1]
    inside = (x > boxes[:, None, 0]) & (x < boxes[:, None, 2]) & (y > boxes[:, None, 1]) & (y < boxes[:, None, 3])
    counted: Array = inside.sum(axis=1).astype(float)
    return counted
