"""What is due when, for many calls on one coarse clock: no timer a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

TICK_S = 0.005  # what is due is done at most this much late

Item = TypeVar("Item")


class Deadlines(Generic[Item]):
    """Gives each item to `act` at its time, to within a tick and never early, unless it was forgotten before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, act: Callable[[Item], None]) -> None:
        self.now = loop.time
        self._loop = loop
        self._act = act
        self._due: dict[int, set[Item]] = {}
        self._ticking: asyncio.TimerHandle | None = None
        self._next = 0

    def at(self, when: float, item: Item) -> int:
        """Remembers the item until `when`, in the loop's time. Answers the tick, by which it can be forgotten."""
        tick = int(when / TICK_S) + 1
        waiting = self._due.get(tick)
        if waiting is not None:
            waiting.add(item)
            return tick
        self._due[tick] = {item}
        if self._ticking is None or tick < self._next:
            self._arm(tick)
        return tick

    def forget(self, tick: int, item: Item) -> None:
        """The item is of no interest any more. One that was acted on, or forgotten, is fine too."""
        waiting = self._due.get(tick)
        if waiting is not None:
            waiting.discard(item)
            if not waiting:
                del self._due[tick]

    def __len__(self) -> int:
        """How many items are remembered."""
        return sum(map(len, self._due.values()))

    def _arm(self, tick: int) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        self._next = tick
        self._ticking = self._loop.call_at(tick * TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = None
        now = self._loop.time()
        for tick in sorted(tick for tick in self._due if tick * TICK_S <= now):  # Not now / TICK_S: it may be less.
            for item in self._due.pop(tick, ()):
                self._act(item)
        if self._due and (self._ticking is None or min(self._due) < self._next):  # What was acted on may have armed it.
            self._arm(min(self._due))
