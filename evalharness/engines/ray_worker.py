"""What runs inside a Ray cluster: the feed that gives work out, and the workers that do it, each with an engine."""

from __future__ import annotations

import asyncio
import os
import pickle
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from psacpo.errors import InputError
from psacpo.evalharness.config import FrontierConfig
from psacpo.evalharness.engines.base import Engine, Failure, Passage, Policy, Request
from psacpo.evalharness.engines.plan import EnginePlan


@dataclass(frozen=True)
class Work:
    """What a worker is asked at once.

    Attributes:
        method: Of its engine.
        asked: Its argument.
        place: Where all `count` workers meet before they begin, so that each does such work once; None is nowhere.
    """

    method: Literal["generate", "next_tokens", "base_log_probs"]
    asked: Sequence[Request] | Sequence[Passage]
    place: int | None = None
    count: int = 0


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
                self.fault = f"a Ray worker cannot start: {told(error)}"
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
                answers = self.answer(number, pickle.loads(batch["work"][0]))
            except InputError as error:
                fault = str(error)
            except Exception as error:  # noqa: BLE001 - told as one line by who reads it
                fault = f"a Ray worker failed: {told(error)}"
        return {"number": [number], "answers": [pickle.dumps(answers)], "fault": [fault]}

    def answer(self, number: int, work: Work) -> Sequence[Any]:
        """What the engine says to it; of work that killed its workers too often, a `Failure` each."""
        tries = self.get(self.feed.begin.remote(number))
        if tries > self.retries + 1:
            why = f"its worker died {tries - 1} times"
            if work.place is not None:
                raise InputError(f"a Ray worker failed: it died {tries - 1} times on the probe prompts")
            return [Failure(one.key, why) for one in work.asked]
        if work.place is not None:
            self.get(self.feed.meet.remote(work.place, self.name, work.count))
        return list(getattr(self.engine, work.method)(work.asked))


def told(error: Exception) -> str:
    """An error in one line: of a remote traceback the last, where its message is; with its type if it is not ours."""
    if isinstance(error, InputError):
        return str(error)
    lines = [line.strip() for line in "".join(traceback.format_exception_only(error)).splitlines() if line.strip()]
    return lines[-1][:300]
