"""From a real consume.lua on Valkey to a real ledger on PostgreSQL: every record once, whatever happens on the way."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from entitlement import journal, keys
from entitlement.account import Account, Config, HotGrant
from entitlement.decision import Charge, Decision, Limits, Mode, Price, parse_outcome
from entitlement.journal import Record
from entitlement.periods import DAY
from entitlement.request import parse_consume
from entitlement.v1.gateway_pb2 import CheckAndConsumeRequest
from ledger_sync.drain import Drain
from ledger_sync.hot_store import HotStore
from ledger_sync.journal_reader import JournalReader
from ledger_sync.ledger import Lease, Ledger, Row
from ledger_sync.posting import Posted
from ledger_sync.settlement import Outcome
from ledger_sync.telemetry import Figures
from ledger_sync.worker import Worker
from tests.conftest import start_or_skip
from tests.journal_records import GRANT, TENANT, adjusted, consumed, open_account
from tests.servers import PostgresProcess, ValkeyProcess

PARTITIONS = 4
DEADLINE_S = 30.0
CUSTOMERS = ("ada", "bob", "cyd", "dan", "eve")
CHARGE = {"t": Price("t", "U 7 2"), "free": Price("free", "U 0 1")}


class Pipe:
    """Both servers, accounts in them, and what drains the one into the other."""

    def __init__(self, valkey_url: str, ledger: Ledger) -> None:
        self.url = valkey_url
        self.ledger = ledger
        self.redis: Redis = Redis.from_url(valkey_url)
        self.hot = HotStore.connect(valkey_url, PARTITIONS)
        self.outcomes: list[Outcome] = []
        self._committed = asyncio.Condition()
        self._waiters: set[asyncio.Task[None]] = set()

    async def open(self, customers: Sequence[str] = CUSTOMERS) -> None:
        """Accounts in the ledger and, as of epoch 1, in the hot store."""
        now_ms = await self.hot.now_ms()
        accounts = []
        async with self.ledger.transaction() as connection:
            for customer in customers:
                first, second = await open_account(connection, customer)
                grants = [HotGrant(first, GRANT), HotGrant(second, GRANT)]
                config = Config(plan="llm", credit_type="USD", gate_percent=150)
                account = Account(config, 1, 0, 1, 0, 0, allowance=2 * GRANT, grants=grants)
                accounts.append(((TENANT, customer), account))
        await self.hot.install(accounts, now_ms + DAY)

    async def consume(self, key: str, customer: str, *usage: tuple[str, int]) -> Decision:
        message = CheckAndConsumeRequest(idempotency_key=key, customer=customer, mode=Mode.BEST_EFFORT)  # type: ignore[arg-type]
        for feature, quantity in usage:
            message.usage.add(feature=feature, quantity=quantity)
        request = parse_consume(TENANT, message)
        charge = Charge("llm", 3, 0, 0, tuple(CHARGE[feature] for feature, _ in usage))
        (reply,) = await self.hot.consume([(request, charge)], Limits())
        decision = parse_outcome(reply, request)
        assert isinstance(decision, Decision), decision
        return decision

    async def traffic(self, count: int, random: Random, prefix: str = "k") -> int:
        """Random consumption of all customers. Returns how many were granted."""
        granted = 0
        for number in range(count):
            usage = [(random.choice(("t", "t", "free")), random.randrange(1, 900)) for _ in range(random.randint(1, 3))]
            decision = await self.consume(f"{prefix}{number}", random.choice(CUSTOMERS), *usage)
            granted += bool(decision.charged)
        return granted

    async def write(self, *records: Record | bytes, partition: int = 0) -> None:
        """Puts records into a journal as they are."""
        for record in records:
            data = record if isinstance(record, bytes) else journal.encode(record)
            await self.redis.xadd(keys.journal(partition), {journal.FIELD: data})

    def reader(self, consumer: str = "one", partitions: Iterable[int] = range(PARTITIONS)) -> JournalReader:
        return JournalReader.connect(self.url, tuple(partitions), consumer)

    def drain(self, *readers: JournalReader, batch: int = 500) -> Drain:
        lanes = readers or (self.reader(partitions=(0, 2)), self.reader(partitions=(1, 3)))
        figures = Figures(CollectorRegistry())
        return Drain(self.ledger, lanes, figures=figures, on_commit=self._note, batch=batch, linger_ms=1)

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        task = asyncio.create_task(self._tell())
        self._waiters.add(task)
        task.add_done_callback(self._waiters.discard)

    async def _tell(self) -> None:
        async with self._committed:
            self._committed.notify_all()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S), self._committed:
            await self._committed.wait_for(holds)

    @property
    def booked(self) -> int:
        return sum(outcome.booked for outcome in self.outcomes)

    async def settle(self, drain: Drain) -> None:
        """Returns when the ledger has all that is in the journal now."""
        async with asyncio.timeout(DEADLINE_S):
            for partition, last in (await self.hot.last_ids(range(PARTITIONS))).items():
                await drain.settled(partition, last)

    async def rows(self, query: str, *arguments: object) -> list[Row]:
        async with self.ledger.transaction(readonly=True) as connection:
            return await connection.fetch(query, *arguments)

    async def value(self, query: str, *arguments: object) -> object:
        return (await self.rows(query, *arguments))[0][0]

    async def agree(self) -> None:
        """Hot store and ledger agree to the nano, and the ledger with itself."""
        for customer in CUSTOMERS:
            (hot,) = await self.hot.snapshots([(TENANT, customer)])
            assert hot is not None
            (account,) = await self.rows("SELECT * FROM accounts WHERE customer = $1", customer)
            assert (account["epoch"], account["sequence"], account["gaps"]) == (hot.epoch, hot.sequence, 0)
            assert (account["overage"], account["allowance"]) == (hot.overage, hot.allowance)
            assert account["crossed"] == (",".join(map(str, hot.crossed)) or "-")
            grants = await self.rows(
                "SELECT no, remaining FROM grants JOIN grant_balances ON no = grant_no WHERE customer = $1 ORDER BY 1",
                customer,
            )
            live = {grant.no: grant.remaining for grant in hot.grants}
            assert {row[0]: row[1] for row in grants} == {row[0]: live.get(row[0], 0) for row in grants}
            settled = await self.rows("SELECT settled FROM account_periods WHERE customer = $1", customer)
            assert sum(row[0] for row in settled) == hot.settled
            units = await self.rows("SELECT meter, quantity FROM meters WHERE customer = $1", customer)
            assert {row[0]: row[1] for row in units} == hot.meters
        assert await self.value("SELECT sum(amount) FROM entries") in (0, None)
        burned = "SELECT coalesce(sum(-amount), 0) FROM entries WHERE grant_no IS NOT NULL OR account LIKE 'overage:%'"
        assert await self.value(burned) == await self.value("SELECT coalesce(sum(amount), 0) FROM usage_events")


@asynccontextmanager
async def running(*drains: Drain) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(drain.run()) for drain in drains]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def piped(valkey_url: str, dsn: str) -> AsyncIterator[Pipe]:
    ledger = await Ledger.open(dsn)
    pipe = Pipe(valkey_url, ledger)
    try:
        yield pipe
    finally:
        await pipe.hot.close()
        await pipe.redis.aclose()
        await ledger.close()


@pytest.fixture
async def pipe(valkey_url: str, database_dsn: str) -> AsyncIterator[Pipe]:
    async with piped(valkey_url, database_dsn) as made:
        await made.open()
        yield made


async def test_every_decision_is_in_the_ledger_to_the_nano(pipe: Pipe, seed: int) -> None:
    drain = pipe.drain()
    async with running(drain):
        granted = await pipe.traffic(600, Random(seed))
        await pipe.settle(drain)
        assert await pipe.value("SELECT count(*) FROM usage_events") == granted == pipe.booked
        await pipe.agree()
        assert (await drain.lag()).records == 0


async def test_what_is_settled_is_acknowledged_and_trimmed(pipe: Pipe, seed: int) -> None:
    drain = pipe.drain()
    async with running(drain):
        await pipe.traffic(1_500, Random(seed))
        await pipe.settle(drain)
    for partition in range(PARTITIONS):
        stream = keys.journal(partition)
        assert (await pipe.redis.xpending(stream, keys.GROUP))["pending"] == 0
        assert await pipe.redis.xlen(stream) <= 200  # A block or two: trimming goes by whole blocks.


async def test_settled_waits_for_the_commit(pipe: Pipe) -> None:
    drain = pipe.drain()
    await pipe.consume("a", "ada", ("t", 10))
    partition = pipe.hot.partition((TENANT, "ada"))
    last = (await pipe.hot.last_ids([partition]))[partition]
    waiting = asyncio.create_task(drain.settled(partition, last))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.4)
    async with running(drain), asyncio.timeout(DEADLINE_S):
        await waiting
        assert await pipe.value("SELECT count(*) FROM usage_events") == 1


async def test_what_another_member_had_read_and_not_settled_is_taken_over(pipe: Pipe, seed: int) -> None:
    granted = await pipe.traffic(60, Random(seed))
    dead = pipe.reader("dead")
    await dead.join()
    entries, _ = await dead.new(1_000)
    assert entries
    await dead.close()
    drain = pipe.drain()
    async with running(drain):
        await pipe.settle(drain)
    assert pipe.booked == granted
    await pipe.agree()


class Forgetful(JournalReader):
    """Dies between the commit and the acknowledgement, the first time."""

    died = False

    async def acknowledge(self, settled: object, opening: int = 0, *, all_read: bool = False) -> None:
        if not self.died:
            self.died = True
            raise ConnectionError("killed after the commit")
        await super().acknowledge(settled, opening, all_read=all_read)  # type: ignore[arg-type]


async def test_what_was_committed_and_not_acknowledged_is_recognised(pipe: Pipe, seed: int) -> None:
    granted = await pipe.traffic(60, Random(seed))
    reader = Forgetful.connect(pipe.url, range(PARTITIONS), "one")
    with pytest.raises(ExceptionGroup):
        await pipe.drain(reader).run()
    assert reader.died and pipe.booked > 0
    drain = pipe.drain(reader)
    async with running(drain):
        await pipe.settle(drain)
    assert pipe.booked == granted
    assert sum(outcome.repeated for outcome in pipe.outcomes) > 0
    await pipe.agree()


async def test_bad_records_are_quarantined_once_each_and_the_rest_is_booked(pipe: Pipe) -> None:
    await pipe.write(b"", b"\xff\xfe", b"1 C not this codec", journal.encode(consumed("t", 1))[:40], partition=1)
    await pipe.redis.xadd(keys.journal(1), {"other": b"field", "second": b"x"})
    await pipe.write(consumed("x", 1, customer="nobody"), consumed("y", 1, payload=b"\xff"), partition=1)
    await pipe.consume("good", "ada", ("t", 10))
    drain = pipe.drain()
    async with running(drain):
        await pipe.settle(drain)
        assert pipe.booked == 1
    async with running(drain):  # Once more: nothing comes again.
        await pipe.settle(drain)
    kept = [row["reason"].partition(":")[0] for row in await pipe.rows("SELECT reason FROM quarantine ORDER BY id")]
    assert sorted(kept) == ["bad_request", *["undecodable"] * 5, "unknown_account"]
    assert (await drain.lag()).records == 0


class Counting(Ledger):
    """Counts the batches that were posted."""

    posts = 0

    async def post(self, batch: Sequence[Posted], refused: str = "", opening: int | None = None) -> Outcome:
        self.posts += 1
        return await super().post(batch, refused, opening)


async def test_one_poisonous_record_in_a_batch_of_500_costs_only_itself(
    valkey_url: str, database_dsn: str, seed: int
) -> None:
    ledger = await Counting.open(database_dsn)
    pipe = Pipe(valkey_url, ledger)
    async with ledger.transaction() as connection:
        await open_account(connection)
    poisoned = Random(seed).randint(1, 500)
    huge = ("t", 1, 2**63 - 1, {1: 2**63 - 1})
    await pipe.write(
        *[consumed(f"k{n}", n, huge if n == poisoned else ("t", 1, 5, {1: 5})) for n in range(1, 501)],
        *[consumed("after", 501, ("t", 1, 2**62, {2: 2**62}))],
    )
    async with ledger.transaction() as connection:  # The huge one leaves int64 in the period's total.
        await connection.execute("INSERT INTO account_periods VALUES ($1, 'ada', 1767225600000, 1)", TENANT)
    drain = pipe.drain(pipe.reader(), batch=1_000)
    async with running(drain):
        await pipe.settle(drain)
    assert pipe.booked == 500
    assert await pipe.value("SELECT reason FROM quarantine") != ""
    assert await pipe.value("SELECT count(*) FROM quarantine") == 1
    assert await pipe.value("SELECT gaps FROM accounts") == 0
    assert ledger.posts <= 2 + 2 * math.ceil(math.log2(500))
    await pipe.hot.close()
    await pipe.redis.aclose()
    await ledger.close()


async def test_a_hot_store_that_was_emptied_is_read_again(pipe: Pipe) -> None:
    drain = pipe.drain()
    async with running(drain):
        await pipe.consume("before", "ada", ("t", 10))
        await pipe.settle(drain)
        await pipe.redis.flushall()
        await pipe.write(consumed("after", 2), partition=pipe.hot.partition((TENANT, "ada")))
        await pipe.until(lambda: pipe.booked == 2)
    assert await pipe.value("SELECT sequence FROM accounts WHERE customer = 'ada'") == 2


async def test_of_two_drains_one_works_and_the_other_takes_over(pipe: Pipe, seed: int) -> None:
    first, second = pipe.drain(pipe.reader("one")), pipe.drain(pipe.reader("two"))
    async with running(first):
        await pipe.consume("a", "ada", ("t", 10))
        await pipe.settle(first)
        async with running(second):
            granted = await pipe.traffic(100, Random(seed))
            await pipe.settle(first)
    async with running(second):
        granted += await pipe.traffic(100, Random(seed + 1), "again")
        await pipe.settle(second)
    assert pipe.booked == granted + 1
    await pipe.agree()


def four_lanes(pipe: Pipe, consumer: str) -> Drain:
    return pipe.drain(*[pipe.reader(consumer, [partition]) for partition in range(PARTITIONS)])


async def serving(drains: Sequence[Drain], *counts: int) -> list[tuple[int, ...]]:
    """The lanes of each, once they have so many."""
    async with asyncio.timeout(DEADLINE_S):
        while [len(drain.serving) for drain in drains] != list(counts):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return [drain.serving for drain in drains]


async def test_drains_share_the_lanes_and_take_over_those_of_one_that_ends(pipe: Pipe, seed: int) -> None:
    drains = [four_lanes(pipe, consumer) for consumer in ("one", "two", "three")]
    first, second, third = drains
    granted = 0
    async with running(first):
        await serving(drains, 4, 0, 0)
        async with running(second):
            split = await serving(drains, 2, 2, 0)
            assert sorted(sum(split, ())) == [0, 1, 2, 3]
            granted += await pipe.traffic(200, Random(seed), "two")
            await pipe.settle(first)  # Whoever is asked knows of all lanes.
            async with running(third):
                await serving(drains, 2, 2, 0)  # Of four lanes for three a fair share is two.
                granted += await pipe.traffic(50, Random(seed + 1), "three")
        await serving(drains, 4, 0, 0)
        granted += await pipe.traffic(100, Random(seed + 2), "one")
        await pipe.settle(first)
    assert pipe.booked == granted
    await pipe.agree()


async def test_lanes_of_a_drain_whose_sessions_die_are_taken_over(pipe: Pipe, seed: int) -> None:
    drains = first, second = four_lanes(pipe, "one"), four_lanes(pipe, "two")
    running_first = asyncio.create_task(first.run())
    await serving(drains, 4, 0)
    sessions = [row["pid"] for row in await pipe.rows(_SESSIONS)]
    assert len(sessions) == 5  # Its presence, and a lease for each lane.
    async with running(second):
        await serving(drains, 2, 2)
        granted = await pipe.traffic(100, Random(seed))
        await pipe.rows("SELECT pg_terminate_backend(pid) FROM unnest($1::integer[]) pid", sessions)
        granted += await pipe.traffic(100, Random(seed + 1), "after")
        await asyncio.wait([running_first], timeout=DEADLINE_S)
        await serving(drains, 0, 4)
        granted += await pipe.traffic(50, Random(seed + 2), "alone")
        await pipe.settle(second)
    assert running_first.done() and running_first.exception() is not None
    assert pipe.booked == granted
    await pipe.agree()


_SESSIONS = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'ledger_sync journal%'"


async def test_without_leases_two_would_be_at_work_on_one_lane(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protection off: what the tests above rely on is not there by chance."""

    @asynccontextmanager
    async def anyone(ledger: Ledger, name: str) -> AsyncIterator[Lease]:
        async with ledger._session(name, Lease) as lease, lease.kept():
            yield lease

    monkeypatch.setattr(Ledger, "try_lease", anyone)
    drains = four_lanes(pipe, "one"), four_lanes(pipe, "two")
    async with running(*drains):
        mine, others = await serving(drains, 2, 2)
        assert mine == others


