"""The policy as it was when a stage began, for the log-probabilities that its losses refer to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


class Start:
    """Gives the policy its starting weights back for a while.

    A fresh adapter adds exact zeros, so there the base alone is the start, which takes less time. Otherwise a copy of
    the trainable weights is kept: an adapter's are small. Under FSDP2 each process keeps its own shards.
    """

    def __init__(self, policy: Any, *, fresh: bool, keep: bool = True) -> None:
        """
        Args:
            policy: A PEFT model before its first update, wrapped and placed as it will be trained.
            fresh: Whether the adapter is untrained.
            keep: Whether to keep a copy where one is needed. Without, the start of an adapter that is not fresh can be
                had until the first update only.
        """
        self.policy = policy
        self.fresh = fresh
        # Whether the start is gone with the first update.
        self.passing = not keep and not fresh
        self.kept = [parameter.detach().clone() for parameter in trainable(policy)] if keep and not fresh else None

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
        with replaced(self.policy, self.kept):
            yield


def can_keep(accelerator: Accelerator) -> bool:
    """Whether weights may be put into a wrapped model from outside: not where they are shards that it alone knows of."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return bool(accelerator.state.deepspeed_plugin.zero_stage < 3)
    return bool(accelerator.distributed_type != DistributedType.FSDP or accelerator.is_fsdp2)


def trainable(policy: nn.Module) -> list[Tensor]:
    """The trained parameters as the optimiser has them: under FSDP2, this process's shards."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            # Some units stay whole after a forward, and would not see that their shards were changed.
            module.reshard()
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def replaced(policy: nn.Module, values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the trained parameters have other values; afterwards what they had."""
    now = [parameter.detach().clone() for parameter in trainable(policy)]
    _fill(policy, values)
    try:
        yield
    finally:
        _fill(policy, now)


@torch.no_grad()
def _fill(policy: nn.Module, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(trainable(policy), values, strict=True):
        parameter.copy_(value)
