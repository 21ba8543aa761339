"""Keeps loops running: one that fails is started again, after a pause that grows, until all are stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from random import Random
from time import monotonic
from typing import Final, Protocol

import msgspec
import structlog

from entitlement.errors import EntitlementError
from ledger_sync.telemetry import Figures

FIRST_PAUSE_S: Final = 0.1  # before a loop that failed is started again; doubles
LONGEST_PAUSE_S: Final = 1.0
STEADY_S: Final = 10.0  # a loop that ran this long has recovered
FINISH_S: Final = 10.0  # how long what is in hand may take once we are asked to stop

log = structlog.get_logger(__name__)


class Loop(Protocol):
    """A long-lived part. `run` goes on until it is cancelled, cleans up, and may be called again afterwards."""

    async def run(self) -> None: ...


class Health(msgspec.Struct):
    """How a loop is doing."""

    running: bool = False
    restarts: int = 0
    error: str = ""  # why it last ended


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
        self.health = {name: Health() for name in loops}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name, loop in self._loops.items():
                group.create_task(self._keep(name, loop), name=name)

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
        health.running = True
        self._figures.healthy.labels(name).set(1)
        try:
            # In a task of its own: a TaskGroup that failed leaves its task marked as cancelled on Python 3.11.
            await asyncio.create_task(loop.run())
            error = "it returned"
        except Exception as failure:
            error = describe(failure)
            if not _expected(failure):
                log.error("loop_failed", loop=name, exc_info=failure)
        finally:
            health.running = False
            self._figures.healthy.labels(name).set(0)
        health.restarts += 1
        health.error = error
        self._figures.restarts.labels(name).inc()
        return error


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


def cancelled() -> bool:
    """Whether this task shall end. On Python 3.11 asyncio.wait_for may swallow a cancellation (cpython gh-86296), and
    client libraries use it: a loop that calls them looks here.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


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
