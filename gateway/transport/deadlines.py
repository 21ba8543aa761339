"""Deadlines of many calls on one coarse clock: no timer a call, and nothing to undo when a call ends in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICK_S = 0.005  # a deadline is honoured at most this much late


class Deadlines:
    """Runs callbacks at their time, to within a tick. A callback runs even if what it watched has ended: it looks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = loop.time
        self._loop = loop
        self._due: dict[int, list[Callable[[], None]]] = {}
        self._ticking: asyncio.TimerHandle | None = None
        self._next = 0

    def at(self, when: float, callback: Callable[[], None]) -> None:
        """Runs the callback at `when`, in the loop's time."""
        tick = int(when / TICK_S) + 1
        waiting = self._due.get(tick)
        if waiting is not None:
            waiting.append(callback)
            return
        self._due[tick] = [callback]
        if self._ticking is None or tick < self._next:
            self._arm(tick)

    def _arm(self, tick: int) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        self._next = tick
        self._ticking = self._loop.call_at(tick * TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = None
        now = int(self._loop.time() / TICK_S)
        for tick in sorted(tick for tick in self._due if tick <= now):
            for callback in self._due.pop(tick):
                callback()
        if self._due and self._ticking is None:
            self._arm(min(self._due))
