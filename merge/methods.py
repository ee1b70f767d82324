"""The mathematics of the merge methods: tensors in, tensor out.

Each method is three steps. Every source is made sparse by itself (or not); coefficients come out of the whole tensors (or
out of the settings alone); and the result is a sum, element by element, with an election of signs before it in the
methods of the TIES kind. So a tensor can be worked on in blocks of rows, and many mixes share the first step.

What goes in is float32 (or float64 throughout): the weights themselves for methods without a base, else the differences
from it, and then the difference from the base comes out. Statistics are taken in float64, products and sums in the
tensors' own dtype; the caller rounds once. mergekit 0.1.5, whose names, defaults and rules these are, does the same in the
tensors' dtype, which is bfloat16 for most files: the two agree to the rounding of that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch

from psacpo.merge.parameters import Arguments
from psacpo.merge.signatures import SIGNATURES, Signature
from psacpo.merge.sparsify import Draw, dot, drop, magprune, trim, trim_outliers

Coefficient = float | torch.Tensor
"""The weight of a source: one number, or one a row (or column), of a shape that broadcasts to the tensor's."""

# Above this cosine slerp is linear interpolation.
_PARALLEL = 0.9995
# Elements of the rows worked on at once where each row has a coefficient of its own.
_PART = 1 << 20


@dataclass(frozen=True)
class Method:
    """One merge method.

    Attributes:
        signature: What it takes; see `Signature`.
        coefficients: (tensors, settings by name) -> one `Coefficient` a source. Element-wise methods do not look at the
            tensors.
        sparsify: (tensor, density=..., ...) -> the sparse tensor; random ones take `draw` as well.
        elects: Whether elements against the elected sign are left out of the sum.
    """

    signature: Signature
    coefficients: Callable[..., list[Coefficient]]
    sparsify: Callable[..., torch.Tensor] | None = None
    elects: bool = False


@dataclass(frozen=True)
class Mixture:
    """The last step of a method for one tensor: the element-wise sum."""

    coefficients: Sequence[Coefficient]
    elects: bool = False
    normalize: bool = False
    factor: float = 1.0

    def __call__(self, tensors: Sequence[torch.Tensor], rows: slice = slice(None)) -> torch.Tensor:
        """The sum for a block of rows (all by default).

        Args:
            tensors: Those rows of each source.
            rows: Which rows of the whole tensor they are.
        """
        if self.elects:
            weights = [float(coefficient) for coefficient in self.coefficients]
            return elected_sum(tensors, weights, normalize=self.normalize, factor=self.factor)
        return weighted_sum(tensors, [_rows(coefficient, rows) for coefficient in self.coefficients])

    @cached_property
    def alone(self) -> int | None:
        """The one source that is the result as it is, if there is one: weight 1, all others 0."""
        if self.elects or any(isinstance(coefficient, torch.Tensor) for coefficient in self.coefficients):
            return None
        kept = [index for index, coefficient in enumerate(self.coefficients) if coefficient != 0]
        return kept[0] if len(kept) == 1 and self.coefficients[kept[0]] == 1 else None


def merge_tensors(
    method: str, tensors: Sequence[torch.Tensor], arguments: Arguments, draw: Callable[[int], Draw] | None = None
) -> torch.Tensor:
    """One tensor by a method, whole.

    Args:
        method: A name in `METHODS`.
        tensors: The sources, all of one shape, in float32 or float64: differences from the base where the method takes
            one, else the weights. They are not changed.
        arguments: From `MethodSettings.resolve`.
        draw: Source -> its uniform numbers, for methods that draw; from `psacpo.merge.sparsify.draws`.

    Returns:
        The merged tensor (or difference), of the same shape and dtype.
    """
    sparse = [sparsified(method, tensor, index, arguments, draw) for index, tensor in enumerate(tensors)]
    return mixture(method, sparse, arguments)(sparse)


def sparsified(
    method: str,
    tensor: torch.Tensor,
    source: int,
    arguments: Arguments,
    draw: Callable[[int], Draw] | None = None,
) -> torch.Tensor:
    """A source's tensor after the method's first step; the tensor itself where there is none."""
    sparsify = METHODS[method].sparsify
    if sparsify is None:
        return tensor
    settings = sparsity(arguments, source)
    if METHODS[method].signature.random:
        if draw is None:
            raise ValueError(f"{method} draws random numbers and was given none")
        settings["draw"] = draw(source)
    return sparsify(tensor, **settings)


