"""Points in the space of objectives, all of them larger = better: non-domination and hypervolume."""

from __future__ import annotations

import numpy as np

from psacpo.evalharness.statistics.bootstrap import Array, Mask


def nondominated(points: Array) -> Mask:
    """Which of the points [..., K, M], all coordinates larger = better, no other point beats: [..., K].

    A point is dominated if another is at least as good in every coordinate and better in one.
    """
    ahead = points[..., None, :, :] >= points[..., :, None, :]
    better = points[..., None, :, :] > points[..., :, None, :]
    dominated = np.any(np.all(ahead, axis=-1) & np.any(better, axis=-1), axis=-1)
    return np.asarray(~dominated, dtype=np.bool_)


def hypervolume(points: Array, reference: Array) -> float:
    """Volume that points [K, M] (larger = better) dominate above a reference point [M] (Zitzler and Thiele 1999).

    Two objectives are computed here, more of them by moocore.

    Raises:
        ModuleNotFoundError: There are more than two objectives and no moocore; settings refuse that beforehand.
    """
    above = points[(points > reference).all(axis=-1)]
    if points.shape[-1] > 2:
        import moocore

        return float(moocore.hypervolume(above, ref=reference, maximise=True)) if len(above) else 0.0
    area, height = 0.0, float(reference[1])
    for x, y in sorted(above.tolist(), key=lambda point: (-point[0], -point[1])):
        if y > height:
            area += (x - float(reference[0])) * (y - height)
            height = y
    return area
