"""The outbox on a real PostgreSQL: every committed event, in commit order, whatever the writers and the target do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from ledger_sync.ledger import Connection, Ledger
from ledger_sync.outbox import Outbox
from ledger_sync.publisher import Outgoing, PublishFailed
from ledger_sync.telemetry import Figures
from ledger_sync.worker import Worker

DEADLINE_S = 10.0


class Recorder:
    """A publisher that keeps what it accepted, and fails when told to."""

    def __init__(self) -> None:
        self.accepted: list[Outgoing] = []
        self.failures = 0  # publishes that will fail
        self.calls = 0
        self.started = 0
        self._changed = asyncio.Condition()

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.accepted]

    async def start(self) -> None:
        self.started += 1

    async def publish(self, events: Sequence[Outgoing]) -> None:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            self.accepted += events[: len(events) // 2]  # Some may have been accepted all the same.
            raise PublishFailed("recorder", "told to")
        self.accepted += events
        async with self._changed:
            self._changed.notify_all()

    async def stop(self) -> None:
        self.started -= 1

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(holds)


@pytest.fixture
async def ledger(database_dsn: str) -> AsyncIterator[Ledger]:
    opened = await Ledger.open(database_dsn)
    yield opened
    await opened.close()


def outbox_of(ledger: Ledger, publisher: Recorder, batch: int = 100, poll_s: float = 60.0) -> Outbox:
    figures = Figures(CollectorRegistry())
    return Outbox(ledger, publisher, figures=figures, random=Random(1), batch=batch, poll_s=poll_s)


async def add(connection: Connection, *event_ids: str) -> None:
    await connection.executemany(
        "INSERT INTO outbox (event_id, tenant, customer, type, body) VALUES ($1, 'acme', 'ada', 'x.v1', $2)",
        [(event_id, event_id.encode()) for event_id in event_ids],
    )


async def commit(ledger: Ledger, *event_ids: str) -> None:
    async with ledger.transaction() as connection:
        await add(connection, *event_ids)


async def left(ledger: Ledger) -> object:
    async with ledger.transaction() as connection:
        return await connection.fetchval("SELECT count(*) FROM outbox")


@asynccontextmanager
async def running(*parts: Outbox) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def test_events_leave_whole_in_order_and_once(ledger: Ledger) -> None:
    publisher = Recorder()
    outbox = outbox_of(ledger, publisher, batch=3)
    await commit(ledger, *(f"e{number}" for number in range(7)))
    assert [await outbox.publish() for _ in range(4)] == [3, 3, 1, 0]
    assert publisher.ids == [f"e{number}" for number in range(7)]
    assert publisher.accepted[0] == Outgoing(id="e0", tenant="acme", type="x.v1", customer="ada", body=b"e0")
    assert await left(ledger) == 0
    await commit(ledger, "later")
    assert await outbox_of(ledger, publisher).publish() == 1
    assert publisher.ids[-1] == "later"


class Naive:
    """What must not be done: reads by `id > last`."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._last = 0

    async def publish(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            for row in await connection.fetch("SELECT id, event_id FROM outbox WHERE id > $1 ORDER BY id", self._last):
                self._last = row["id"]
                self.ids.append(row["event_id"])


async def two_writers(ledger: Ledger, read: Callable[[], Awaitable[object]]) -> None:
    """The first writer takes the lower id and commits last. `read` runs in between and afterwards."""
    async with ledger.transaction() as held_open:
        await add(held_open, "early id, late commit")
        await commit(ledger, "late id, early commit")
        await read()
    await read()


async def test_a_reader_that_goes_by_id_misses_what_commits_late(ledger: Ledger) -> None:
    naive = Naive()
    await two_writers(ledger, lambda: naive.publish(ledger))
    assert naive.ids == ["late id, early commit"]


async def test_nothing_is_missed_when_transactions_commit_out_of_the_order_of_their_ids(ledger: Ledger) -> None:
    publisher = Recorder()
    outbox = outbox_of(ledger, publisher)
    await two_writers(ledger, outbox.publish)
    assert sorted(publisher.ids) == ["early id, late commit", "late id, early commit"]
    assert await left(ledger) == 0


async def test_many_writers_at_once_lose_and_repeat_nothing(ledger: Ledger, seed: int) -> None:
    publisher, random = Recorder(), Random(seed)

    async def writer(number: int) -> None:
        for turn in range(20):
            async with ledger.transaction() as connection:
                await add(connection, f"{number}/{turn}/a")
                for _ in range(random.randrange(4)):
                    await connection.execute("SELECT 1")
                await add(connection, f"{number}/{turn}/b")

    outbox = outbox_of(ledger, publisher, batch=7, poll_s=0.01)
    async with running(outbox):
        await asyncio.gather(*(writer(number) for number in range(6)))
        outbox.wake()
        await publisher.until(lambda: len(publisher.accepted) >= 240)
    assert len(publisher.ids) == len(set(publisher.ids)) == 240
    for number in range(6):
        mine = [event_id for event_id in publisher.ids if event_id.startswith(f"{number}/")]
        assert mine == [f"{number}/{turn}/{part}" for turn in range(20) for part in "ab"]


async def test_a_target_that_is_away_is_waited_for_and_nothing_overtakes(ledger: Ledger) -> None:
    publisher = Recorder()
    publisher.failures = 2
    await commit(ledger, "a", "b")
    async with running(outbox_of(ledger, publisher)):
        await publisher.until(lambda: publisher.failures == 0 and len(publisher.accepted) >= 4)
        await commit(ledger, "c")
    assert publisher.ids == ["a", "a", "a", "b"]


async def test_a_publisher_that_ends_before_the_mark_publishes_the_same_again(ledger: Ledger) -> None:
    publisher = Recorder()
    await commit(ledger, "a", "b")
    ended = outbox_of(ledger, publisher)
    lost = ended._ledger = Unmarked(ledger)  # type: ignore[assignment]
    with pytest.raises(ConnectionError):
        await ended.publish()
    assert lost.transactions == 2
    await outbox_of(ledger, publisher).publish()
    assert publisher.ids == ["a", "b", "a", "b"]
    assert publisher.accepted[:2] == publisher.accepted[2:]


class Swallowing(Recorder):
    """Its client library swallows a cancellation, as asyncio.wait_for may on Python 3.11."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = asyncio.Event()

    async def publish(self, events: Sequence[Outgoing]) -> None:
        self.busy.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


async def test_it_stops_even_when_a_publisher_swallows_the_cancellation(ledger: Ledger) -> None:
    publisher = Swallowing()
    await commit(ledger, "a")
    outbox = outbox_of(ledger, publisher)
    worker = Worker({"outbox": outbox}, figures=Figures(CollectorRegistry()), random=Random(1))
    task = asyncio.create_task(worker.run())
    async with asyncio.timeout(DEADLINE_S):
        await publisher.busy.wait()
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled() and publisher.started == 0


class Unmarked:
    """A ledger whose database goes away after the first transaction."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.transactions = 0

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        self.transactions += 1
        if self.transactions > 1:
            raise ConnectionError
        async with self._ledger.transaction() as connection:
            yield connection


class Stopped(Recorder):
    """Stopped in the middle of a publish, for as long as the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.busy, self.goes_on = asyncio.Event(), asyncio.Event()

    async def publish(self, events: Sequence[Outgoing]) -> None:
        self.busy.set()
        await self.goes_on.wait()
        await super().publish(events)


async def test_one_that_was_taken_for_dead_does_not_move_the_cursor_back(ledger: Ledger) -> None:
    stopped, other = Stopped(), Recorder()
    await commit(ledger, "a", "b")
    late = asyncio.create_task(outbox_of(ledger, stopped).publish())
    async with asyncio.timeout(DEADLINE_S):
        await stopped.busy.wait()
        assert await outbox_of(ledger, other).publish() == 2
        await commit(ledger, "c")
        assert await outbox_of(ledger, other).publish() == 1
        await commit(ledger, "d")
        before = await cursor(ledger)
        stopped.goes_on.set()
        await late
    assert await cursor(ledger) == before and before[1] == 3
    assert await left(ledger) == 1
    assert await outbox_of(ledger, other).publish() == 1
    assert (stopped.ids, other.ids) == (["a", "b"], ["a", "b", "c", "d"])


async def cursor(ledger: Ledger) -> tuple[str, int]:
    """Where it stands, and how many events it says have been published."""
    async with ledger.transaction() as connection:
        row = await connection.fetchrow("SELECT txid::text, published FROM outbox_cursor")
    assert row is not None
    return row[0], row[1]


async def test_it_is_woken_by_a_commit(ledger: Ledger) -> None:
    publisher = Recorder()
    outbox = outbox_of(ledger, publisher, poll_s=60)
    async with running(outbox):
        for number in range(5):
            await commit(ledger, f"e{number}")
            outbox.wake()
            await publisher.until(lambda: len(publisher.accepted) > number)  # noqa: B023
    assert len(publisher.accepted) == 5


async def test_what_others_commit_is_seen_without_a_wake(ledger: Ledger) -> None:
    publisher = Recorder()
    async with running(outbox_of(ledger, publisher, poll_s=0.05)):
        await commit(ledger, "quiet")
        await publisher.until(lambda: bool(publisher.accepted))


async def test_of_two_one_publishes_and_the_other_takes_over(ledger: Ledger) -> None:
    first, second = Recorder(), Recorder()
    await commit(ledger, "a")
    async with running(outbox_of(ledger, second, poll_s=0.05)):
        await second.until(lambda: second.ids == ["a"])
        async with running(outbox_of(ledger, first, poll_s=0.05)):
            await commit(ledger, "b")
            await second.until(lambda: second.ids == ["a", "b"])
    assert first.calls == 0
    await commit(ledger, "c")
    async with running(outbox_of(ledger, first, poll_s=0.05)):
        await first.until(lambda: bool(first.ids))
    assert first.ids == ["c"]
    assert (first.started, second.started) == (0, 0)
