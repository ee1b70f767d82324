"""The policies held at once: bounded, the least recently used given up, none taken from under a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

import pytest

from psacpo.errors import InputError
from psacpo.serve import pool as module
from psacpo.serve.cache import CacheFull, Lease
from psacpo.serve.pool import Busy, Pool


class Shelf:
    """Stands where the cache and the engine would be, and keeps count."""

    def __init__(self) -> None:
        self.built: Counter[str] = Counter()
        self.retired: list[str] = []
        self.open: set[str] = set()
        self.full = 0

    def acquire(self, name: str) -> Lease:
        if self.full:
            self.full -= 1
            raise CacheFull("no room")
        if name == "bad":
            raise InputError("cannot be built")
        self.built[name] += 1
        self.open.add(name)
        shelf = self

        class Held(Lease):
            def close(self) -> None:
                shelf.open.discard(name)

        return Held(Path(name))

    async def retire(self, name: str) -> None:
        assert name in self.open, "its files are there until the engine has forgotten it"
        await asyncio.sleep(0)
        self.retired.append(name)


async def ask(pool: Pool, name: str, *, hold: float = 0.0, finish: bool = True) -> None:
    async with pool.use(name) as use:
        assert pool.path(name) == use.path == Path(name)
        await asyncio.sleep(hold)
        use.finished = finish


def test_the_least_recently_used_is_given_up() -> None:
    async def scene() -> Shelf:
        shelf = Shelf()
        pool = Pool(2, shelf.acquire, shelf.retire)
        for name in ("a", "b", "a", "c", "a"):
            await ask(pool, name)
        assert pool.names == ["c", "a"]
        assert pool.path("b") is None
        assert pool.path("a") is None  # held, but no request uses it now
        return shelf

    shelf = asyncio.run(scene())
    assert shelf.retired == ["b"]
    assert shelf.open == {"a", "c"}
    assert shelf.built == {"a": 1, "b": 1, "c": 1}


def test_many_requests_over_more_policies_than_places() -> None:
    async def scene() -> Shelf:
        shelf, most = Shelf(), 0
        pool = Pool(3, shelf.acquire, shelf.retire)

        async def one(number: int) -> None:
            nonlocal most
            async with pool.use(f"p{number % 8}") as use:
                assert use.path == Path(f"p{number % 8}")
                most = max(most, len(shelf.open))
                await asyncio.sleep(0.001)
                assert use.path.name in shelf.open, "taken from under a request"
                use.finished = True

        await asyncio.gather(*(one(number) for number in range(200)))
        assert most == 3
        await pool.close()
        return shelf

    shelf = asyncio.run(scene())
    assert set(shelf.built) == {f"p{number}" for number in range(8)}
    assert shelf.open == set()


def test_one_build_for_requests_at_once() -> None:
    async def scene() -> Shelf:
        shelf = Shelf()
        pool = Pool(2, shelf.acquire, shelf.retire)
        await asyncio.gather(*(ask(pool, "a") for _ in range(20)))
        return shelf

    assert asyncio.run(scene()).built == {"a": 1}


def test_a_request_waits_for_its_turn_and_not_for_ever() -> None:
    async def scene() -> None:
        shelf = Shelf()
        pool = Pool(1, shelf.acquire, shelf.retire, patience=0.2)
        first = asyncio.create_task(ask(pool, "a", hold=0.05))
        await asyncio.sleep(0.01)
        await ask(pool, "b")  # waits for a's end
        await first
        forever = asyncio.create_task(ask(pool, "c", hold=60))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy, match="1 different ratios are being answered.*--max-ratios or with --snap"):
            await ask(pool, "d")
        await ask(pool, "c")  # one that is held needs no turn
        forever.cancel()

    asyncio.run(scene())


def test_a_policy_rests_after_a_request_that_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REST", 0.3)

    async def scene() -> None:
        shelf = Shelf()
        pool = Pool(1, shelf.acquire, shelf.retire, patience=0.1)
        await ask(pool, "a", finish=False)
        with pytest.raises(Busy):
            await ask(pool, "b")
        assert shelf.retired == []
        await asyncio.sleep(0.25)
        await ask(pool, "b")
        assert shelf.retired == ["a"]

    asyncio.run(scene())


def test_a_cancelled_request_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REST", 0.0)

    async def scene() -> None:
        shelf = Shelf()
        pool = Pool(1, shelf.acquire, shelf.retire, patience=1)
        tasks = [asyncio.create_task(ask(pool, name, hold=60)) for name in ("a", "b", "c")]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await ask(pool, "d")
        assert pool.names == ["d"]

    asyncio.run(scene())


def test_a_policy_that_cannot_be_built_takes_no_place() -> None:
    async def scene() -> None:
        shelf = Shelf()
        pool = Pool(1, shelf.acquire, shelf.retire, patience=0.2)
        for _ in range(3):
            with pytest.raises(InputError, match="cannot be built"):
                await ask(pool, "bad")
        assert pool.names == []
        assert pool.path("bad") is None
        await ask(pool, "a")

    asyncio.run(scene())


def test_a_full_cache_makes_the_pool_give_up_what_it_does_not_need() -> None:
    async def scene() -> None:
        shelf = Shelf()
        pool = Pool(5, shelf.acquire, shelf.retire)
        await ask(pool, "a")
        await ask(pool, "b")
        shelf.full = 1
        await ask(pool, "c")
        assert shelf.retired == ["a"]
        shelf.full = 9
        with pytest.raises(CacheFull):
            await ask(pool, "d")
        assert shelf.open == set()
        shelf.full = 0
        await ask(pool, "d")

    asyncio.run(scene())
