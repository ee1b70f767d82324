"""Inverse-transform sampling against distributions known in closed form."""

from __future__ import annotations

import numpy as np
import torch

from psacpo.evalharness.engines.sampling import next_tokens, uniforms


def sample(logits: list[float], us: list[float], **settings: float) -> list[int]:
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | settings
    rows = torch.tensor([logits] * len(us))
    return next_tokens(rows, torch.tensor(us, dtype=torch.float64), **options).tolist()  # type: ignore[arg-type]


LOGITS = [float(np.log(p)) for p in (0.5, 0.2, 0.3)]


def test_quantiles_of_a_known_distribution() -> None:
    # Cumulative mass in vocabulary order: 0.5, 0.7, 1.0.
    assert sample(LOGITS, [0.0, 0.499, 0.501, 0.699, 0.701, 0.999999]) == [0, 0, 1, 1, 2, 2]


def test_temperature() -> None:
    assert sample(LOGITS, [0.1, 0.99], temperature=0.0) == [0, 0]
    # At temperature 1/2 probabilities are squared: 0.25, 0.04, 0.09 of 0.38; cumulative 0.658, 0.763, 1.
    assert sample(LOGITS, [0.657, 0.659, 0.762, 0.764], temperature=0.5) == [0, 1, 1, 2]


def test_top_k_keeps_the_likeliest() -> None:
    # Tokens 0 and 2 stay with 0.5 and 0.3 of 0.8: the border is 0.625.
    assert sample(LOGITS, [0.624, 0.626, 0.99], top_k=2) == [0, 2, 2]


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    assert sample(LOGITS, [0.999], top_p=0.5) == [0]
    assert sample(LOGITS, [0.624, 0.626], top_p=0.51) == [0, 2]
    assert sample(LOGITS, [0.999], top_p=1e-9) == [0]


def test_frequencies_match_probabilities() -> None:
    draws = np.bincount(sample(LOGITS, uniforms(0, 40_000).tolist()), minlength=3) / 40_000
    np.testing.assert_allclose(draws, [0.5, 0.2, 0.3], atol=0.01)  # 4 standard errors of 40,000 draws


def test_a_token_of_no_probability_is_never_taken() -> None:
    logits = [-np.inf, 0.0, -np.inf]
    assert sample(logits, [0.0, 0.5, 1 - 1e-12]) == [1, 1, 1]


def test_uniforms_depend_on_the_seed_alone() -> None:
    np.testing.assert_array_equal(uniforms(5, 10), uniforms(5, 20)[:10])
    assert not np.array_equal(uniforms(5, 10), uniforms(6, 10))
    assert uniforms(2**64 - 1, 3).max() < 1
