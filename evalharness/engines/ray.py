"""Workers of a Ray cluster, each with an engine of its own: GPUs and machines beyond one."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from psacpo.console import say
from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines.base import Completion, Engine, Failure, NextTokens, Policy, Request
from psacpo.evalharness.engines.plan import EnginePlan
from psacpo.merge.adapters import Adapter

# Batches that each worker gets in a sweep, so that none waits long for the others at its end.
_SHARES = 8
# Requests that vLLM gets at once at least: fewer leave its batches half empty.
_LEAST = 256


class Worker:
    """What runs in a worker: one engine, made from the sweep's settings. Ray makes an actor of it."""

    def __init__(self, config: FrontierConfig, base: str, policies: Sequence[Policy], plan: EnginePlan) -> None:
        from psacpo.evalharness.engines import start_engine
        from psacpo.evalharness.engines.whole import read_policy

        adapters = {name: read_policy(path, base) for name, path in config.adapters.items()}
        self.engine: Engine = start_engine(config, Path(base), adapters, policies, plan)

    def generate(self, requests: Sequence[Request]) -> list[Completion | Failure]:
        return list(self.engine.generate(requests))

    def next_tokens(self, requests: Sequence[Request]) -> list[Mapping[str, NextTokens]]:
        return list(self.engine.next_tokens(requests))

    def process(self) -> int:
        """The id of the process that it runs in."""
        return os.getpid()


class RayEngine:
    """A pool of workers.

    Requests go out in batches, and answers come back by the batch. A worker that dies is started anew, on another
    machine if need be, and gets its batch again.

    Attributes:
        batch_size: Requests whose company decides their last bits, as in one engine of the kind that the workers hold.
    """

    def __init__(
        self,
        config: FrontierConfig,
        base: Path,
        adapters: Mapping[str, Adapter],
        policies: Sequence[Policy],
        plan: EnginePlan,
    ) -> None:
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            _connect(ray)
        self.plan = plan
        self.batch_size: int | None = config.generation.batch_size if plan.name == "transformers" else None
        self._size, self._retries = config.ray.batch_size, config.ray.retries
        gpus = _gpus(config, plan, ray.cluster_resources())
        count = config.ray.workers or _room(ray.cluster_resources(), config.ray.cpus, gpus)
        # Ray starts a dead worker anew and gives it its batch again, so often for each batch.
        actor = ray.remote(
            num_cpus=config.ray.cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=config.ray.retries
        )(Worker)
        absolute = config.model_copy(
            update={"adapters": {name: adapter.path.resolve() for name, adapter in adapters.items()}}
        )
        self.workers = [actor.remote(absolute, str(base.resolve()), list(policies), plan) for _ in range(count)]
        say(f"{count} Ray workers with the {plan.name} engine")

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """The answers, a worker's batch at a time.

        Raises:
            InputError: What a worker's engine raises for the sweep as a whole.
        """
        waiting = deque(self._batches(requests))
        idle = deque(self.workers)
        under_way: dict[Any, tuple[Any, Sequence[Request]]] = {}
        while waiting or under_way:
            while waiting and idle:
                worker, batch = idle.popleft(), waiting.popleft()
                under_way[worker.generate.remote(batch)] = (worker, batch)
            [reference], _ = self._ray.wait(list(under_way), num_returns=1)
            worker, batch = under_way.pop(reference)
            idle.append(worker)
            try:
                answers = self._ray.get(reference)
            except self._ray.exceptions.RayActorError as error:
                why = f"its worker died {self._retries + 1} times: {_last_line(error)}"
                answers = [Failure(request.key, why) for request in batch]
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            yield from answers

    def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
        """One for each worker: each has loaded the policies for itself."""
        asked = [worker.next_tokens.remote(list(requests)) for worker in self.workers]
        try:
            return [found for replica in self._ray.get(asked) for found in replica]
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except self._ray.exceptions.RayActorError as error:
            raise InputError(f"a Ray worker cannot start: {_last_line(error)}") from error

    def close(self) -> None:
        """End the workers, and the connection if it was made here."""
        for worker in self.workers:
            with contextlib.suppress(Exception):
                self._ray.kill(worker)
        self.workers = []
        if self._started:
            self._ray.shutdown()

    def _batches(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        """In the order given where a batch's company counts; else by policy, if policies are swapped in one by one."""
        share = -(-len(requests) // (_SHARES * max(1, len(self.workers))))
        if self.batch_size is not None:
            # Whole batches of the engine: equal batches give equal answers.
            size = self._size or self.batch_size
            size = max(self.batch_size, size - size % self.batch_size)
        else:
            size = self._size or max(_LEAST, share)
        if self.plan.strategy == "reload":
            requests = sorted(requests, key=lambda request: request.policy.name)
        return [requests[start : start + size] for start in range(0, len(requests), size)]


def _connect(ray: Any) -> None:
    """Join the cluster that RAY_ADDRESS names, else start one on this machine."""
    import logging

    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
    except Exception as error:
        raise InputError(
            f"engine ray: no cluster at {address or 'this machine'}: {str(error).strip().splitlines()[0][:200]}",
            allowed="RAY_ADDRESS of a running cluster, or none to start one here",
        ) from error


def _gpus(config: FrontierConfig, plan: EnginePlan, cluster: Mapping[str, float]) -> float:
    """GPUs that a worker takes."""
    if config.ray.gpus is not None:
        return config.ray.gpus
    if not cluster.get("GPU") or config.device == "cpu":
        return 0
    return config.vllm.tensor_parallel_size * config.vllm.pipeline_parallel_size if plan.name == "vllm" else 1


def _room(cluster: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many workers a cluster has room for."""
    rooms = [int(cluster.get("CPU", 0) // cpus)] + ([int(cluster.get("GPU", 0) // gpus)] if gpus else [])
    if min(rooms) < 1:
        raise InputError(
            f"engine ray: the cluster has {cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs",
            given=f"a worker that takes {cpus:g} and {gpus:g}",
            allowed="smaller ray.cpus and ray.gpus",
        )
    return min(rooms)


def _cause(error: Any) -> Exception:
    """The error that was raised in the worker, where it is one for the user."""
    cause = error.cause if isinstance(getattr(error, "cause", None), InputError) else None
    return cause or InputError(f"a Ray worker failed: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    """What a remote error says in the end: of a traceback the last line, where the message is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).removeprefix("psacpo.errors.InputError: ")[:300]
