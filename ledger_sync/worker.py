"""Keeps loops running: one that fails or hangs is started again, after a pause that grows, until all are stopped
together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from random import Random
from time import monotonic
from typing import Final, Protocol

import msgspec
import structlog

from entitlement.errors import EntitlementError
from ledger_sync.beat import Beat, Watch, cancelled
from ledger_sync.telemetry import Figures

FIRST_PAUSE_S: Final = 0.1  # before a loop that failed is started again; doubles
LONGEST_PAUSE_S: Final = 1.0
STEADY_S: Final = 10.0  # a loop that ran this long has recovered
WATCH_S: Final = 0.25  # how often is looked for a loop that hangs
FINISH_S: Final = 10.0  # how long what is in hand may take once we are asked to stop

log = structlog.get_logger(__name__)


class Loop(Protocol):
    """A long-lived part. `run` goes on until it is cancelled, cleans up, and may be called again afterwards. `beats`:
    of its parts, by name; '' is its own.
    """

    @property
    def beats(self) -> Mapping[str, Beat]: ...

    async def run(self) -> None: ...


class Health(msgspec.Struct):
    """How a loop is doing."""

    running: bool = False
    restarts: int = 0
    error: str = ""  # why it last ended
    hung: tuple[str, ...] = ()  # its parts that did not go round in time, until it is started again

    @property
    def well(self) -> bool:
        return self.running and not self.hung


class Worker:
    """Owns every loop of the process. `run` returns only by cancellation, when all of them have ended."""

    def __init__(
        self,
        loops: Mapping[str, Loop],
        *,
        figures: Figures,
        random: Random,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._loops = loops
        self._figures = figures
        self._random = random
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watches = {
            name: Watch({f"{name}.{part}" if part else name: beat for part, beat in loop.beats.items()})
            for name, loop in loops.items()
        }
        self.health = {name: Health() for name in loops}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name, loop in self._loops.items():
                group.create_task(self._keep(name, loop), name=name)
            group.create_task(self._watch())

    async def _keep(self, name: str, loop: Loop) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            began = self._clock()
            error = await self._run_once(name, loop)
            if cancelled():
                raise asyncio.CancelledError
            if self._clock() - began >= STEADY_S:
                pause_s = FIRST_PAUSE_S
            wait_s = pause_s * (0.5 + self._random.random())
            log.warning("loop_ended", loop=name, error=error, restart_s=round(wait_s, 2))
            await asyncio.sleep(wait_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _run_once(self, name: str, loop: Loop) -> str:
        """Why the loop ended. The one place where any error may end up: it is counted, shown and survived."""
        health = self.health[name]
        health.running, health.hung = True, ()
        self._watches[name].forgive()
        self._tell(name)
        try:
            # In a task of its own: a TaskGroup that failed leaves its task marked as cancelled on Python 3.11.
            self._tasks[name] = task = asyncio.create_task(loop.run())
            await task
            error = "it returned"
        except asyncio.CancelledError:
            if cancelled():
                raise
            error = "it was cancelled"  # By the watch.
        except Exception as failure:
            error = describe(failure)
            if not _expected(failure):
                log.error("loop_failed", loop=name, exc_info=failure)
        finally:
            health.running = False
            self._tell(name)
        if health.hung:
            error = f"{', '.join(health.hung)} hung: {error}"
        health.restarts += 1
        health.error = error
        self._figures.restarts.labels(name).inc()
        return error

    async def _watch(self) -> None:
        then = self._clock()
        while True:
            await asyncio.sleep(WATCH_S)
            then, elapsed_s = (now := self._clock()), now - then
            for name, watch in self._watches.items():
                if hung := watch.look(elapsed_s):
                    self._end(name, hung)
                self._tell(name)

    def _end(self, name: str, hung: Sequence[str]) -> None:
        """Cancels a loop that hangs: `_keep` starts it again. One that does not end is cancelled again in time."""
        watch = self._watches[name]
        for part in hung:
            log.error("loop_hung", loop=part, silent_s=round(watch.silent_s[part], 1))
            self._figures.hangs.labels(part).inc()
        self.health[name].hung = tuple(hung)
        watch.forgive()
        self._tasks[name].cancel()

    def _tell(self, name: str) -> None:
        """How a loop and its parts are doing, in figures."""
        health = self.health[name]
        for part, silent_s in self._watches[name].silent_s.items():
            self._figures.healthy.labels(part).set(health.running and part not in health.hung)
            self._figures.silent.labels(part).set(silent_s)
        self._figures.healthy.labels(name).set(health.well)


def _expected(failure: BaseException) -> bool:
    """A store that is away, or another error of ours: its text says enough."""
    if isinstance(failure, BaseExceptionGroup):
        return all(_expected(part) for part in failure.exceptions)
    return isinstance(failure, EntitlementError)


def describe(error: BaseException) -> str:
    """One line for an error, or for the group that a TaskGroup has made of it."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(describe(part) for part in error.exceptions))
    return f"{type(error).__name__}: {error}"


async def uninterrupted(work: Coroutine[object, object, None]) -> None:
    """Finishes `work` even when cancelled meanwhile, within a deadline; then the cancellation goes on."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=FINISH_S)
        if not task.done():
            task.cancel()
        elif not task.cancelled() and (error := task.exception()):
            log.warning("last_work_failed", error=describe(error))
        raise