async def test_a_change_of_the_ledger_is_confirmed_by_the_journal(pipe: Pipe) -> None:
    await pipe.write(adjusted(1, 2), partition=pipe.hot.partition((TENANT, "ada")))
    await pipe.drain(pipe.reader()).lag()
    async with running(pipe.drain()):
        await pipe.until(lambda: len(pipe.outcomes) > 0)
    assert await pipe.value("SELECT applied FROM accounts WHERE customer = 'ada'") == 2


async def test_a_database_that_restarts_loses_and_doubles_nothing(valkey_url: str, seed: int) -> None:
    with start_or_skip(lambda: PostgresProcess({"fsync": "off"})) as postgres:
        async with piped(valkey_url, postgres.create_database()) as pipe:
            await pipe.open()
            drain = pipe.drain(batch=20)
            async with supervised(drain):
                granted = await pipe.traffic(150, Random(seed))
                restarting = asyncio.create_task(asyncio.to_thread(postgres.restart))
                granted += await pipe.traffic(150, Random(seed + 1), "meanwhile")
                await restarting
                await pipe.settle(drain)
            assert await pipe.value("SELECT count(*) FROM usage_events") == granted
            await pipe.agree()


async def test_a_hot_store_that_is_killed_loses_and_doubles_nothing(database_dsn: str, seed: int) -> None:
    with start_or_skip(lambda: ValkeyProcess(appendonly="yes", appendfsync="always")) as valkey:
        async with piped(valkey.url, database_dsn) as pipe:
            await pipe.open()
            drain = pipe.drain(batch=20)
            async with supervised(drain):
                granted = await pipe.traffic(200, Random(seed))
                await asyncio.to_thread(valkey.restart)
                granted += await pipe.traffic(100, Random(seed + 1), "later")
                await pipe.settle(drain)
            assert await pipe.value("SELECT count(*) FROM usage_events") == granted
            await pipe.agree()


