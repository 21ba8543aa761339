"""Deadlines of the pipelined connection, to the millisecond, on a clock that is moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from gateway.store.connection import SILENCE_TIMEOUTS, Connection, Reply, pack
from tests.contract.test_connection import Wire, turn
from tests.fake_redis import bulk


class HandClock:
    """The running loop, with a time that only `advance` moves. It is what a connection uses of a loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.create_future, self.call_soon = loop.create_future, loop.call_soon
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        self.timers.append((when, act))
        return asyncio.TimerHandle(when, act, (), asyncio.get_running_loop())

    def call_later(self, delay: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, act)

    def advance(self, to: float) -> None:
        while due := [timer for timer in self.timers if timer[0] <= to]:
            when, act = min(due, key=lambda timer: timer[0])
            self.timers.remove((when, act))
            self.now = max(self.now, when)
            act()
        self.now = to


def by_hand() -> tuple[Connection, HandClock, Wire]:
    """A connection whose deadline is a second, its clock, and what it writes."""
    clock, wire = HandClock(), Wire()
    connection = Connection(cast(asyncio.AbstractEventLoop, clock), 1_000)
    connection.connection_made(wire)
    return connection, clock, wire


def overdue(call: asyncio.Future[Reply]) -> bool:
    return call.done() and not call.cancelled() and "no answer within 1000 ms" in str(call.exception())


async def test_each_turn_has_its_own_deadline() -> None:
    connection, clock, _ = by_hand()
    first = connection.call(pack("ECHO", 1))
    await turn()
    clock.advance(0.4)
    second = connection.call(pack("ECHO", 2))
    await turn()
    clock.advance(0.999)
    assert not first.done() and not second.done()
    clock.advance(1.0)
    assert overdue(first) and not second.done()
    clock.advance(1.4)
    assert overdue(second)


async def test_a_neighbour_that_goes_away_does_not_take_the_deadline_with_it() -> None:
    connection, clock, _ = by_hand()
    first = connection.call(pack("ECHO", "first"))
    await turn()
    clock.advance(0.4)
    kept, gone = connection.call(pack("ECHO", "kept")), connection.call(pack("ECHO", "gone"))
    await turn()
    gone.cancel()
    clock.advance(1.0)
    assert overdue(first) and not kept.done()
    clock.advance(1.4)
    assert overdue(kept)


async def test_a_call_that_cannot_be_written_has_a_deadline_too() -> None:
    connection, clock, _ = by_hand()
    first = connection.call(pack("ECHO", 0))
    await turn()
    connection.pause_writing()
    clock.advance(0.4)
    blocked = connection.call(pack("ECHO", 1))
    clock.advance(0.8)
    many = connection.call_many([pack("ECHO", 2), pack("ECHO", 3)])
    clock.advance(1.4)
    assert overdue(first) and overdue(blocked) and not many.done()
    clock.advance(1.8)
    assert overdue(many)  # type: ignore[arg-type]


async def test_calls_that_were_given_up_before_they_could_be_written_are_not_written() -> None:
    connection, clock, wire = by_hand()
    connection.call(pack("ECHO", "first"))
    await turn()
    connection.pause_writing()
    late = connection.call(pack("ECHO", "late"))
    clock.advance(1.1)
    assert overdue(late)
    cancelled, wanted = connection.call(pack("ECHO", "cancelled")), connection.call(pack("ECHO", "wanted"))
    cancelled.cancel()
    connection.resume_writing()
    await turn()
    assert wire.writes == [pack("ECHO", "first"), pack("ECHO", "wanted")]
    connection.data_received(bulk(b"first") + bulk(b"wanted"))
    assert await wanted == b"wanted"


async def test_a_server_that_says_nothing_for_many_deadlines_is_given_up_and_one_that_does_is_not() -> None:
    connection, clock, wire = by_hand()
    connection.call(pack("ECHO", "first"))
    await turn()
    clock.advance(SILENCE_TIMEOUTS - 0.5)
    connection.data_received(b"$5\r\nfi")  # Slow, and alive.
    clock.advance(2 * SILENCE_TIMEOUTS - 1)
    assert not wire.aborted
    clock.advance(2 * SILENCE_TIMEOUTS + 1)
    assert wire.aborted


async def test_a_rest_is_not_silence() -> None:
    connection, clock, wire = by_hand()
    connection.call(pack("ECHO", "first"))
    await turn()
    connection.data_received(bulk(b"first"))
    clock.advance(100 * SILENCE_TIMEOUTS)
    connection.call(pack("ECHO", "second"))
    await turn()
    clock.advance(100 * SILENCE_TIMEOUTS + 2)
    assert not wire.aborted
