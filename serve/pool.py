"""The policies that a server holds at once: a bounded number, the least recently used given up first.

No policy is given up while a request uses it. When all are in use, a request for one more waits for its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from psacpo.serve.cache import CacheFull, Lease

# Seconds that a policy is kept after a request for it that broke off: the engine may still be at one of its tokens,
# and would look for the adapter's files if its own copy had to make room.
_REST = 5.0


class Busy(Exception):
    """All policies that may be held at once are in use, for longer than a request waits."""


@dataclass
class _Slot:
    ready: asyncio.Task[Lease]
    users: int = 1
    rests_until: float = 0.0


@dataclass
class Use:
    """One request's use of a policy.

    Attributes:
        path: The adapter's directory.
        finished: Whether the request came to its end, which the engine then knows too.
    """

    path: Path
    finished: bool = field(default=False)


class Pool:
    """At most `capacity` policies at once.

    Args:
        capacity: Number of policies.
        acquire: Name -> lease on its adapter; blocks, so it is run in a thread.
        retire: Called with a name before its lease is closed: make the engine forget it.
        patience: Seconds that a request waits for its turn.
    """

    def __init__(
        self,
        capacity: int,
        acquire: Callable[[str], Lease],
        retire: Callable[[str], Awaitable[None]],
        *,
        patience: float = 120.0,
    ) -> None:
        self.capacity = capacity
        self._acquire, self._retire, self._patience = acquire, retire, patience
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @property
    def names(self) -> list[str]:
        """The policies held now, the least recently used first."""
        return list(self._slots)

    @contextlib.asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Use]:
        """Hold a policy while a request is answered; it is built on its first use.

        Raises:
            Busy: No turn came in time.
            CacheFull: There is no room for it on disk.
            InputError: It could not be built.
        """
        slot = await self._admit(name)
        use: Use | None = None
        try:
            # Shielded: another request may wait for the same build when this one's client goes away.
            use = Use((await asyncio.shield(slot.ready)).path)
            yield use
        finally:
            slot.users -= 1
            if use is None or not use.finished:
                slot.rests_until = time.monotonic() + _REST
            self._freed.set()

    def path(self, name: str) -> Path | None:
        """The directory of a policy that a request is using now, None for any other."""
        slot = self._slots.get(name)
        if slot is None or slot.users == 0 or not slot.ready.done() or slot.ready.exception() is not None:
            return None
        return slot.ready.result().path

    async def close(self) -> None:
        """Give all leases back."""
        for name, slot in list(self._slots.items()):
            self._slots.pop(name)
            with contextlib.suppress(Exception):
                (await slot.ready).close()

    async def _admit(self, name: str) -> _Slot:
        if found := self._join(name):
            return found
        try:
            async with asyncio.timeout(self._patience), self._turn:
                while True:
                    if found := self._join(name):
                        return found
                    if len(self._slots) < self.capacity:
                        slot = _Slot(asyncio.create_task(self._make(name)))
                        self._slots[name] = slot
                        return slot
                    self._freed.clear()
                    if not await self._give_one_up():
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(self._freed.wait(), self._soonest())
        except TimeoutError:
            raise Busy(
                f"{self.capacity} different ratios are being answered, which is all this server holds at once; "
                "try again, or have it started with a larger --max-ratios or with --snap"
            ) from None

    def _join(self, name: str) -> _Slot | None:
        slot = self._slots.get(name)
        if slot is not None:
            if slot.ready.done() and slot.ready.exception() is None and slot.ready.result().lost:
                slot.ready.result().close()
                slot.ready = asyncio.create_task(self._make(name))
            slot.users += 1
            self._slots.move_to_end(name)
        return slot

    async def _make(self, name: str) -> Lease:
        try:
            while True:
                try:
                    return await asyncio.to_thread(self._acquire, name)
                except CacheFull:
                    # What we ourselves hold and do not need may be what is in the way.
                    if not await self._give_one_up():
                        raise
        except BaseException:
            self._slots.pop(name, None)
            self._freed.set()
            raise

    async def _give_one_up(self) -> bool:
        """Give up the least recently used policy that is not in use; whether there was one."""
        now = time.monotonic()
        for name, slot in self._slots.items():
            if slot.users == 0 and slot.rests_until <= now and slot.ready.done():
                self._slots.pop(name)
                # Shielded: it is out of the table, so it has to be seen through.
                await asyncio.shield(asyncio.create_task(self._let_go(name, slot)))
                return True
        return False

    async def _let_go(self, name: str, slot: _Slot) -> None:
        try:
            await self._retire(name)
        finally:
            slot.ready.result().close()

    def _soonest(self) -> float | None:
        """Seconds until a policy that only rests may go, None where all are in use."""
        now = time.monotonic()
        rests = [slot.rests_until - now for slot in self._slots.values() if slot.users == 0]
        return max(0.01, min(rests)) if rests else None