def sparsity(arguments: Arguments, source: int) -> dict[str, object]:
    """The settings of the first step for one source; equal ones give equal sparse tensors."""
    found: dict[str, object] = {
        key: arguments.per_model[key][source] for key in ("density", "gamma", "epsilon") if key in arguments.per_model
    }
    if "rescale" in arguments.shared:
        found["rescale"] = arguments.shared["rescale"]
    return found


def mixture(method: str, tensors: Sequence[torch.Tensor], arguments: Arguments) -> Mixture:
    """The last step of a method, with the coefficients that these (sparse) tensors give.

    Element-wise methods do not look at the tensors: an empty list will do.
    """
    chosen = METHODS[method]
    settings = {
        key.replace("lambda", "lambda_"): value
        for key, value in {**arguments.per_model, **arguments.shared}.items()
        if key not in ("density", "gamma", "epsilon", "rescale")
    }
    if chosen.elects:
        return Mixture(
            coefficients=arguments.per_model["weight"],
            elects=True,
            normalize=bool(arguments.shared["normalize"]),
            factor=float(arguments.shared["lambda"]),
        )
    return Mixture(coefficients=chosen.coefficients(tensors, **settings))


def weighted_sum(tensors: Sequence[torch.Tensor], coefficients: Sequence[Coefficient]) -> torch.Tensor:
    """sum_i c_i x_i, in order. Sources of weight 0 take no part, and weight 1 alone gives the bits back."""
    total: torch.Tensor | None = None
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        if not isinstance(coefficient, torch.Tensor) and coefficient == 0:
            continue
        # Product and sum are rounded one after the other: a fused kernel's result may differ at the end of a block.
        part = tensor * (coefficient.to(tensor.dtype) if isinstance(coefficient, torch.Tensor) else coefficient)
        total = part if total is None else total.add_(part)
    return torch.zeros_like(tensors[0]) if total is None else total


def elected_sum(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool, factor: float = 1.0
) -> torch.Tensor:
    """TIES (arXiv 2306.01708, section 4.1): elect a sign, then sum the weighted deltas that have it.

    The sign of an element is that of sum_i w_i d_i, plus where that is 0; zeros and the others do not count. With
    `normalize` the sum is divided by the weights of those that do (by 1 where these cancel).
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    positive = weighted_sum(weighted, [1.0] * len(weighted)) >= 0
    total = torch.zeros_like(deltas[0])
    divisor = torch.zeros_like(deltas[0])
    for part, weight in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, part > 0, part < 0)
        total += torch.where(agrees, part, torch.zeros_like(part))
        divisor += agrees * weight
    if normalize:
        total /= torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return total if factor == 1 else total.mul_(factor)


def linear(tensors: Sequence[torch.Tensor], *, weight: Sequence[float], normalize: bool = True) -> list[Coefficient]:
    """w_i, divided by their sum with `normalize` (model soups, arXiv 2203.05482)."""
    total = math.fsum(weight) if normalize else 1.0
    return [value / total for value in weight]


def slerp(tensors: Sequence[torch.Tensor], *, t: float) -> list[Coefficient]:
    """sin((1-t) a) / sin a and sin(t a) / sin a, a the angle between the two flattened tensors (Shoemake 1985).

    Linear where they are nearly parallel or opposite, as those of two fine-tunes of one model nearly always are.
    """
    one, other = tensors
    sizes = [math.sqrt(dot(tensor, tensor)) for tensor in tensors]
    # A zero tensor counts as of length 1: its cosine is 0.
    lengths = [size if size > 1e-8 else 1.0 for size in sizes]
    cosine = min(1.0, max(-1.0, dot(one, other) / (lengths[0] * lengths[1])))
    if abs(cosine) > _PARALLEL:
        return [1.0 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def nuslerp(
    tensors: Sequence[torch.Tensor],
    *,
    weight: Sequence[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> list[Coefficient]:
    """Slerp at t = w_2 / (w_1 + w_2) without slerp's threshold; t = 1/2 where the weights cancel.

    The vectors are the flattened tensors, or without `nuslerp_flatten` those along the last axis, or with
    `nuslerp_row_wise` those along the first: mergekit's names, by which a matrix's "rows" run down its columns.
    """
    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    if t in (0.0, 1.0):
        return [1.0 - t, t]
    first = nuslerp_row_wise and not nuslerp_flatten and tensors[0].dim() > 1
    one, other = [tensor.transpose(0, -1) if first else tensor for tensor in tensors]
    product = _dots(one, other, nuslerp_flatten)
    lengths = [_dots(tensor, tensor, nuslerp_flatten).sqrt().clamp(min=1e-7) for tensor in (one, other)]
    cosine = (product / (lengths[0] * lengths[1])).clamp(-1, 1)
    linearly = 1 - cosine.square() <= 1e-16
    angle = torch.acos(torch.where(linearly, torch.zeros_like(cosine), cosine))
    coefficients = [
        torch.where(linearly, torch.full_like(angle, part), torch.sin(part * angle) / torch.sin(angle))
        for part in (1.0 - t, t)
    ]
    if nuslerp_flatten or one.dim() < 2:
        return [float(coefficient) for coefficient in coefficients]
    return [coefficient.transpose(0, -1) if first else coefficient for coefficient in coefficients]


def model_stock(deltas: Sequence[torch.Tensor], *, filter_wise: bool = False) -> list[Coefficient]:
    """t / n for each of n deltas, t = n cos a / (1 + (n-1) cos a), cos a their mean cosine (arXiv 2403.19522, eq. 6).

    One angle for the tensor, or with `filter_wise` one a row. Where the denominator is 0, t is 0: the base stays. As in
    mergekit t is not bounded, so that opposed deltas (cos a < 0) are turned round. Nor is its floor of 1e-6 under the
    product of two lengths small everywhere: deltas shorter than 1e-3 count as less alike than they are.
    """
    flatten = not filter_wise or deltas[0].dim() < 2
    squares = [_dots(delta, delta, flatten) for delta in deltas]
    cosines = [
        (_dots(deltas[i], deltas[j], flatten) / (squares[i] * squares[j]).sqrt().clamp(min=1e-6)).clamp(-1, 1)
        for i, j in combinations(range(len(deltas)), 2)
    ]
    cosine = torch.stack(cosines).mean(dim=0)
    count = len(deltas)
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6
    t = torch.where(singular, torch.zeros_like(cosine), count * cosine / torch.where(singular, 1.0, denominator))
    share = t / count
    return [float(share) if flatten else share] * count


def task_arithmetic(
    deltas: Sequence[torch.Tensor], *, weight: Sequence[float], normalize: bool = False, lambda_: float = 1.0
) -> list[Coefficient]:
    """lambda * w_i, divided by the weights' sum with `normalize` unless that is 0 (arXiv 2212.04089)."""
    total = math.fsum(weight) if normalize else 1.0
    divisor = total if abs(total) >= 1e-8 else 1.0
    return [lambda_ * value / divisor for value in weight]


