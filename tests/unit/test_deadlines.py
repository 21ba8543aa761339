"""Deadlines on a coarse clock: in time to within a tick, never early, nothing kept of what was forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from gateway.transport.deadlines import TICK_S, Deadlines

EARLY = 1e-9  # of a floating-point second


class Handle:
    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when, self.callback, self.cancelled = when, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """An event loop's clock and timers, moved by hand. Like the real one it may wake up a little late."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.handles: list[Handle] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object]) -> Handle:
        handle = Handle(when, callback)
        self.handles.append(handle)
        return handle

    def armed(self) -> list[Handle]:
        return [handle for handle in self.handles if not handle.cancelled]

    def advance(self, to: float, late: float = 0.0) -> None:
        """Runs every timer up to `to` at its time, each `late`."""
        while due := sorted((h for h in self.armed() if h.when <= to), key=lambda handle: handle.when):
            self.handles.remove(due[0])
            self.now = max(self.now, due[0].when + late)
            due[0].callback()
        self.now = max(self.now, to)


class Bell:
    """Remembers what rang, and when."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.rung: list[tuple[str, float]] = []
        self.deadlines: Deadlines[str] = Deadlines(loop, self.ring)  # type: ignore[arg-type]

    def ring(self, item: str) -> None:
        self.rung.append((item, self.loop.now))


@given(st.lists(st.floats(0, 20), max_size=30), st.floats(0, 0.02))
def test_everything_is_in_time_and_never_early(offsets: list[float], late: float) -> None:
    bell = Bell(Loop())
    start = bell.loop.now
    asked = {f"{index}": start + offset for index, offset in enumerate(offsets)}
    for item, when in asked.items():
        bell.deadlines.at(when, item)
    bell.loop.advance(start + 21, late)
    assert sorted(item for item, _ in bell.rung) == sorted(asked)
    for item, at in bell.rung:
        assert asked[item] - EARLY <= at <= asked[item] + TICK_S + late + 1e-6
    assert len(bell.deadlines) == 0
    assert not bell.loop.armed()


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=30))
def test_what_is_forgotten_never_rings_and_leaves_nothing(asked: list[tuple[float, bool]]) -> None:
    bell = Bell(Loop())
    ticks = {f"{index}": bell.deadlines.at(1000 + offset, f"{index}") for index, (offset, _) in enumerate(asked)}
    forgotten = {f"{index}" for index, (_, forget) in enumerate(asked) if forget}
    for item in forgotten:
        bell.deadlines.forget(ticks[item], item)
        bell.deadlines.forget(ticks[item], item)
    assert len(bell.deadlines) == len(asked) - len(forgotten)
    bell.loop.advance(1021)
    assert {item for item, _ in bell.rung} == ticks.keys() - forgotten
    assert len(bell.deadlines) == 0


def test_calls_that_end_in_time_are_not_remembered() -> None:
    bell = Bell(Loop())
    for number in range(10_000):
        bell.loop.now += 0.0001
        tick = bell.deadlines.at(bell.loop.now + 60, f"{number}")
        bell.deadlines.forget(tick, f"{number}")
    assert len(bell.deadlines) == 0
    assert not bell.deadlines._due  # Not even the empty places.
    assert len(bell.loop.armed()) <= 1


def test_one_timer_however_many_wait() -> None:
    bell = Bell(Loop())
    for number in range(1000):
        bell.deadlines.at(1000 + number % 7, f"{number}")
    assert len(bell.loop.armed()) == 1


def test_a_nearer_one_moves_the_timer() -> None:
    bell = Bell(Loop())
    bell.deadlines.at(1010, "far")
    bell.deadlines.at(1001, "near")
    bell.loop.advance(1002)
    assert [item for item, _ in bell.rung] == ["near"]
    bell.loop.advance(1011)
    assert [item for item, _ in bell.rung] == ["near", "far"]


def test_what_rings_may_ask_again_and_forget_others() -> None:
    loop = Loop()
    rung: list[str] = []
    ticks: dict[str, int] = {}

    def ring(item: str) -> None:
        rung.append(item)
        if item == "first":
            deadlines.forget(ticks["second"], "second")
            ticks["third"] = deadlines.at(loop.now + 1, "third")
        elif item == "third" and rung.count("third") == 1:
            deadlines.at(loop.now, "third")  # Now means the next tick, not this one for ever.

    deadlines: Deadlines[str] = Deadlines(loop, ring)  # type: ignore[arg-type]
    ticks["first"] = deadlines.at(1001, "first")
    ticks["second"] = deadlines.at(1002, "second")
    loop.advance(1010)
    assert rung == ["first", "third", "third"]
    assert len(deadlines) == 0


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 20)), max_size=20))
def test_asking_again_for_later_makes_nothing_else_late(asked: list[tuple[float, float]]) -> None:
    loop = Loop()
    due = {f"{index}": loop.now + first for index, (first, _) in enumerate(asked)}
    rung: list[str] = []

    def ring(item: str) -> None:
        rung.append(item)
        assert due[item] - EARLY <= loop.now <= due[item] + TICK_S + 1e-6
        if rung.count(item) == 1:
            due[item] = loop.now + asked[int(item)][1]
            deadlines.at(due[item], item)

    deadlines: Deadlines[str] = Deadlines(loop, ring)  # type: ignore[arg-type]
    for item, when in list(due.items()):
        deadlines.at(when, item)
    loop.advance(1030)
    assert sorted(rung) == sorted([*due, *due])


def test_a_deadline_that_has_passed_rings_at_once() -> None:
    bell = Bell(Loop())
    bell.deadlines.at(900, "past")
    bell.loop.advance(1000)
    assert [item for item, _ in bell.rung] == ["past"]


def test_ten_thousand_years_are_no_problem() -> None:
    bell = Bell(Loop())
    tick = bell.deadlines.at(1000 + 99_999_999 * 3600.0, "far")
    assert bell.loop.armed()[0].when > 1e11
    bell.deadlines.forget(tick, "far")
    assert len(bell.deadlines) == 0


async def test_on_a_real_loop() -> None:
    loop = asyncio.get_running_loop()
    rung = asyncio.Event()
    at: list[float] = []

    def ring(item: str) -> None:
        at.append(loop.time())
        rung.set()

    deadlines: Deadlines[str] = Deadlines(loop, ring)
    when = loop.time() + 0.02
    deadlines.at(when, "soon")
    async with asyncio.timeout(5):
        await rung.wait()
    assert at[0] >= when
