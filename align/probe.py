"""Which way of asking is right for this model: decided on the model itself, by two of the pairs it will train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from psacpo.align.examples import Example
from psacpo.align.forward import PLAIN, Route

# How far the mean log-probability of a token may be off, in nats. Wrong masks or positions give tenths and more, and
# rounding about 1e-6 in float32 and 1e-2 in half precision.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_HALF = 0.06
# What a model's own code raises on a mask, positions or a head it does not know.
_UNABLE = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)


def probe_pairs(pairs: Sequence[Example]) -> list[Example]:
    """The longest and the shortest pair: one reaches as far as any row will, the other stands beside padding."""
    longest, shortest = max(pairs, key=len), min(pairs, key=len)
    return [longest] if longest is shortest else [longest, shortest]


def choose_route(score: Callable[[Route], Tensor], dtype: torch.dtype, obstacle: str = "") -> tuple[Route, str]:
    """The fastest route that gives what the plain one gives, and why it is not the fastest of all.

    The plain route is right for every causal model. Sharing prompts is not where a model mixes neighbours outside of
    attention (state-space and linear-attention layers), computes its own mask or position of each token, or takes no
    mask of who sees whom; logits in chunks are not where the model does something to its logits. The numbers tell.

    Args:
        score: Log-probabilities of the probe's answers by a route, shape (2B, L); raises where the model cannot.
        dtype: Of the computation.
        obstacle: Why prompts cannot be shared, where that is known without asking the model.

    Returns:
        The route, and a reason of one line; "" where it is the fastest.

    Raises:
        FloatingPointError: The plain route's log-probabilities are not finite.
    """
    plain = score(PLAIN)
    if not bool(torch.isfinite(plain).all()):
        raise FloatingPointError("log-probabilities that are not finite")
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE_HALF)

    def problem(route: Route) -> str:
        try:
            found = score(route)
        except _UNABLE as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        off = float((found - plain).abs().sum() / (plain != 0).sum())
        return "" if off <= tolerance else f"it changes log-probabilities by {off:.2g} nats a token"

    if not obstacle and not problem(Route("shared", "chunked")):
        return Route("shared", "chunked"), ""
    chunked = problem(Route("padded", "chunked"))
    head = "model" if chunked else "chunked"
    obstacle = obstacle or problem(Route("shared", head))  # type: ignore[arg-type]
    reasons = [f"prompts are not shared: {obstacle}"] if obstacle else []
    reasons += [f"logits are the model's own: {chunked}"] if chunked else []
    return Route("padded" if obstacle else "shared", head), "; ".join(reasons)  # type: ignore[arg-type]


# Attention that ends some tokens back: a given mask would take the place of the model's own.
_WINDOWS = ("sliding_window", "attention_chunk_size")


def window_obstacle(config: Any, longest: int) -> str:
    """Why prompts cannot be shared over rows of up to `longest` tokens, by the model's configuration; "" if they can.

    On rows within the window a model with windowed attention is a model with full attention.
    """
    for name in _WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and longest > window:
            return f"attention reaches {window} tokens back, and rows have up to {longest}"
    return ""
