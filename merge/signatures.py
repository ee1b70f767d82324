"""What each merge method takes: names, defaults and ranges of its settings, and how many models, with a base or not.

They are mergekit's (release 0.1.5). No torch here: the mathematics is in `psacpo.merge.methods`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from psacpo.errors import unknown_name


@dataclass(frozen=True)
class Parameter:
    """One setting of a method: its default (None: must be given; a bool makes it a flag) and its range, ends included."""

    default: float | bool | None = None
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Signature:
    """What a method takes.

    Attributes:
        base: `required`: it works on the differences from a base; `optional`: it does so where a base is given; `none`:
            it works on the weights themselves.
        per_model: Settings with one value for each source.
        shared: Settings with one value for all.
        sources: The number of sources (the base not among them): at least, and at most (None: any).
        elementwise: An output element depends on the sources' elements at its own place only.
        ratio: The setting that the ratio q of two sources sets; None: the method has no place for a ratio.
        inert: Settings that mergekit reads and that change nothing; read here too, so that its files stay valid.
        random: It draws; `psacpo.merge.sparsify.draws` says from what.
    """

    base: Literal["required", "optional", "none"]
    per_model: Mapping[str, Parameter]
    shared: Mapping[str, Parameter]
    sources: tuple[int, int | None] = (1, None)
    elementwise: bool = False
    ratio: Literal["weight", "t"] | None = "weight"
    inert: frozenset[str] = frozenset({"int8_mask"})
    random: bool = False


def _deltas(
    *, normalize: bool = False, rescale: bool = False, sparse: bool = True, random: bool = False, **more: Parameter
) -> Signature:
    """The family that mergekit calls generalised task arithmetic: base + lambda * a weighted sum of sparse deltas."""
    return Signature(
        base="required",
        per_model={"weight": Parameter(), "density": Parameter(1.0, 0, 1), **more},
        shared={
            "normalize": Parameter(normalize),
            "rescale": Parameter(rescale),
            "lambda": Parameter(1.0),
            "int8_mask": Parameter(False),
        },
        elementwise=not sparse,
        inert=frozenset({"int8_mask"} if sparse else {"int8_mask", "density", "rescale"}),
        random=random,
    )


_GAMMA = Parameter(0.01, 0, 1)
_EPSILON = Parameter(0.15, 0, 0.5)

SIGNATURES: Mapping[str, Signature] = {
    "linear": Signature(
        base="none",
        per_model={"weight": Parameter()},
        shared={"normalize": Parameter(True)},
        elementwise=True,
    ),
    "slerp": Signature(base="none", per_model={}, shared={"t": Parameter(None, 0, 1)}, sources=(2, 2), ratio="t"),
    "nuslerp": Signature(
        base="optional",
        per_model={"weight": Parameter()},
        shared={"nuslerp_flatten": Parameter(True), "nuslerp_row_wise": Parameter(False)},
        sources=(2, 2),
    ),
    "model_stock": Signature(
        base="required", per_model={}, shared={"filter_wise": Parameter(False)}, sources=(2, None), ratio=None
    ),
    "task_arithmetic": _deltas(sparse=False),
    "ties": _deltas(normalize=True),
    "dare_linear": _deltas(rescale=True, random=True),
    "dare_ties": _deltas(rescale=True, random=True),
    "breadcrumbs": _deltas(gamma=_GAMMA),
    "breadcrumbs_ties": _deltas(gamma=_GAMMA),
    "della": _deltas(normalize=True, rescale=True, random=True, epsilon=_EPSILON),
    "della_linear": _deltas(rescale=True, random=True, epsilon=_EPSILON),
}

DELTA_METHODS = tuple(name for name, takes in SIGNATURES.items() if takes.base != "none")
"""The methods that are defined on differences from a base, so on adapters too."""


def signature(method: str) -> Signature:
    """What a method takes; an unknown name is an `InputError` with the valid ones."""
    if method not in SIGNATURES:
        raise unknown_name("merge method", method, SIGNATURES)
    return SIGNATURES[method]
