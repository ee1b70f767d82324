"""Where an adaptive sweep looks: ratios of the dial between two adapters, or the simplex of weights of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.dial import ratio_policy
from psacpo.evalharness.engines.base import Policy
from psacpo.evalharness.statistics.bootstrap import Array
from psacpo.evalharness.statistics.mixing import coarse, next_mixture
from psacpo.evalharness.statistics.racing import next_ratio
from psacpo.evalharness.weights import Grid, Weights, place_of, read_weights_name, weights_name
from psacpo.merge.config import policy_name


@dataclass(frozen=True)
class Step:
    """A policy to measure next, why (`crossing` or `gap`), and what is hoped of it."""

    name: str
    why: str
    gain: float


class Space(Protocol):
    """The points of a sweep, to which more are added.

    Attributes:
        names: Of the policies measured so far, from the reward end on.
        kind: What a point is called.
    """

    kind: str

    @property
    def names(self) -> list[str]: ...

    def add(self, name: str) -> None: ...

    def policy(self, name: str) -> Policy:
        """Of a point, or of one that was proposed."""
        ...

    def propose(self, points: Array, passed: Sequence[bool] | None, *, resolution: float, noise: float) -> Step | None:
        """The next point, by the objectives [K, 2] of those in `names`, and by which of them would be certified."""
        ...

    def settings(self) -> dict[str, Any]:
        """The points as FrontierConfig has them."""
        ...

    def entry(self, name: str) -> dict[str, Any]:
        """What frontier.json says of a point."""
        ...


class Dial:
    """Ratios between the reward and the safety adapter."""

    kind = "ratio"

    def __init__(self, ratios: Sequence[float]) -> None:
        self.ratios = sorted(ratios)

    @property
    def names(self) -> list[str]:
        """In rising order of the ratio."""
        return [policy_name(ratio) for ratio in self.ratios]

    def add(self, name: str) -> None:
        """One more ratio."""
        self.ratios = sorted([*self.ratios, _ratio(name)])

    def policy(self, name: str) -> Policy:
        """A name tells its ratio exactly."""
        return ratio_policy(_ratio(name))

    def propose(self, points: Array, passed: Sequence[bool] | None, *, resolution: float, noise: float) -> Step | None:
        """The middle of two neighbours."""
        found = next_ratio(self.ratios, points, passed=passed, resolution=resolution, noise=noise)
        return None if found is None else Step(policy_name(round(found.ratio, 6)), found.why, found.gain)

    def settings(self) -> dict[str, Any]:
        """`ratios`."""
        return {"ratios": list(self.ratios)}

    def entry(self, name: str) -> dict[str, Any]:
        """Its ratio."""
        return {"ratio": _ratio(name), "policy": name}


class Simplex:
    """Weights of several adapters, which sum to 1.

    Args:
        adapters: In the order of the settings, which is that of ties in the order of points.
        vectors: Measured first.
    """

    kind = "mixture"

    def __init__(self, adapters: Sequence[str], vectors: Sequence[Weights]) -> None:
        self.adapters = list(adapters)
        self._of = {weights_name(vector): dict(vector) for vector in vectors}

    @property
    def names(self) -> list[str]:
        """In the order of `weights.place_of`."""
        return sorted(self._of, key=lambda name: place_of(self._of[name], self.adapters))

    def add(self, name: str) -> None:
        """One more mixture."""
        self._of[name] = self._weights(name)

    def policy(self, name: str) -> Policy:
        """A proposed mixture's name tells its weights exactly."""
        return Policy(name, self._weights(name), point=True)

    def _weights(self, name: str) -> Weights:
        found = self._of.get(name) or read_weights_name(name)
        assert found is not None
        return found

    def propose(self, points: Array, passed: Sequence[bool] | None, *, resolution: float, noise: float) -> Step | None:
        """The middle of two neighbours, or of two that follow each other on the frontier."""
        vectors = np.array([[self._of[name].get(one, 0.0) for one in self.adapters] for name in self.names])
        found = next_mixture(vectors, points, passed=passed, resolution=resolution, noise=noise)
        if found is None:
            return None
        weights = {name: float(value) for name, value in zip(self.adapters, found.weights, strict=True) if value}
        return Step(weights_name(weights), found.why, found.gain)

    def settings(self) -> dict[str, Any]:
        """`weights`, a list."""
        return {"weights": [self._of[name] for name in self.names]}

    def entry(self, name: str) -> dict[str, Any]:
        """Its weights."""
        return {"ratio": None, "policy": name, "weights": self._of[name]}


def space_of(config: FrontierConfig) -> Space:
    """The points of some settings."""
    if config.weights is None:
        return Dial(config.ratios)
    return Simplex(list(config.adapters), config.weight_points())


def first_points(config: FrontierConfig) -> dict[str, Any]:
    """What an adaptive sweep measures first, as settings.

    Of a grid over weights that says no number of steps: every adapter alone, the middle of every two, and of all. Steps
    that are said, and weights that are listed, are what it starts from.
    """
    assert config.adaptive is not None
    if config.weights is None:
        ends = min(config.ratios), max(config.ratios)
        return {"ratios": np.linspace(*ends, config.adaptive.start).round(6).tolist()}
    if not isinstance(config.weights, Grid) or config.weights.steps is not None:
        return {"weights": config.weight_points()}
    of = config.weights.of or list(config.adapters)
    return {
        "weights": [
            {name: float(value) for name, value in zip(of, vector, strict=True) if value} for vector in coarse(len(of))
        ]
    }


def _ratio(name: str) -> float:
    return float(name.removeprefix("policy@"))
