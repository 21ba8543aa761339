"""Loops are started again when they fail, alone, and stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from entitlement.errors import Unavailable
from ledger_sync.telemetry import Figures
from ledger_sync.worker import Loop, Worker, describe, uninterrupted

DEADLINE_S = 10.0


class Scripted:
    """Fails as told, then runs until it is cancelled."""

    def __init__(self, *failures: Exception | None) -> None:
        self._failures = list(failures)
        self.steady = asyncio.Event()
        self.ran = asyncio.Event()
        self.runs = 0
        self.stopped = 0

    async def run(self) -> None:
        self.runs += 1
        self.ran.set()
        if self._failures:
            failure = self._failures.pop(0)
            if failure:
                raise failure
            return
        self.steady.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped += 1


@asynccontextmanager
async def running(**loops: Loop) -> AsyncIterator[Worker]:
    worker = Worker(loops, figures=Figures(CollectorRegistry()), random=Random(1))
    task = asyncio.create_task(worker.run())
    yield worker
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_a_loop_that_fails_or_returns_is_started_again() -> None:
    loop = Scripted(Unavailable("away"), None, ValueError("a fault"))
    async with running(it=loop) as worker, asyncio.timeout(DEADLINE_S):
        await loop.steady.wait()
        health = worker.health["it"]
        assert (loop.runs, health.running, health.restarts, health.error) == (4, True, 3, "ValueError: a fault")
    assert loop.stopped == 1


class Grouped(Scripted):
    """Fails in a child task of its own."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(super().run())
            group.create_task(asyncio.Event().wait())


async def test_a_loop_that_fails_in_a_task_of_its_own_is_started_again() -> None:
    loop = Grouped(*[Unavailable("away")] * 3)
    async with running(it=loop) as worker, asyncio.timeout(DEADLINE_S):
        await loop.steady.wait()
        assert worker.health["it"].running and worker.health["it"].restarts == 3
    assert loop.stopped == 1


async def test_a_loop_that_fails_leaves_the_others_alone() -> None:
    bad, good = Scripted(*[Unavailable("away")] * 2), Scripted()
    async with running(bad=bad, good=good), asyncio.timeout(DEADLINE_S):
        await bad.steady.wait()
        assert good.runs == 1
    assert (bad.stopped, good.stopped) == (1, 1)


async def test_health_shows_a_loop_that_is_down() -> None:
    loop = Scripted(*[Unavailable("away")] * 50)
    async with running(it=loop) as worker, asyncio.timeout(DEADLINE_S):
        await loop.ran.wait()
        for _ in range(10):  # Turns of the event loop, until its end has been seen.
            await asyncio.sleep(0)
        assert not worker.health["it"].running
        assert worker.health["it"].error == "Unavailable: away"


async def test_work_in_hand_is_finished_before_a_cancellation_goes_on() -> None:
    begun, may_end, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await may_end.wait()
        ended.set()

    task = asyncio.create_task(uninterrupted(work()))
    async with asyncio.timeout(DEADLINE_S):
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        with suppress(asyncio.CancelledError):
            await task
    assert ended.is_set() and task.cancelled()


async def test_work_that_fails_says_so() -> None:
    async def work() -> None:
        raise Unavailable("away")

    with pytest.raises(Unavailable):
        await uninterrupted(work())


def test_a_group_of_errors_is_one_line() -> None:
    group = ExceptionGroup("two", [Unavailable("away"), ExceptionGroup("one", [Unavailable("away"), ValueError("x")])])
    assert describe(group) == "Unavailable: away; Unavailable: away; ValueError: x"
