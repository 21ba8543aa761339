"""A hot store that is another one than before is opened by the ledger, once it is not behind it any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import MaxConnectionsError

from entitlement import keys
from entitlement.account import FROZEN
from entitlement.decision import Decision, Mismatch, Mode
from entitlement.errors import Unavailable
from entitlement.opening import Opening
from entitlement.periods import DAY
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2, ledger_pb2
from ledger_sync import fence, opener, remembered
from ledger_sync.control import ControlPlane
from ledger_sync.fence import Stale
from ledger_sync.posting import Arrival, Posted, read
from tests.conftest import start_or_skip
from tests.control_rig import DEADLINE_S, TENANT, USD, Rig, end, eventually, rig
from tests.servers import ValkeyProcess

INPUT, OUTPUT = "input.tokens", "output.tokens"


@asynccontextmanager
async def shop_on(url: str, dsn: str) -> AsyncIterator[Rig]:
    """A catalogue, and bob and eve with 10 USD each; the journal is read again whenever its reading has ended."""
    async with rig(url, dsn) as made:
        await supervise(made)
        await made.catalogue()
        for customer in ("bob", "eve"):
            await made.customer(customer, 10 * USD)
        await opened(made, 1)
        yield made


@pytest.fixture
async def shop(valkey_url: str, database_dsn: str) -> AsyncIterator[Rig]:
    async with shop_on(valkey_url, database_dsn) as made:
        yield made


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(valkey_url) as client:
        yield client


@pytest.fixture
def server() -> Iterator[ValkeyProcess]:
    """Its own, because it is restarted; what it has answered is on disk."""
    start = lambda: ValkeyProcess(appendonly="yes", appendfsync="always", enable_debug_command="yes")  # noqa: E731
    with start_or_skip(start) as made:
        yield made


async def supervise(made: Rig) -> None:
    await made.stop_drain()

    async def drained() -> None:
        while True:
            try:
                await made.drain.run()
            except* Unavailable:
                await asyncio.sleep(0.01)

    made._draining = asyncio.create_task(drained())


async def opened(made: Rig, number: int) -> Opening:
    """The opening, once the hot store and the ledger have it."""

    async def holds() -> bool:
        told = await told_by(made)
        (row,) = await made.rows("SELECT number, open FROM fence")
        return told is not None and told.number == number and row["open"] and row["number"] == number

    await eventually(holds)
    found = await told_by(made)
    assert found is not None
    return found


async def told_by(made: Rig) -> Opening | None:
    try:
        return await made.hot.opening()
    except Unavailable:
        return None


async def number_is(made: Rig, number: int) -> None:
    async def holds() -> bool:
        return await made.value("SELECT number FROM fence") == number

    await eventually(holds)


async def events(made: Rig, customer: str = "bob") -> int:
    found = await made.value("SELECT count(*) FROM usage_events WHERE customer = $1", customer)
    assert isinstance(found, int)
    return found


async def lived(made: Rig, customer: str) -> dict[str, object]:
    """The hot account as it lies there."""
    async with asyncio.timeout(DEADLINE_S):
        account = await made.account(customer)
    return {"epoch": account.epoch, "settled": account.settled, "grants": account.grants, "meters": account.meters}


Image = dict[bytes, bytes]


async def image(redis: Redis) -> Image:
    """All that a replica would have by now."""
    found = {key: await redis.dump(key) async for key in redis.scan_iter()}
    return {key: value for key, value in found.items() if value is not None and key != keys.OPEN.encode()}


async def become(redis: Redis, older: Image) -> None:
    """The hot store is one that had come so far."""
    async with redis.pipeline(transaction=True) as pipeline:
        pipeline.flushall()
        for key, value in older.items():
            pipeline.restore(key, 0, value)
        await pipeline.execute()


def at_opening(made: Rig, monkeypatch: pytest.MonkeyPatch, look: Callable[[], object]) -> list[object]:
    """What is found by each look just before a hot store is opened."""
    found: list[object] = []
    real = made.hot.open

    async def open_(opening: Opening) -> bool:
        found.append(await look())  # type: ignore[misc]
        return await real(opening)

    monkeypatch.setattr(made.hot, "open", open_)
    return found


class TestOpened:
    async def test_the_first_hot_store_is_opened_once(self, shop: Rig) -> None:
        told = await opened(shop, 1)
        (row,) = await shop.rows("SELECT deployment, run_id, replid FROM fence")
        server = await shop.hot.server()
        assert told == Opening(1, server.identity, row["deployment"])
        assert (row["run_id"], row["replid"]) == (server.identity.run_id, server.identity.replid)
        assert await shop.control.opener.look() is False
        assert await shop.value("SELECT number FROM fence") == 1

    async def test_it_is_the_same_one_to_another_ledger_sync(self, valkey_url: str, database_dsn: str) -> None:
        async with shop_on(valkey_url, database_dsn) as first:
            await first.consume("bob", INPUT, 1_000)
            before = await lived(first, "bob")
        async with rig(valkey_url, database_dsn) as second:
            assert await second.control.opener.look() is False
            await opened(second, 1)
            assert await lived(second, "bob") == before

    async def test_a_restart_with_its_data_is_another_opening_and_touches_no_account(
        self, server: ValkeyProcess, database_dsn: str
    ) -> None:
        async with shop_on(server.url, database_dsn) as shop:
            await shop.consume("bob", INPUT, 1_000)
            before = await lived(shop, "bob")
            await asyncio.to_thread(server.restart)
            told = await opened(shop, 2)
            assert told.identity == (await shop.hot.server()).identity
            assert await lived(shop, "bob") == before
            await shop.consume("bob", INPUT, 1_000)
            await shop.settled("bob")
            assert await events(shop) == 2

    async def test_a_line_of_replication_with_another_name_is_the_same_hot_store(
        self, server: ValkeyProcess, database_dsn: str
    ) -> None:
        """As happens when its last replica has been away for long."""
        async with shop_on(server.url, database_dsn) as shop, Redis.from_url(server.url) as redis:
            await shop.consume("bob", INPUT, 1_000)
            before, told = await lived(shop, "bob"), await opened(shop, 1)
            await redis.execute_command("DEBUG", "CHANGE-REPL-ID")  # type: ignore[no-untyped-call]
            identity = (await shop.hot.server()).identity
            assert identity.run_id == told.identity.run_id
            assert identity.replid != told.identity.replid

            async def renamed() -> bool:
                found = await shop.hot.opening()
                return found is not None and found.identity == identity

            await eventually(renamed)
            assert await opened(shop, 1) == Opening(1, identity, told.deployment)
            assert await shop.value("SELECT replid FROM fence") == identity.replid
            assert await lived(shop, "bob") == before

    async def test_a_replica_is_not_opened_and_what_it_becomes_is_another_one(
        self, server: ValkeyProcess, database_dsn: str
    ) -> None:
        async with shop_on(server.url, database_dsn) as shop, Redis.from_url(server.url) as redis:
            await redis.delete(keys.OPEN)
            await opened(shop, 2)
            await redis.execute_command("REPLICAOF", "127.0.0.1", 1)  # type: ignore[no-untyped-call]
            shop.control.opener._current = None  # As another process would see it.
            with pytest.raises(Unavailable, match="replica"):
                await shop.control.opener.look()
            assert await shop.value("SELECT number FROM fence") == 2
            await redis.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]
            told = await opened(shop, 3)  # The same process, but it has been a replica.
            assert told.identity == (await shop.hot.server()).identity

    async def test_an_opening_that_fails_begins_again_under_the_next_number(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, failed = shop.hot.open, False

        async def open_(opening: Opening) -> bool:
            nonlocal failed
            if not failed:
                failed = True
                raise Unavailable("hot store: it has gone")
            return await real(opening)

        monkeypatch.setattr(shop.hot, "open", open_)
        await redis.delete(keys.OPEN)
        await opened(shop, 3)

    async def test_what_the_journal_still_holds_is_settled_first(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await shop.stop_drain()
        for _ in range(5):
            await shop.consume("bob", INPUT, 1_000)
        found = at_opening(shop, monkeypatch, lambda: events(shop))
        await redis.delete(keys.OPEN)
        await number_is(shop, 2)
        assert await shop.hot.opening() is None
        assert (found, await events(shop)) == ([], 0)
        await supervise(shop)
        await opened(shop, 2)
        assert found == [5]


class TestEmptied:
    async def test_a_settled_key_has_its_answer_and_is_not_charged_again(self, shop: Rig, redis: Redis) -> None:
        first = [await shop.consume("bob", INPUT, 1_000 + number, key=f"k{number}") for number in range(5)]
        await shop.settled("bob")
        before = await lived(shop, "bob")
        await redis.flushall()
        await opened(shop, 2)
        for number, decision in enumerate(first):
            again = await shop.consume("bob", INPUT, 1_000 + number, key=f"k{number}")
            assert again.replayed
            assert (again.charged, again.sequence, again.rate_version, again.verdict) == (
                *(decision.charged, decision.sequence, decision.rate_version),
                decision.verdict,
            )
        after = await lived(shop, "bob")
        assert after == before | {"epoch": 2}
        next_ = await shop.consume("bob", INPUT, 1)
        assert (next_.replayed, next_.sequence) == (False, 6)
        await shop.settled("bob")
        assert await events(shop) == 6

    async def test_a_settled_key_with_another_payload_is_a_mismatch(self, shop: Rig, redis: Redis) -> None:
        await shop.consume("bob", INPUT, 1_000, key="k0")
        await shop.settled("bob")
        await redis.flushall()
        await opened(shop, 2)
        other = gateway_pb2.CheckAndConsumeRequest(idempotency_key="k0", customer="bob")
        other.usage.add(feature=INPUT, quantity=1_001)
        assert isinstance(await shop.ask(parse_consume(TENANT, other)), Mismatch)

    async def test_without_the_answers_it_would_be_charged_again(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The protection that the other tests rest on."""

        async def none(*_: object) -> list[object]:
            return []

        monkeypatch.setattr(remembered, "answers", none)
        await shop.consume("bob", INPUT, 1_000, key="k0")
        await shop.settled("bob")
        await redis.flushall()
        await opened(shop, 2)
        again = await shop.consume("bob", INPUT, 1_000, key="k0")
        assert (again.replayed, again.settled) == (False, 6_000_000)

    async def test_a_settled_key_of_a_late_event_has_its_answer_too(self, shop: Rig, redis: Redis) -> None:
        late, adjust = await shop.hot.now_ms() - 2 * DAY, Mode.ADJUST_ONLY
        first = await shop.consume("bob", INPUT, 1_000, key="late", event_ms=late, mode=adjust)
        assert [line.amount for line in first.charged] == [3_000_000]
        await shop.settled("bob")
        await redis.flushall()
        await opened(shop, 2)
        again = await shop.consume("bob", INPUT, 1_000, key="late", event_ms=late, mode=adjust)
        assert (again.replayed, again.charged) == (True, first.charged)

    async def test_what_was_not_settled_is_not_there(self, shop: Rig, redis: Redis) -> None:
        """It comes back with the gateways' receipts: here there is no gateway."""
        await shop.consume("bob", INPUT, 1_000, key="k0")
        await shop.settled("bob")
        await shop.stop_drain()
        await shop.consume("bob", INPUT, 1_000, key="k1")
        await redis.flushall()
        await supervise(shop)
        await opened(shop, 2)
        found = await lived(shop, "bob")
        assert (found["settled"], found["epoch"]) == (3_000_000, 2)
        again = await shop.consume("bob", INPUT, 1_000, key="k1")
        assert (again.replayed, again.sequence) == (False, 2)

    @pytest.mark.parametrize("together", [1_000, 100])
    async def test_many_accounts_come_back_before_anybody_asks(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch, together: int
    ) -> None:
        monkeypatch.setattr(opener, "REFILL", together)
        names = await self._many(shop, redis)
        await shop.consume("c7", INPUT, 1_000)
        await shop.settled("c7")
        await redis.flushall()
        assert len(await live(redis)) < 100
        await opened(shop, 2)
        await eventually(partial(all_live, redis, len(names)))
        accounts = await shop.hot.snapshots(names)
        assert [account.epoch >= 2 for account in accounts if account] == [True] * 500
        spent = {names[at][1]: account.settled for at, account in enumerate(accounts) if account and account.settled}
        assert spent == {"c7": 3_000_000}

    async def test_and_the_hot_store_is_not_asked_on_more_connections_than_there_are(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names, refused = await self._many(shop, redis), 0
        real = ConnectionPool.get_available_connection

        def get_available_connection(pool: ConnectionPool) -> object:
            nonlocal refused
            try:
                return real(pool)
            except MaxConnectionsError:
                refused += 1
                raise

        monkeypatch.setattr(ConnectionPool, "get_available_connection", get_available_connection)
        await redis.flushall()
        await opened(shop, 2)
        await eventually(partial(all_live, redis, len(names)))
        assert refused == 0

    async def _many(self, shop: Rig, redis: Redis) -> list[tuple[str, str]]:
        """500 customers besides bob and eve, all of them hot."""
        names = [(TENANT, f"c{number}") for number in range(500)]
        for first in range(0, 500, 50):
            await asyncio.gather(*[shop.customer(customer, USD) for _, customer in names[first : first + 50]])
        await shop.hot.ask(names)
        await eventually(partial(all_live, redis, len(names)))
        return names


async def live(redis: Redis) -> list[bytes]:
    return [key async for key in redis.scan_iter("a:*", count=1_000) if b":c" in key]


async def all_live(redis: Redis, count: int) -> bool:
    return len(await live(redis)) == count


class TestBehind:
    async def test_an_account_that_is_behind_is_frozen_and_built_anew_and_no_other(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await shop.consume("bob", INPUT, 1_000, key="k0")
        await shop.consume("eve", INPUT, 1_000, key="e0")
        await shop.settled("bob")
        await shop.settled("eve")
        older = await image(redis)
        first = await shop.consume("bob", OUTPUT, 2_000, key="k1")
        await shop.settled("bob")
        bob, eve = await lived(shop, "bob"), await lived(shop, "eve")
        names = [keys.account(shop.hot.partition((TENANT, customer)), TENANT, customer) for customer in ("bob", "eve")]

        async def configs() -> list[bytes | None]:
            return [await redis.hget(name, "c") for name in names]

        found = at_opening(shop, monkeypatch, configs)
        await become(redis, older)
        await opened(shop, 2)
        ((of_bob, of_eve),) = found  # type: ignore[misc]
        assert of_bob == FROZEN.encode()
        assert of_eve not in (None, FROZEN.encode())
        assert await lived(shop, "bob") == bob | {"epoch": 2}
        assert await lived(shop, "eve") == eve
        again = await shop.consume("bob", OUTPUT, 2_000, key="k1")
        assert (again.replayed, again.charged, again.sequence) == (True, first.charged, first.sequence)
        assert (await shop.consume("bob", INPUT, 1_000, key="k0")).replayed
        assert (await shop.consume("eve", INPUT, 1_000, key="e0")).replayed
        assert (await shop.consume("bob", INPUT, 1)).sequence == 3
        await shop.settled("bob")
        assert (await events(shop), await events(shop, "eve")) == (3, 1)

    async def test_one_that_lacks_a_change_of_the_ledger_is_behind(self, shop: Rig, redis: Redis) -> None:
        await shop.account("bob")
        await shop.account("eve")
        older = await image(redis)
        await shop.stub.CreateGrant(ledger_pb2.Grant(id="more", customer="bob", amount_nanos=USD))
        await shop.account_when("bob", lambda account: len(account.grants) == 2)

        async def confirmed() -> bool:
            return await shop.value("SELECT applied = version FROM accounts WHERE customer = 'bob'") is True

        await eventually(confirmed)
        await become(redis, older)
        await opened(shop, 2)
        bob = await shop.account_when("bob", lambda account: account.epoch == 2)
        assert sum(grant.remaining for grant in bob.grants) == 11 * USD
        assert (await shop.account("eve")).epoch == 1

    async def test_one_that_is_ahead_is_settled_and_stays(self, shop: Rig, redis: Redis) -> None:
        await shop.consume("bob", INPUT, 1_000)
        await shop.settled("bob")
        await shop.stop_drain()
        await shop.consume("bob", INPUT, 1_000)
        before = await lived(shop, "bob")
        older = await image(redis)
        await become(redis, older)
        await supervise(shop)
        await opened(shop, 2)
        assert await lived(shop, "bob") == before
        assert await events(shop) == 2

    @pytest.mark.parametrize(
        "live, ledger, behind",
        [
            ((1, 5, 0), (1, 5, 0), False),
            ((1, 4, 0), (1, 5, 0), True),
            ((1, 6, 0), (1, 5, 0), False),
            ((1, 9, 0), (2, 5, 0), True),  # Of an epoch that is over.
            ((3, 5, 0), (2, 5, 0), False),
            ((1, 5, 1), (1, 5, 2), True),
            ((1, 6, 2), (1, 5, 1), False),
        ],
    )
    def test_what_behind_means(self, live: tuple[int, int, int], ledger: tuple[int, int, int], behind: bool) -> None:
        assert opener.is_behind(opener.Place(*live), opener.Place(*ledger)) is behind


class TestStale:
    async def test_a_batch_that_was_read_under_an_opening_that_is_over_is_refused(
        self, shop: Rig, redis: Redis
    ) -> None:
        await shop.stop_drain()
        await shop.consume("bob", INPUT, 1_000)
        stream = keys.journal(shop.hot.partition((TENANT, "bob")))
        ((entry_id, fields),) = await redis.xrange(stream)
        posted = read(Arrival(stream, entry_id, fields[b"r"]))
        assert isinstance(posted, Posted)
        async with shop.ledger.transaction() as connection:
            begun = await fence.begin(connection, (await shop.hot.server()).identity)
        with pytest.raises(Stale, match=r"opening 1 .* it is 2"):
            await shop.ledger.post([posted], opening=1)
        assert await events(shop) == 0
        await shop.ledger.post([posted], opening=begun.number)
        assert await events(shop) == 1

    async def test_it_is_read_again_from_the_hot_store_that_is_there(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, in_hand, free, refused = shop.ledger.post, asyncio.Event(), asyncio.Event(), 0

        async def post(batch: list[Posted], refused_: str = "", opening: int | None = None) -> object:
            nonlocal refused
            in_hand.set()
            await free.wait()
            try:
                return await real(batch, refused_, opening)
            except Stale:
                refused += 1
                raise

        monkeypatch.setattr(shop.ledger, "post", post)
        await shop.consume("bob", INPUT, 1_000)
        async with asyncio.timeout(DEADLINE_S):
            await in_hand.wait()
        await redis.delete(keys.OPEN)
        await number_is(shop, 2)
        free.set()
        await opened(shop, 2)
        assert refused == 1
        assert await events(shop) == 1
        assert await shop.value("SELECT count(*) FROM quarantine") == 0
        await shop.consume("bob", INPUT, 1_000)
        await shop.settled("bob")
        assert await events(shop) == 2

    async def test_no_opening_begins_while_a_batch_is_booked(self, shop: Rig) -> None:
        async with shop.ledger.transaction() as connection:
            await fence.hold(connection, 1)
            beginning = asyncio.create_task(self._begin(shop))
            done, _ = await asyncio.wait([beginning], timeout=0.3)
            assert not done
        async with asyncio.timeout(DEADLINE_S):
            assert (await beginning).number == 2

    async def _begin(self, shop: Rig) -> Opening:
        identity = (await shop.hot.server()).identity
        async with shop.ledger.transaction() as connection:
            return await fence.begin(connection, identity)


class TestTwo:
    async def test_a_second_control_plane_waits_and_goes_on_where_the_first_ended(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        second = ControlPlane(shop.ledger, shop.hot, shop.drain.settled, TENANT)
        looks, looked = 0, asyncio.Event()
        real = second.opener.look

        async def look() -> bool:
            nonlocal looks
            looks += 1
            looked.set()
            return await real()

        monkeypatch.setattr(second.opener, "look", look)
        waiting = asyncio.create_task(second.run())
        try:
            await redis.delete(keys.OPEN)
            await opened(shop, 2)  # By the first, alone.
            await redis.delete(keys.OPEN)
            await opened(shop, 3)
            assert looks == 0
            tasks = asyncio.all_tasks() - {waiting}
            (running,) = [task for task in tasks if task.get_coro().__qualname__ == "ControlPlane.run"]
            await end(running)
            async with asyncio.timeout(DEADLINE_S):
                await looked.wait()
            await redis.delete(keys.OPEN)
            await opened(shop, 4)
            decision = await shop.consume("bob", INPUT, 1_000)
            assert isinstance(decision, Decision)
        finally:
            await end(waiting)
