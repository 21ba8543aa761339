"""Loops are started again when they fail, alone, and stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from random import Random
from time import monotonic

import pytest
from prometheus_client import CollectorRegistry

from entitlement.errors import Unavailable
from ledger_sync.beat import Beat
from ledger_sync.telemetry import Figures
from ledger_sync.worker import Loop, Worker, describe, uninterrupted

DEADLINE_S = 10.0


class Scripted:
    """Fails as told, then runs until it is cancelled."""

    def __init__(self, *failures: Exception | None) -> None:
        self._failures = list(failures)
        self.beats: dict[str, Beat] = {}
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
async def running(
    clock: Callable[[], float] = monotonic, registry: CollectorRegistry | None = None, **loops: Loop
) -> AsyncIterator[Worker]:
    figures = Figures(registry or CollectorRegistry())
    worker = Worker(loops, figures=figures, random=Random(1), clock=clock)
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


class Hanging(Scripted):
    """Goes round, but for the first time that it runs: then one of its parts hangs."""

    def __init__(self, part: str = "") -> None:
        super().__init__()
        self.part = part
        self.beats = {"": Beat(3.0), "part": Beat(3.0)}
        self.swallows = 0  # cancellations

    async def run(self) -> None:
        self.runs += 1
        with self.beats[""], self.beats["part"]:
            while True:
                for name, beat in self.beats.items():
                    if self.runs > 1 or name != self.part:
                        beat()
                if self.runs > 1:
                    self.steady.set()
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    self.swallows -= 1
                    if self.swallows < 0:
                        raise
                    task = asyncio.current_task()
                    assert task is not None
                    task.uncancel()  # Else its next beat would notice.


@pytest.mark.parametrize(("part", "label"), [("", "it"), ("part", "it.part")])
async def test_a_loop_that_hangs_is_started_again_and_counted(part: str, label: str) -> None:
    loop, good, registry = Hanging(part), Scripted(), CollectorRegistry()

    def figure(name: str, loop: str) -> float | None:
        return registry.get_sample_value(f"entitlement_sync_loop_{name}", {"loop": loop})

    seconds = count()  # The clock goes on by a second with each look.
    async with (
        asyncio.timeout(DEADLINE_S),
        running(clock=lambda: next(seconds), registry=registry, it=loop, good=good) as worker,
    ):
        await loop.steady.wait()
        health = worker.health["it"]
        assert (loop.runs, health.running, health.restarts, health.hung) == (2, True, 1, ())
        assert health.error == f"{label} hung: it was cancelled"
        assert (figure("hangs_total", label), figure("restarts_total", "it")) == (1, 1)
        assert figure("healthy", label) == figure("healthy", "it") == figure("healthy", "good") == 1
        assert good.runs == 1


async def test_health_names_the_part_that_hangs_until_it_has_ended() -> None:
    loop = Hanging("part")
    loop.swallows = 10**6  # As asyncio.wait_for may do on Python 3.11: it is cancelled again.
    seconds, registry = count(), CollectorRegistry()
    async with (
        asyncio.timeout(DEADLINE_S),
        running(clock=lambda: next(seconds), registry=registry, it=loop) as worker,
    ):
        health = worker.health["it"]
        while not health.hung:  # noqa: ASYNC110  It is not told otherwise.
            await asyncio.sleep(0.01)
        assert (health.hung, health.running, health.well) == (("it.part",), True, False)
        healthy = [
            registry.get_sample_value("entitlement_sync_loop_healthy", {"loop": name}) for name in ("it", "it.part")
        ]
        assert healthy == [0, 0]
        loop.swallows = 0
        await loop.steady.wait()
        assert health.well


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