@asynccontextmanager
async def supervised(drain: Drain) -> AsyncIterator[None]:
    worker = Worker({"drain": drain}, figures=Figures(CollectorRegistry()), random=Random(1))
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Child:
    """ledger_sync as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, valkey_url: str, dsn: str, **settings: str) -> Child:
        stores = {"REDIS_URL": valkey_url, "DATABASE_URL": dsn}
        given = {"LISTEN": "127.0.0.1:0", "ANONYMOUS": "all", "TENANT": TENANT, **stores, **settings}
        env = os.environ | {f"ENTITLEMENT_SYNC_{name}": value for name, value in given.items()}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ledger_sync"),
            env=env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout
        line = await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
        assert line.startswith(b"ready admin=127.0.0.1:"), line
        return cls(process)

    async def end(self, how: signal.Signals) -> int:
        self._process.send_signal(how)
        return await asyncio.wait_for(self._process.wait(), DEADLINE_S)


async def test_a_process_that_is_killed_again_and_again_settles_everything_once(
    pipe: Pipe, valkey_url: str, database_dsn: str, seed: int
) -> None:
    settings = {"PARTITIONS": str(PARTITIONS), "BATCH": "50", "PUBLISHER": "none:"}
    random, granted = Random(seed), 0
    for turn in range(5):
        child = await Child.start(valkey_url, database_dsn, **settings)
        granted += await pipe.traffic(random.randint(20, 200), random, f"t{turn}-")
        assert await child.end(signal.SIGKILL) == -signal.SIGKILL
    child = await Child.start(valkey_url, database_dsn, **settings)
    await pipe.settle(pipe.drain())
    assert await child.end(signal.SIGTERM) == 0
    assert await pipe.value("SELECT count(*) FROM usage_events") == granted
    await pipe.agree()


async def test_what_was_delivered_to_a_read_that_was_given_up_is_found_and_settled(pipe: Pipe) -> None:
    """A connection that stalls: its read arrives late, and its entries are delivered to nobody."""
    partition = pipe.hot.partition((TENANT, "ada"))
    stream, drain = keys.journal(partition), pipe.drain()

    async def drained() -> None:
        while True:  # As a worker does.
            with suppress(ExceptionGroup):
                await asyncio.create_task(drain.run())
            await asyncio.sleep(0.01)

    task = asyncio.create_task(drained())
    try:
        await pipe.write(consumed("k1", 1, ("t", 1, 5, {1: 5})), partition=partition)
        await pipe.until(lambda: pipe.booked == 1)
        async with pipe.redis.pipeline(transaction=True) as late:  # Nobody reads in between.
            late.xadd(stream, {journal.FIELD: journal.encode(consumed("k2", 2, ("t", 1, 5, {1: 5})))})
            late.xreadgroup(keys.GROUP, "one", {stream: ">"}, count=1)
            assert (await late.execute())[1], "it was delivered"
        await pipe.write(consumed("k3", 3, ("t", 1, 5, {1: 5})), partition=partition)
        await pipe.until(lambda: pipe.booked == 3)
        await pipe.settle(drain)
        assert (await pipe.redis.xpending(stream, keys.GROUP))["pending"] == 0
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("member", ["one", "another"])
async def test_what_was_delivered_to_nobody_is_settled_though_no_record_follows(pipe: Pipe, member: str) -> None:
    """Where nothing is decided until the journal is settled, as at an opening, no record would come and show it."""
    partition = pipe.hot.partition((TENANT, "ada"))
    stream, drain = keys.journal(partition), pipe.drain()
    async with running(drain):
        await pipe.write(consumed("k1", 1, ("t", 1, 5, {1: 5})), partition=partition)
        await pipe.until(lambda: pipe.booked == 1)
        async with pipe.redis.pipeline(transaction=True) as late:
            late.xadd(stream, {journal.FIELD: journal.encode(consumed("k2", 2, ("t", 1, 5, {1: 5})))})
            late.xreadgroup(keys.GROUP, member, {stream: ">"}, count=1)
            assert (await late.execute())[1], "it was delivered"
        await pipe.settle(drain)
        assert pipe.booked == 2
        assert (await pipe.redis.xpending(stream, keys.GROUP))["pending"] == 0


async def test_a_process_that_is_told_to_stop_finishes_what_it_has_in_hand(
    pipe: Pipe, valkey_url: str, database_dsn: str, seed: int
) -> None:
    child = await Child.start(valkey_url, database_dsn, PARTITIONS=str(PARTITIONS))
    await pipe.traffic(300, Random(seed))
    async with asyncio.timeout(DEADLINE_S):
        while not await pipe.value("SELECT count(*) FROM usage_events"):  # noqa: ASYNC110  Another process books it.
            await asyncio.sleep(0.01)
    await pipe.traffic(300, Random(seed), prefix="more")
    assert await child.end(signal.SIGINT) == 0
    for partition in range(PARTITIONS):
        pending = await pipe.redis.xpending(keys.journal(partition), keys.GROUP)
        assert pending["pending"] == 0


async def test_a_drain_stops_whenever_it_is_told_to(pipe: Pipe, seed: int) -> None:
    random = Random(seed)
    for _ in range(60):
        drain = pipe.drain()
        task = asyncio.create_task(drain.run())
        for _ in range(random.randrange(120)):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=DEADLINE_S)
        assert done
