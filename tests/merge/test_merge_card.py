"""The card's numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from psacpo.merge.card import Dial, render_card, vllm_rank
from psacpo.merge.config import MergeConfig


@pytest.mark.parametrize(("rank", "legal"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, None)])
def test_rank_that_vllm_takes(rank: int, legal: int | None) -> None:
    assert vllm_rank(rank) == legal


def test_effective_lambda_and_beta() -> None:
    dial = Dial(beta=0.1, lambda_bar=4.0)
    assert dial.effective(1.0) == (4.0, 0.025)
    assert dial.effective(0.5) == (2.0, 0.05)
    assert dial.effective(0.0) == (0.0, math.inf)


def test_a_rank_beyond_vllm_is_told() -> None:
    (mix,) = MergeConfig(reward=Path("r"), safety=Path("s"), base="b/ase", ratios=[0.0], out=Path("o")).mixes()
    card = render_card(
        kind="adapter",
        base="b/ase",
        mix=mix,
        sources=["reward", "safety"],
        of_adapters=True,
        digests={},
        rank=600,
        dial=Dial(0.1, 10.0),
    )
    assert "--max-lora-rank" not in card
    assert "merge with `--as checkpoint`" in card
    assert "infinite (no safety stage)" in card