METHODS: dict[str, Method] = {
    "linear": Method(SIGNATURES["linear"], linear),
    "slerp": Method(SIGNATURES["slerp"], slerp),
    "nuslerp": Method(SIGNATURES["nuslerp"], nuslerp),
    "model_stock": Method(SIGNATURES["model_stock"], model_stock),
    "task_arithmetic": Method(SIGNATURES["task_arithmetic"], task_arithmetic),
    "ties": Method(SIGNATURES["ties"], task_arithmetic, trim, elects=True),
    "dare_linear": Method(SIGNATURES["dare_linear"], task_arithmetic, drop),
    "dare_ties": Method(SIGNATURES["dare_ties"], task_arithmetic, drop, elects=True),
    "breadcrumbs": Method(SIGNATURES["breadcrumbs"], task_arithmetic, trim_outliers),
    "breadcrumbs_ties": Method(SIGNATURES["breadcrumbs_ties"], task_arithmetic, trim_outliers, elects=True),
    "della": Method(SIGNATURES["della"], task_arithmetic, magprune, elects=True),
    "della_linear": Method(SIGNATURES["della_linear"], task_arithmetic, magprune),
}


def _rows(coefficient: Coefficient, rows: slice) -> Coefficient:
    """A block's part of coefficients that differ by row; those that differ by column are the same for all rows."""
    if isinstance(coefficient, torch.Tensor) and coefficient.shape[0] > 1:
        return coefficient[rows]
    return coefficient


def _dots(one: torch.Tensor, other: torch.Tensor, flatten: bool) -> torch.Tensor:
    """Sums of products in float64: of the whole tensors (shape []), or along the last axis, which becomes 1."""
    if flatten or one.dim() < 2:
        return torch.tensor(dot(one, other), dtype=torch.float64)
    return torch.cat([(one[rows].double() * other[rows].double()).sum(-1, keepdim=True) for rows in _blocks(one)])


def _blocks(tensor: torch.Tensor) -> Iterator[slice]:
    step = max(1, _PART * tensor.shape[0] // max(1, tensor.numel()))
    for start in range(0, tensor.shape[0], step):
        yield slice(start, start + step)
