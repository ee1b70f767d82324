"""Ray Data actors, each with an engine of its own: GPUs and machines beyond one."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import pickle
import traceback
from collections import Counter
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


class Feed:
    """What the workers are to do, and who they are. An actor: Ray Data reads from it for as long as the engine is open.

    Work is asked for by its number, so that a reader that died and is started anew reads the same again.
    """

    def __init__(self) -> None:
        self.work: list[bytes] = []
        self.tries: Counter[int] = Counter()
        self.starts: Counter[str] = Counter()
        self.met: dict[int, set[str]] = {}
        self.workers: dict[str, tuple[Any, int]] = {}
        self.changed = asyncio.Condition()

    async def put(self, work: Sequence[bytes]) -> int:
        """The number of the first of `work`."""
        async with self.changed:
            self.work += work
            self.changed.notify_all()
        return len(self.work) - len(work)

    async def get(self, number: int) -> bytes:
        async with self.changed:
            await self.changed.wait_for(lambda: number < len(self.work))
        return self.work[number]

    async def begin(self, number: int) -> int:
        """How often this work has been begun."""
        self.tries[number] += 1
        return self.tries[number]

    async def enter(self, name: str, actor: Any, process: int) -> int:
        """How often in a row this worker has begun to start."""
        self.workers[name] = (actor, process)
        self.starts[name] += 1
        return self.starts[name]

    async def entered(self, name: str) -> None:
        del self.starts[name]

    async def meet(self, place: int, name: str, count: int) -> None:
        """Wait until `count` workers are here, so that none of them takes what is another's."""
        async with self.changed:
            self.met.setdefault(place, set()).add(name)
            self.changed.notify_all()
            await self.changed.wait_for(lambda: len(self.met[place]) >= count)

    async def present(self) -> list[tuple[Any, int]]:
        """The actor and the process id of each worker."""
        return list(self.workers.values())


class Worker:
    """What runs in a worker: one engine, made from the sweep's settings. Ray Data makes an actor of it.

    What goes wrong in it is an answer like any other: an exception would be a traceback on its way through Ray Data.
    """

    def __init__(
        self, feed: Any, retries: int, config: FrontierConfig, base: str, policies: Sequence[Policy], plan: EnginePlan
    ) -> None:
        import ray

        self.get, self.feed, self.retries = ray.get, feed, retries
        context = ray.get_runtime_context()
        self.name: str = context.get_actor_id()
        self.fault = ""
        starts = self.get(feed.enter.remote(self.name, context.current_actor, os.getpid()))
        if starts > retries + 1:
            self.fault = f"a Ray worker cannot start: it died {starts - 1} times at that"
        else:
            try:
                self.engine = self.start(config, base, policies, plan)
            except Exception as error:  # noqa: BLE001 - whatever keeps an engine from starting
                self.fault = f"a Ray worker cannot start: {_told(error)}"
        self.get(feed.entered.remote(self.name))

    def start(self, config: FrontierConfig, base: str, policies: Sequence[Policy], plan: EnginePlan) -> Engine:
        from psacpo.evalharness.engines import start_engine
        from psacpo.evalharness.engines.whole import read_policy

        adapters = {name: read_policy(path, base) for name, path in config.adapters.items()}
        return start_engine(config, Path(base), adapters, policies, plan)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """One row in, one row out: `number` and `work` to `number`, `answers` and `fault`, the message of an error."""
        number = int(batch["number"][0])
        answers: Any = None
        fault = self.fault
        if not fault:
            try:
                answers = self.answer(number, *pickle.loads(batch["work"][0]))
            except InputError as error:
                fault = str(error)
            except Exception as error:  # noqa: BLE001 - told as one line by who reads it
                fault = f"a Ray worker failed: {_told(error)}"
        return {"number": [number], "answers": [pickle.dumps(answers)], "fault": [fault]}

    def answer(self, number: int, requests: Sequence[Request], place: int | None, count: int) -> Sequence[Any]:
        """To the requests; what comes next after each, where there is a `place` at which all `count` workers meet."""
        tries = self.get(self.feed.begin.remote(number))
        if tries > self.retries + 1:
            why = f"its worker died {tries - 1} times"
            if place is not None:
                raise InputError(f"a Ray worker failed: it died {tries - 1} times on the probe prompts")
            return [Failure(request.key, why) for request in requests]
        if place is None:
            return list(self.engine.generate(requests))
        self.get(self.feed.meet.remote(place, self.name, count))
        return list(self.engine.next_tokens(requests))


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
        for answers in self._answers([(batch, None, 0) for batch in self._batches(requests)]):
            yield from answers

    def next_tokens(self, requests: Sequence[Request]) -> Sequence[Mapping[str, NextTokens]]:
        """One for each worker: each has loaded the policies for itself."""
        self._probes += 1
        work = [(list(requests), self._probes, self.count)] * self.count
        return [found for replica in self._answers(work) for found in replica]

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

    def _answers(self, work: Sequence[tuple[Sequence[Request], int | None, int]]) -> Iterator[Any]:
        """What each of `work` gives, as it is done."""
        first = self._ray.get(self._feed.put.remote([pickle.dumps(entry) for entry in work]))
        waiting = set(range(first, first + len(work)))
        while waiting:
            try:
                row = next(self._rows)  # type: ignore[arg-type]
            except Exception as error:
                raise InputError(f"a Ray worker failed: {_told(error)}") from error
            if row["fault"][0]:
                raise InputError(str(row["fault"][0]))
            if (number := int(row["number"][0])) in waiting:
                waiting.remove(number)
                yield pickle.loads(row["answers"][0])

    def _batches(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        """In the order given where a batch's company counts; else by policy, if policies are swapped in one by one."""
        share = -(-len(requests) // (_SHARES * self.count))
        if self.batch_size is not None:
            # Whole batches of the engine: equal batches give equal answers.
            size = self._size or self.batch_size
            size = max(self.batch_size, size - size % self.batch_size)
        else:
            size = self._size or max(_LEAST, share)
        if self.plan.strategy == "reload":
            requests = sorted(requests, key=lambda request: request.policy.name)
        return [requests[start : start + size] for start in range(0, len(requests), size)]


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


def _told(error: Exception) -> str:
    """An error in one line: of a remote traceback the last, where its message is; with its type if it is not ours."""
    if isinstance(error, InputError):
        return str(error)
    lines = [line.strip() for line in "".join(traceback.format_exception_only(error)).splitlines() if line.strip()]
    return lines[-1][:300]
