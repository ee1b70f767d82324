"""Ray Data actors, each with an engine of its own: GPUs and machines beyond one."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from psacpo.console import say
from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines.base import Completion, Failure, NextTokens, Passage, Policy, Request
from psacpo.evalharness.engines.plan import EnginePlan
from psacpo.evalharness.engines.ray_worker import Feed, Work, Worker, told
from psacpo.merge.adapters import Adapter

_Asked = TypeVar("_Asked", Request, Passage)
# Batches that each worker gets in a sweep, so that none waits long for the others at its end.
_SHARES = 8
# Requests that vLLM gets at once at least: fewer leave its batches half empty.
_LEAST = 256


class RayEngine:
    """An actor pool of Ray Data, fed for as long as the engine is open: each worker starts its engine once.

    Requests go out in batches, and answers come back by the batch. A worker that dies is started anew, on another
    machine if need be, and gets its batch again.

    Attributes:
        batch_size: Requests whose company decides their last bits, as in one engine of the kind that the workers hold.
        count: Workers.
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
        self._size, self._probes = config.ray.batch_size, 0
        gpus = _gpus(config, plan, ray.cluster_resources())
        self.count = config.ray.workers or _room(ray.cluster_resources(), config.ray.cpus, gpus)
        absolute = config.model_copy(
            update={"adapters": {name: adapter.path.resolve() for name, adapter in adapters.items()}}
        )
        # On this machine, whose end ends the sweep anyway: that of any other machine then costs a batch, not the sweep.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self._feed = ray.remote(num_cpus=0, scheduling_strategy=here)(Feed).remote()
        settings = {
            "feed": self._feed,
            "retries": config.ray.retries,
            "config": absolute,
            "base": str(base.resolve()),
            "policies": list(policies),
            "plan": plan,
        }
        self._rows: Iterator[Mapping[str, Any]] | None = _rows(self._feed, settings, self.count, config.ray.cpus, gpus)
        say(f"{self.count} Ray workers with the {plan.name} engine")

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """The answers, a worker's batch at a time.

        Raises:
            InputError: What a worker's engine raises for the sweep as a whole, or that a worker cannot start.
        """
        if self.plan.strategy == "reload":
            # By policy, if policies are swapped in one by one; where a batch's company counts the order stays.
            requests = sorted(requests, key=lambda request: request.policy.name)
        for answers in self._answers([Work("generate", batch) for batch in self._batches(requests)]):
            yield from answers

    def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
        """One for each worker: each has loaded the policies for itself."""
        self._probes += 1
        work = [Work("next_tokens", list(requests), self._probes, self.count)] * self.count
        return [found for replica in self._answers(work) for found in replica]

    def base_log_probs(self, passages: Sequence[Passage]) -> Iterator[tuple[str, float] | Failure]:
        """As the workers' engines give them, a worker's batch at a time."""
        for found in self._answers([Work("base_log_probs", batch) for batch in self._batches(passages)]):
            yield from found

    def close(self) -> None:
        """End the workers, and the connection if it was made here."""
        if self._rows is not None:
            self._rows = None  # Ray Data ends what it executes when nobody is left to read of it.
            with contextlib.suppress(Exception):
                # Not before they have finished their batches, if nothing is done about it.
                for actor, _ in self._ray.get(self._feed.present.remote()):
                    self._ray.kill(actor)
                self._ray.kill(self._feed)
        if self._started:
            self._ray.shutdown()

    def processes(self) -> list[int]:
        """The ids of the processes of the workers that have begun to start, each on its own machine."""
        return [process for _, process in self._ray.get(self._feed.present.remote())]

    def _answers(self, work: Sequence[Work]) -> Iterator[Any]:
        """What each of `work` gives, as it is done."""
        first = self._ray.get(self._feed.put.remote([pickle.dumps(entry) for entry in work]))
        waiting = set(range(first, first + len(work)))
        while waiting:
            try:
                row = next(self._rows)  # type: ignore[arg-type]
            except Exception as error:
                raise InputError(f"a Ray worker failed: {told(error)}") from error
            if row["fault"][0]:
                raise InputError(str(row["fault"][0]))
            if (number := int(row["number"][0])) in waiting:
                waiting.remove(number)
                yield pickle.loads(row["answers"][0])

    def _batches(self, asked: Sequence[_Asked]) -> list[Sequence[_Asked]]:
        """In the order given; whole batches of the engine where a batch's company counts."""
        share = -(-len(asked) // (_SHARES * self.count))
        if self.batch_size is not None:
            # Whole batches of the engine: equal batches give equal answers.
            size = self._size or self.batch_size
            size = max(self.batch_size, size - size % self.batch_size)
        else:
            size = self._size or max(_LEAST, share)
        return [asked[start : start + size] for start in range(0, len(asked), size)]


def _rows(feed: Any, settings: Mapping[str, Any], count: int, cpus: float, gpus: float) -> Iterator[Mapping[str, Any]]:
    """What `count` workers make of what is put into `feed`, row by row, as they are done."""
    import pyarrow as pa
    import ray
    from ray.data.block import BlockMetadata

    class Source(ray.data.Datasource):  # type: ignore[misc]
        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            def read() -> Iterator[Any]:
                number = 0
                while True:
                    work = ray.get(feed.get.remote(number))
                    yield pa.table({"number": [number], "work": pa.array([work], pa.large_binary())})
                    number += 1

            unknown = dict.fromkeys(inspect.signature(BlockMetadata).parameters)
            return [ray.data.ReadTask(read, BlockMetadata(**unknown))]

        def estimate_inmemory_data_size(self) -> None:
            return None

    # The reader only waits: it takes no CPU from the workers. Older Rays know no `num_cpus` here.
    named = "num_cpus" in inspect.signature(ray.data.read_datasource).parameters
    no_cpu: dict[str, Any] = {"num_cpus": 0} if named else {"ray_remote_args": {"num_cpus": 0}}
    answers = ray.data.read_datasource(Source(), override_num_blocks=1, **no_cpu).map_batches(
        Worker,
        fn_constructor_kwargs=settings,
        batch_size=1,
        batch_format="numpy",
        # A worker that had the next batch already would keep it from those that are idle.
        compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    answers.context.enable_progress_bars = False
    # Each row is a block of its own: Ray Data would hold them back until they are a block of 128 MiB.
    answers.context.target_max_block_size = 1
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)  # Ray's own file of it stays as it is.
    # One block fetched ahead would be one that is not given out before the next is there.
    return iter(answers.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"))


def _connect(ray: Any) -> None:
    """Join the cluster that RAY_ADDRESS names, else start one on this machine."""
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"include_dashboard": False}
    # Else Ray's core warns, at each start of a pool, of how Ray Data starts its actors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with _hushed():
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
    except Exception as error:
        raise InputError(
            f"engine ray: no cluster at {address or 'this machine'}: {str(error).strip().splitlines()[0][:200]}",
            allowed="RAY_ADDRESS of a running cluster, or none to start one here",
        ) from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on this process's stderr, also from C++: Ray's core says there which level of its log was set."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


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
