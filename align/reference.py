"""The policy as it was when a stage began, for the log-probabilities that its losses refer to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Start:
    """Gives the policy its starting weights back for a while.

    A fresh adapter adds exact zeros, so there the base alone is the start, which takes less time. Otherwise a copy of
    the trainable weights is kept: an adapter's are small.
    """

    def __init__(self, policy: Any, *, fresh: bool, keep: bool = True) -> None:
        """
        Args:
            policy: A PEFT model before its first update, wrapped and placed as it will be trained.
            fresh: Whether the adapter is untrained.
            keep: Whether to keep a copy where one is needed. Without, the start of an adapter that is not fresh can be
                had until the first update only: where weights are sharded they may not be put in from outside.
        """
        self.policy = policy
        self.fresh = fresh
        # Whether the start is gone with the first update.
        self.passing = not keep and not fresh
        self.kept = [parameter.detach().clone() for parameter in self._trainable()] if keep and not fresh else None

    def _trainable(self) -> list[Tensor]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the policy is the start, in evaluation mode and without gradients; afterwards what it was."""
        training = self.policy.training
        self.policy.eval()
        try:
            with torch.no_grad(), self.policy.disable_adapter() if self.fresh else self._weights():
                yield
        finally:
            self.policy.train(training)

    @contextlib.contextmanager
    def _weights(self) -> Iterator[None]:
        if self.kept is None:
            yield
            return
        parameters = self._trainable()
        now = [parameter.detach().clone() for parameter in parameters]
        _fill(parameters, self.kept)
        try:
            yield
        finally:
            _fill(parameters, now)


def _fill(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
