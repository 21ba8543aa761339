"""Whoever cannot ask the database gives up by its own clock, no later than the database may give it to another."""

from __future__ import annotations

import asyncio

import pytest

from entitlement.errors import Unavailable
from ledger_sync.lease import IDLE_S, Held

DEADLINE_S = 10.0


class Asked(Held):
    """Answers while it is told to; the clock goes only as the test says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pings = 0
        self.answer: Exception | None = None
        self.pinged = asyncio.Event()
        self.hangs = False
        super().__init__("it", clock=lambda: self.now)

    async def ping(self) -> None:
        self.pings += 1
        self.pinged.set()
        sent = self.now
        if self.hangs:
            await asyncio.Event().wait()
        if self.answer:
            raise self.answer
        self.renew(sent)


async def test_it_holds_as_long_after_the_last_answered_question_was_sent() -> None:
    held = Asked()
    held.now += IDLE_S - 0.001
    assert held.held
    held.renew(sent=102.0)
    held.now = 102.0 + IDLE_S - 0.001
    assert held.held
    held.now += 0.001
    assert not held.held


async def test_an_answer_that_comes_late_does_not_shorten_it() -> None:
    held = Asked()
    held.renew(sent=99.0)
    held.now = 100.0 + IDLE_S - 0.001
    assert held.held


@pytest.mark.parametrize("answer", [Unavailable("away"), TimeoutError()])
async def test_a_ping_that_fails_loses_it(answer: Exception) -> None:
    held = Asked()
    held.answer = answer
    async with held.kept(), asyncio.timeout(DEADLINE_S):
        await held.lost.wait()
    assert not held.held and held.pings == 1


async def test_a_ping_that_hangs_loses_it_in_time() -> None:
    held = Asked()
    held.hangs = True
    began = asyncio.get_running_loop().time()
    async with held.kept(), asyncio.timeout(DEADLINE_S):
        await held.lost.wait()
    assert asyncio.get_running_loop().time() - began < IDLE_S + 1
    assert not held.held


async def test_a_process_that_was_stopped_has_lost_it_before_it_does_anything_else() -> None:
    held = Asked()
    async with held.kept(), asyncio.timeout(DEADLINE_S):
        await held.pinged.wait()
        assert held.held
        held.now += IDLE_S
        assert not held.held
        await held.lost.wait()
