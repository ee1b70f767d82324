"""The two adapters in memory, and the policy between them at any ratio as a leased directory of the cache."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from psacpo.errors import InputError
from psacpo.files import digest
from psacpo.merge import Adapter, factors_by_module, policy_name, read_adapter
from psacpo.merge.adapters import adapter_bytes, require_plain, write_adapter
from psacpo.serve.cache import Lease, PolicyCache
from psacpo.serve.plan import Plan
from psacpo.serve.ratios import parse_policy

# Changes when policies are written in another way, so that an entry of an older version is never served.
_FORMAT = 1
# Of configuration, manifest and safetensors header: for the whole and for each module.
_OVERHEAD, _OVERHEAD_PER_MODULE = 64 << 10, 2 << 10
# Last names of the output embedding, to which vLLM puts no adapter.
_HEADS = ("lm_head", "embed_out")


def require_servable(adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters, by name, that vLLM would load in part or not at all.

    Raises:
        InputError: One is more than its factors (DoRA, trained biases, modules_to_save), or adapts an embedding.
    """
    require_plain(adapters)
    for name, adapter in adapters.items():
        for module in adapter.modules:
            if module in adapter.embeddings or module.rpartition(".")[2] in _HEADS:
                raise InputError(
                    f"adapter {name} changes {module}, to which vLLM puts no adapter",
                    given=str(adapter.path),
                    allowed="adapters on the layers' linear modules, or full weights of one ratio by psacpo merge "
                    "--as checkpoint, opened in vLLM",
                )


def cache_key(reward: Adapter, safety: Adapter) -> str:
    """What the policies of two adapters are kept under: the same for equal adapters, wherever they lie."""
    return digest([_FORMAT, reward.content, safety.content])[:32]


def policy_rank(adapters: Sequence[Adapter], ratios: Sequence[float]) -> int:
    """The largest rank of any module of the policies at `ratios`; empty stands for all ratios."""
    if ratios and set(ratios) <= {0.0, 1.0}:
        kept = [adapter for adapter, end in zip(adapters, (0.0, 1.0), strict=True) if end in ratios]
        return max(factors.rank for adapter in kept for factors in adapter.modules.values())
    rows = factors_by_module(adapters).values()
    return max(sum(factors.rank for factors in row if factors is not None) for row in rows)


def policy_bytes(adapters: Sequence[Adapter]) -> int:
    """What a policy between the ends takes on disk at most, in bytes."""
    modules = len(factors_by_module(adapters))
    return adapter_bytes(adapters, (0.5, 0.5)) + _OVERHEAD + _OVERHEAD_PER_MODULE * modules


class Policies:
    """Builds policies and keeps them on disk.

    Args:
        plan: What the launcher settled.
        cache: Where policies are kept.
    """

    def __init__(self, plan: Plan, cache: PolicyCache) -> None:
        self.plan, self.cache = plan, cache
        self._adapters: list[Adapter] | None = None
        self._reading = threading.Lock()

    def lease(self, name: str) -> Lease:
        """The policy's directory, built if it is not in the cache. Blocks; may be called from any thread.

        Raises:
            CacheFull: There is no room for it beside the policies in use.
            InputError: The adapters have changed since the start, or the disk is full.
        """
        return self.cache.lease(self.plan.key, name, self.plan.policy_bytes, lambda place: self._write(place, name))

    def cached(self) -> list[str]:
        """Names of the policies on disk, in no order."""
        return self.cache.names(self.plan.key)

    def read(self) -> list[Adapter]:
        """The reward and the safety adapter, read once."""
        with self._reading:
            if self._adapters is None:
                adapters = [read_adapter(self.plan.reward), read_adapter(self.plan.safety)]
                for adapter, content in zip(
                    adapters, (self.plan.reward_content, self.plan.safety_content), strict=True
                ):
                    if adapter.content != content:
                        raise InputError(f"the adapter {adapter.path} has changed since the server started")
                self._adapters = adapters
            return self._adapters

    def _write(self, place: Path, name: str) -> None:
        ratio = parse_policy(name)
        assert policy_name(ratio) == name
        write_adapter(place, self.read(), (1.0 - ratio, ratio), base=self.plan.base)
