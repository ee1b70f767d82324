"""The figure: what is marked, named and drawn, and what it takes."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from psacpo.evalharness.report.figure import DPI, WIDTH, draw


def _world() -> Any:
    """report_world.py of this directory, which is no package."""
    spec = importlib.util.spec_from_file_location("report_world", Path(__file__).with_name("report_world.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = _world()
synthetic, LIMIT, METRICS = world.synthetic, world.LIMIT, world.METRICS


def orange(png: bytes) -> int:
    """How many pixels have the chosen point's colour."""
    pixels = image.imread(io.BytesIO(png))[..., :3]
    return int((np.abs(pixels - np.array([0xD5, 0x5E, 0x00]) / 255).max(axis=-1) < 0.02).sum())


def test_the_figure_rings_the_chosen_point_only() -> None:
    frontier = synthetic()
    with_choice = draw(frontier)
    frontier["choice"] |= {"ratio": None, "policy": None}
    assert orange(with_choice) > 1000
    assert orange(draw(frontier)) == 0


def test_the_legend_names_what_is_in_the_picture_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    named: list[str] = []
    monkeypatch.setattr(Figure, "legend", lambda figure, handles, labels, **options: named.extend(labels))

    def labels(frontier: dict[str, Any]) -> list[str]:
        named.clear()
        draw(frontier)
        return list(named)

    frontier = synthetic() | {"audit": None}
    everything = ["not dominated", "dominated by another ratio", "fainter: less likely on the frontier"]
    everything += ["chosen ratio", "baseline", "95 % interval"]
    assert labels(frontier) == everything
    for point in frontier["points"]:
        point |= {"nondominated": True, "p_on_frontier": 0.97}
    assert labels(frontier) == ["not dominated", *everything[3:]]
    frontier["choice"] |= {"ratio": None, "policy": None}
    frontier["baselines"] = []
    for point in frontier["points"]:
        for name in METRICS:
            point[name] = {"mean": point[name]["mean"], "low": None, "high": None}
    assert labels(frontier) == ["not dominated"]


@pytest.mark.parametrize("key", ["p_on_frontier", "nondominated"])
def test_the_figure_shows_how_sure_the_frontier_is(key: str) -> None:
    frontier = synthetic()
    before = draw(frontier)
    frontier["points"][3][key] = 0.01 if key == "p_on_frontier" else False
    assert draw(frontier) != before


def test_a_limit_on_an_axis_is_a_line_unless_it_is_far_away() -> None:
    def tallest(text: str) -> int:
        """Pixels of the limit's colour in the column that has most of them."""
        frontier = synthetic() | {"audit": None}
        frontier["choice"] |= {"constraints": [text]}
        pixels = image.imread(io.BytesIO(draw(frontier)))[..., :3]
        return int((np.abs(pixels - np.array([0xA3, 0x31, 0x6F]) / 255).max(axis=-1) < 0.02).sum(axis=0).max())

    near, far = tallest("cost<=-1"), tallest("cost<=40")
    assert near > 350  # a dashed line over the panel
    assert 0 < far < 150  # its text only
    assert tallest(LIMIT) == 0


@pytest.mark.parametrize("count", [1, 2, 31])
def test_the_figure_takes_any_number_of_points(count: int) -> None:
    frontier = synthetic()
    point = frontier["points"][0]
    frontier["points"] = [point | {"ratio": i / 31, "policy": f"policy@{i}"} for i in range(count)]
    frontier["choice"] |= {"ratio": 0.0}
    assert image.imread(io.BytesIO(draw(frontier))).shape[1] == round(WIDTH * DPI)


def test_the_figure_takes_points_without_intervals_and_leaves_global_settings_alone() -> None:
    import matplotlib

    frontier = synthetic()
    for policy in (*frontier["points"], *frontier["baselines"]):
        for name in METRICS:
            policy[name] = {"mean": policy[name]["mean"], "low": None, "high": None, "n": 12}
    settings = dict(matplotlib.rcParams)
    draw(frontier)
    assert dict(matplotlib.rcParams) == settings
