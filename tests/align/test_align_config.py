"""Settings of align that are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from psacpo.align.config import AlignConfig
from psacpo.config import validate
from psacpo.errors import InputError


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "a", "data": "d", "start": "b"}], "starts at 'b'; allowed: base$"),
        ([{"name": "a", "data": "d"}, {"name": "b", "data": "d", "start": "c"}], "starts at 'c'; allowed: base, a$"),
        ([{"name": "a", "data": "d", "adam_betas": [1, 1]}], r"adam_betas \[1.0, 1.0\] are out of range"),
        ([{"name": "a", "data": "d", "learning_rate": 1e10}], "learning_rate"),
        ([{"name": "../a", "data": "d"}], "not a plain directory name"),
    ],
)
def test_bad_stages_are_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(AlignConfig, {"base": "b", "out": "o", "stages": stages}, where="psacpo.yaml")
