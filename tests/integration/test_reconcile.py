"""Installs, ledger changes and Verify: hot store and ledger agree to the nano, or it is seen and healed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from random import Random

import grpc
import msgspec
import pytest
from redis.asyncio import Redis

from entitlement import keys
from entitlement.account import Account, HotGrant
from entitlement.decision import Decision, Limits, Mode, parse_outcome
from entitlement.identity import key_digest
from entitlement.periods import HOUR
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import install
from ledger_sync.install import ensure
from ledger_sync.pricing import PriceList
from ledger_sync.reconcile import LOOKS
from tests.control_rig import DEADLINE_S, TENANT, USD, Rig, eventually, refusal, rig
from tests.servers import ValkeyProcess

BOB = (TENANT, "bob")


@pytest.fixture
async def shop(valkey_url: str, database_dsn: str) -> AsyncIterator[Rig]:
    """A catalogue, and bob with 10 USD."""
    async with rig(valkey_url, database_dsn) as made:
        await made.catalogue()
        await made.customer("bob", 10 * USD)
        yield made


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(valkey_url) as client:
        yield client


async def verify(shop: Rig, customer: str = "", *, repair: bool = False) -> pb.VerifyReport:
    return await shop.stub.Verify(pb.VerifyRequest(customer=customer, repair=repair))


def is_clean(report: pb.VerifyReport) -> bool:
    faults = (report.drifted, report.drift_nanos, report.unbalanced_transactions, report.journal_lag)
    return not any((*faults, report.sequence_gaps))


async def forge(shop: Rig, redis: Redis, **changed: object) -> None:
    """Puts another state in the place of bob's live account, behind everyone's back."""
    account = msgspec.structs.replace(await shop.account("bob"), **changed)
    await redis.hset(keys.account(shop.hot.partition(BOB), *BOB), mapping=account.encode())  # type: ignore[arg-type]


def without_place(account: Account) -> dict[str, object]:
    """Its fields, but for how far it has come."""
    return msgspec.structs.asdict(msgspec.structs.replace(account, epoch=0, sequence=0, version=0))


class TestInstalls:
    async def test_an_account_comes_back_as_it_was(self, shop: Rig) -> None:
        await shop.stub.PutContract(
            pb.Contract(
                id="contract-bob",
                customer="bob",
                rate_card="llm",
                quotas=[
                    pb.QuotaLimit(feature="input.tokens", limit=10_000_000),
                    pb.QuotaLimit(feature="output.tokens", limit=10_000_000, period=pb.HOUR),
                ],
            )
        )
        await shop.stub.CreateGrant(
            pb.Grant(id="narrow", customer="bob", amount_nanos=USD, features=["output.tokens"], priority=-1)
        )
        last_month = await shop.hot.now_ms() - 32 * 24 * HOUR
        old = pb.Grant(id="old", customer="bob", amount_nanos=USD)
        old.effective_at.FromMilliseconds(last_month - HOUR)
        await shop.stub.CreateGrant(old)
        await shop.consume("bob", "input.tokens", 5, event_ms=last_month)
        for number in range(1, 20):
            await shop.consume("bob", ("input.tokens", "output.tokens")[number % 2], 10_007 * number)
        before = await shop.account("bob")
        assert before.archive and before.meters and before.settled
        await shop.hot.drop(BOB)
        after = await shop.account("bob")
        assert (after.epoch, after.sequence) == (before.epoch + 1, before.sequence)
        assert without_place(after) == without_place(before)
        assert is_clean(await verify(shop))

    async def test_one_that_cannot_be_built_keeps_no_other_back(
        self, shop: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(install, "UNTIL_MS", 1_000)  # So long it is before it is tried again.
        names = ["amy", "bob", "cid", "dee"]
        for name in (*names[:1], *names[2:]):
            await shop.customer(name, USD)
        config = await shop.value("SELECT config FROM accounts WHERE customer = 'bob'")
        await shop.execute("UPDATE accounts SET config = 'nonsense' WHERE customer = 'bob'")
        shop.control.installer.request([(TENANT, name) for name in names])
        async with asyncio.timeout(DEADLINE_S):
            await ensure(shop.hot, [(TENANT, name) for name in names if name != "bob"])
        assert await shop.hot.live([BOB]) == [False]
        await shop.execute(f"UPDATE accounts SET config = '{config}' WHERE customer = 'bob'")
        async with asyncio.timeout(DEADLINE_S):
            await ensure(shop.hot, [BOB])

    async def test_an_install_waits_for_the_journal(self, shop: Rig) -> None:
        await shop.account("bob")
        await shop.stop_drain()
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.hot.drop(BOB)
        waiting = asyncio.create_task(ensure(shop.hot, [BOB]))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await asyncio.shield(waiting)
        shop.start_drain()
        async with asyncio.timeout(DEADLINE_S):
            await waiting
        assert [grant.remaining for grant in (await shop.account("bob")).grants] == [7 * USD]

    async def test_an_install_carries_every_change_that_waits(self, shop: Rig) -> None:
        await shop.consume("bob", "input.tokens", 8_000_000, mode=Mode.ADJUST_ONLY)
        await shop.settled("bob")
        assert (await shop.account("bob")).overage == 14 * USD
        await shop.hot.drop(BOB)
        await shop.stub.CreateGrant(pb.Grant(id="more", customer="bob", amount_nanos=20 * USD))
        await shop.stub.PutCustomer(pb.Customer(id="bob", name="Robert", status=pb.Customer.SUSPENDED))
        # An install may come between the two: then the second one follows it as a change.
        account = await shop.account_when("bob", lambda account: account.version == 4)
        assert (account.epoch, account.config.status) == (2, "S")
        assert (account.overage, account.allowance) == (0, 30 * USD)  # The debt has been repaid.
        assert [grant.remaining for grant in account.grants] == [6 * USD]
        assert await shop.rows("SELECT * FROM hot_deltas") == []
        assert await shop.value("SELECT idempotency_key FROM transactions WHERE kind = 'repay'") == "install:bob:2"
        assert is_clean(await verify(shop))

    async def test_hundreds_at_once(self, shop: Rig, redis: Redis) -> None:
        names = [f"c{number}" for number in range(300)]
        for name in names:
            await shop.customer(name, USD)
        asked = [(TENANT, name) for name in [*names, "stranger"]]
        await asyncio.gather(*(shop.hot.ask(asked) for _ in range(3)))
        async with asyncio.timeout(DEADLINE_S):
            await ensure(shop.hot, asked)
        assert await shop.hot.live(asked) == [True] * 300 + [False]
        epochs = await shop.rows("SELECT DISTINCT epoch FROM accounts WHERE customer <> 'bob'")
        assert [row["epoch"] for row in epochs] == [1]  # Each once.

    async def test_whoever_waits_is_told(self, shop: Rig, redis: Redis) -> None:
        async with redis.pubsub() as listener:
            await listener.subscribe(keys.LOADED_CHANNEL)
            assert (await listener.get_message(timeout=DEADLINE_S)) is not None  # Subscribed.
            await shop.hot.ask([BOB, (TENANT, "stranger")])
            told: set[bytes] = set()
            while len(told) < 2:
                message = await listener.get_message(timeout=DEADLINE_S)
                assert message is not None
                told.add(message["data"])
        assert told == {b"acme bob", b"acme stranger"}

    async def test_what_is_no_account_is_not_looked_for(self, shop: Rig, redis: Redis) -> None:
        for text in ("x", "a b c", "acme {7}", "acme bob\n", ""):
            await redis.rpush(keys.install_requests(0), text)
        await shop.account("bob")
        assert len(await redis.keys("a:*")) == 1

    async def test_a_hot_store_that_comes_back_empty_is_filled_from_the_ledger(self, database_dsn: str) -> None:
        with ValkeyProcess() as server:
            async with rig(server.url, database_dsn) as shop:
                await shop.catalogue()
                await shop.customer("bob", 10 * USD)
                await shop.consume("bob", "input.tokens", 1_000_000)
                before = await shop.account("bob")
                await shop.settled("bob")
                await shop.stop_drain()
                server.restart()
                shop.start_drain()
                await shop.stub.CreateGrant(pb.Grant(id="more", customer="bob", amount_nanos=USD))
                after = await shop.account_when("bob", lambda account: len(account.grants) == 2)
                assert (after.epoch, after.sequence, after.version) == (2, before.sequence, 3)
                assert (after.settled, after.meters) == (before.settled, before.meters)
                generation = await shop.control.catalogs.generation()

                async def published() -> bool:
                    return await shop.hot.catalog_generation() == generation

                await eventually(published)
                assert (await shop.consume("bob", "input.tokens", 1_000_000)).available == 5 * USD
                await shop.settled("bob")
                assert is_clean(await verify(shop))


class TestChanges:
    async def test_changes_arrive_in_order_whatever_happens_meanwhile(self, shop: Rig, seed: int) -> None:
        random = Random(seed)
        await shop.account("bob")
        for number in range(30):
            await shop.stub.CreateGrant(
                pb.Grant(id=f"g{number}", customer="bob", amount_nanos=random.randrange(1, USD), priority=number % 3)
            )
            if number % 3 == 0:
                await shop.stub.VoidGrant(pb.VoidGrantRequest(id=f"g{random.randrange(number + 1)}"))
            if number % 7 == 0:
                await shop.hot.drop(BOB)
            await shop.consume("bob", "output.tokens", random.randrange(1, 50_000), mode=Mode.ADJUST_ONLY)
        versions = await shop.value("SELECT version FROM accounts")
        await shop.account_when("bob", lambda account: account.version == versions)
        await shop.settled("bob")
        assert await shop.value("SELECT applied FROM accounts") == versions
        assert await shop.rows("SELECT * FROM hot_deltas") == []
        assert is_clean(await verify(shop))

    async def test_changes_that_the_hot_store_lost_are_noticed_with_the_next(self, shop: Rig, redis: Redis) -> None:
        before = await shop.account("bob")
        for number in range(3):
            await shop.stub.CreateGrant(pb.Grant(id=f"g{number}", customer="bob", amount_nanos=USD))
        await shop.account_when("bob", lambda account: len(account.grants) == 4)
        await shop.settled("bob")
        sequence = (await shop.account("bob")).sequence
        await forge(shop, redis, version=before.version, grants=before.grants)  # Back to before.
        await shop.stub.CreateGrant(pb.Grant(id="g3", customer="bob", amount_nanos=USD))
        account = await shop.account_when("bob", lambda account: len(account.grants) == 5)
        assert (account.epoch, account.sequence) == (2, sequence)
        lines = await shop.rows("SELECT actor, subject FROM audit WHERE action = 'Rebuild'")
        assert [tuple(line) for line in lines] == [("ledger_sync", "bob")]
        assert is_clean(await verify(shop))


class TestDuplicates:
    @pytest.mark.parametrize("other", [False, True])
    async def test_a_key_that_the_hot_store_forgot_is_charged_once(self, shop: Rig, redis: Redis, other: bool) -> None:
        await shop.consume("bob", "input.tokens", 1_000_000, key="k")
        digest = key_digest(TENANT, "bob", "k")
        await redis.delete(keys.idempotency(shop.hot.partition(BOB), digest))
        await shop.consume("bob", "input.tokens", 2_000_000 if other else 1_000_000, key="k")
        account = await shop.account_when("bob", lambda account: account.version == 3)
        assert [grant.remaining for grant in account.grants] == [7 * USD]
        assert (account.settled, account.meters) == (3 * USD, {"input.tokens": 1_000_000})
        await shop.settled("bob")
        report = await verify(shop)
        assert is_clean(report)
        assert (report.events, report.total_nanos, report.quarantined) == (1, 3 * USD, int(other))

    async def test_what_is_given_back_to_a_voided_grant_is_voided_too(self, shop: Rig, redis: Redis) -> None:
        await shop.consume("bob", "input.tokens", 1_000_000, key="k")
        await redis.delete(keys.idempotency(shop.hot.partition(BOB), key_digest(TENANT, "bob", "k")))
        await shop.settled("bob")
        await shop.stop_drain()
        await shop.consume("bob", "input.tokens", 1_000_000, key="k")
        await shop.stub.VoidGrant(pb.VoidGrantRequest(id="bob-1"))
        await shop.account_when("bob", lambda account: not account.grants)
        shop.start_drain()
        await shop.account_when("bob", lambda account: account.version == 5)
        await shop.settled("bob")
        assert (await shop.account("bob")).grants == []
        assert await shop.value("SELECT remaining FROM grant_balances") == 0
        assert is_clean(await verify(shop))


class TestVerify:
    async def test_a_nano_is_found_and_healed_by_a_change(self, shop: Rig, redis: Redis) -> None:
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.settled("bob")
        await forge(shop, redis, grants=[HotGrant(1, 7 * USD + 1, (await shop.account("bob")).grants[0].effective_ms)])
        report = await verify(shop)
        assert (report.customers, report.drifted, report.drift_nanos) == (1, 1, 1)
        (drift,) = report.drifts
        assert (drift.customer, drift.part, drift.hot_nanos, drift.ledger_nanos, drift.sequence) == (
            *("bob", "grant:1", 7 * USD + 1, 7 * USD, 1),
        )
        repaired = await shop.stub.Verify(pb.VerifyRequest(repair=True), metadata=(("x-actor", "amy"),))
        assert repaired.drift_nanos == 1
        await shop.account_when("bob", lambda account: account.grants[0].remaining == 7 * USD)
        await shop.settled("bob")
        assert is_clean(await verify(shop))
        (line,) = await shop.rows("SELECT actor, detail FROM audit WHERE action = 'Repair'")
        assert tuple(line) == ("amy", f"grant:1 hot {7 * USD + 1} ledger {7 * USD}")
        (booked,) = await shop.rows("SELECT note, version FROM transactions WHERE kind = 'adjust'")
        assert (booked["note"], booked["version"]) == (line["detail"], 3)

    @pytest.mark.parametrize(
        "changed",
        [
            {"overage": 5},
            {"overage": -5},
            {"settled": 1},
            {"meters": {"input.tokens": 7, "output.tokens": 1}},
            {"grants": []},
            {"grants": [HotGrant(1, 3)]},
        ],
    )
    async def test_every_part_is_compared_and_healed(self, shop: Rig, redis: Redis, changed: dict[str, object]) -> None:
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.settled("bob")
        right = await shop.account("bob")
        await forge(shop, redis, **changed)
        report = await verify(shop, "bob", repair=True)
        assert report.drifted == 1 and report.drift_nanos > 0
        await shop.account_when("bob", lambda account: account.version == 3)
        await shop.settled("bob")
        assert is_clean(await verify(shop))
        healed = await shop.account("bob")
        assert without_place(msgspec.structs.replace(healed, meters=right.meters)) == without_place(right)

    async def test_what_a_change_cannot_name_is_rebuilt(self, shop: Rig, redis: Redis) -> None:
        right = await shop.account("bob")
        await forge(shop, redis, grants=[*right.grants, HotGrant(999, 8)])
        report = await verify(shop, repair=True)
        assert (report.drifted, report.drift_nanos) == (1, 8)
        healed = await shop.account("bob")
        assert (healed.epoch, without_place(healed)) == (2, without_place(right))
        assert is_clean(await verify(shop))

    async def test_a_hot_store_that_lost_its_last_decisions_is_seen_and_rebuilt(self, shop: Rig, redis: Redis) -> None:
        await shop.consume("bob", "input.tokens", 1_000_000)
        before = await shop.account("bob")
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.settled("bob")
        await forge(
            shop, redis, **{name: getattr(before, name) for name in ("sequence", "grants", "settled", "meters")}
        )
        report = await verify(shop)
        assert (report.drifted, report.drift_nanos) == (1, 3 * USD + 3 * USD + 1_000_000)
        await verify(shop, repair=True)
        account = await shop.account("bob")
        assert (account.epoch, account.sequence) == (2, 2)
        assert is_clean(await verify(shop))

    async def test_projections_are_checked_against_entries(self, shop: Rig) -> None:
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.settled("bob")
        await shop.execute("UPDATE grant_balances SET remaining = remaining + 5")
        await shop.execute("UPDATE accounts SET overage = 2")
        await shop.execute("UPDATE account_periods SET settled = settled - 1")
        report = await verify(shop)
        assert report.drifted == 1
        # Inside the ledger, and so of the hot account, which did not follow.
        assert report.drift_nanos == 2 * (5 + 2 + 1)
        await verify(shop, repair=True)
        assert is_clean(await verify(shop))
        assert [grant.remaining for grant in (await shop.account("bob")).grants] == [7 * USD]

    async def test_missing_records_are_lag_not_drift(self, shop: Rig) -> None:
        await shop.account("bob")
        await shop.stop_drain()
        await shop.consume("bob", "input.tokens", 1_000_000)
        shop.control.reconciler.wait_s = 0.1
        report = await verify(shop)
        assert (report.journal_lag, report.drifted) == (1, 0)
        shop.start_drain()
        shop.control.reconciler.wait_s = DEADLINE_S
        assert is_clean(await verify(shop))

    async def test_what_is_wrong_in_the_ledger_itself_is_named(self, shop: Rig) -> None:
        await shop.customer("amy", USD)
        await shop.consume("bob", "input.tokens", 1_000, key="used")
        await shop.settled("bob")
        assert not (await verify(shop)).findings
        await shop.execute("DELETE FROM outbox WHERE event_id = 'used'")
        await shop.execute("UPDATE accounts SET gaps = 1 WHERE customer = 'amy'")
        assert [(found.customer, found.name) for found in (await verify(shop)).findings] == [
            ("amy", "gap in the sequence"),
            ("bob", "event missing from the outbox"),
        ]
        (found,) = (await verify(shop, "bob")).findings
        assert found.detail == "used"

    async def test_an_unknown_customer_is_not_found(self, shop: Rig) -> None:
        code, text = await refusal(shop.stub.Verify(pb.VerifyRequest(customer="nobody")))
        assert (code, text) == (grpc.StatusCode.NOT_FOUND, "customer: 'nobody' is unknown or has no contract")

    async def test_one_customer_alone(self, shop: Rig, redis: Redis) -> None:
        await shop.customer("amy", USD)
        await shop.consume("amy", "input.tokens", 1_000)
        await shop.consume("bob", "input.tokens", 1_000)
        await shop.settled("amy")
        await shop.settled("bob")
        await forge(shop, redis, overage=1)
        report = await verify(shop, "amy")
        assert is_clean(report) and (report.customers, report.events) == (1, 1)
        assert (await verify(shop, "bob")).drifted == 1

    async def test_what_is_given_back_while_it_looks_is_no_drift(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A key that Redis forgot is charged again, found out and given back between two readings of the ledger, each
        time that Verify looks, for longer than drift would need.
        """
        await shop.consume("bob", "input.tokens", 1_000, key="k")
        await shop.settled("bob")
        digest = key_digest(TENANT, "bob", "k")
        given_back = 0
        snapshots = shop.hot.snapshots

        async def between(names: Sequence[tuple[str, str]]) -> list[Account | None]:
            nonlocal given_back
            if given_back > LOOKS or names != [BOB]:
                return await snapshots(names)
            given_back += 1
            with monkeypatch.context() as patch:
                patch.setattr(shop.hot, "snapshots", snapshots)
                await shop.stop_drain()
                await redis.delete(keys.idempotency(shop.hot.partition(BOB), digest))
                await shop.consume("bob", "input.tokens", 1_000, key="k")
                seen = await snapshots(names)
                shop.start_drain()
                assert seen[0] is not None
                version = seen[0].version + 1
                await shop.account_when("bob", lambda account: account.version == version)
                await shop.settled("bob")
            return seen

        monkeypatch.setattr(shop.hot, "snapshots", between)
        assert is_clean(await verify(shop))
        assert given_back == LOOKS + 1

    async def test_an_install_while_it_looks_is_no_drift(
        self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await shop.consume("bob", "input.tokens", 1_000)
        await shop.settled("bob")
        installed = 0
        snapshots = shop.hot.snapshots

        async def between(names: Sequence[tuple[str, str]]) -> list[Account | None]:
            nonlocal installed
            if installed <= LOOKS and names == [BOB]:
                installed += 1
                await shop.hot.drop(BOB)
                await ensure(shop.hot, [BOB])
            return await snapshots(names)

        monkeypatch.setattr(shop.hot, "snapshots", between)
        assert is_clean(await verify(shop))
        assert installed == LOOKS + 1

    async def test_it_holds_under_load(self, shop: Rig, redis: Redis, seed: int) -> None:
        """Traffic, changes, forgotten keys and lost accounts, all at once, while Verify looks again and again."""
        storm = Storm(shop, redis, Random(seed))
        for number in range(1, 4):
            arrears = {"billing": pb.Contract.ARREARS, "allowance_nanos": USD} if number == 1 else {}
            await shop.customer(f"c{number}", USD, **arrears)
        async with asyncio.TaskGroup() as group:
            for lane in range(4):
                group.create_task(storm.traffic(f"lane{lane}", 150))
            group.create_task(storm.changes(40))
            for _ in range(8):
                report = await verify(shop)
                assert (report.drifted, report.drift_nanos, report.unbalanced_transactions) == (0, 0, 0), report
        for number in range(1, 4):
            await shop.settled(f"c{number}")
        versions = await shop.rows("SELECT customer, version FROM accounts WHERE epoch > 0")
        for row in versions:
            await shop.account_when(row["customer"], lambda account, row=row: account.version >= row["version"])  # type: ignore[misc]
            await shop.settled(row["customer"])
        report = await verify(shop)
        assert is_clean(report)
        assert report.events == len(storm.charged)


class Storm:
    """What a deployment goes through, from a seed."""

    def __init__(self, shop: Rig, redis: Redis, random: Random) -> None:
        self.charged: set[str] = set()
        self._shop = shop
        self._redis = redis
        self._random = random

    def _customer(self) -> str:
        return f"c{self._random.randrange(1, 4)}"

    async def traffic(self, name: str, count: int) -> None:
        prices = PriceList((await self._shop.control.catalogs.snapshot()).tenants[0])
        for number in range(count):
            customer, key = self._customer(), f"{name}-{number}"
            message = gateway_pb2.CheckAndConsumeRequest(idempotency_key=key, customer=customer)
            feature = self._random.choice(("input.tokens", "output.tokens"))
            message.usage.add(feature=feature, quantity=self._random.randrange(1, 5_000))
            message.mode = self._random.choice((1, 2, 4))  # type: ignore[assignment]
            await self._decide(message, prices)
            if self._random.random() < 0.05:  # A retry after the hot store has forgotten.
                digest = key_digest(TENANT, customer, key)
                await self._redis.delete(keys.idempotency(self._shop.hot.partition((TENANT, customer)), digest))
                await self._decide(message, prices)
            await asyncio.sleep(0)

    async def _decide(self, message: gateway_pb2.CheckAndConsumeRequest, prices: PriceList) -> None:
        request = parse_consume(TENANT, message)
        while True:
            charge = prices.charge(request, "llm", await self._shop.hot.now_ms())
            (reply,) = await self._shop.hot.consume([(request, charge)], Limits())
            outcome = parse_outcome(reply, request)
            if isinstance(outcome, Decision):
                if outcome.verdict.name != "DENY":
                    self.charged.add(request.key)
                return
            await ensure(self._shop.hot, [(TENANT, request.customer)])

    async def changes(self, count: int) -> None:
        for number in range(count):
            grant = pb.Grant(id=f"g{number}", customer=self._customer(), priority=self._random.randrange(-1, 2))
            grant.amount_nanos = self._random.randrange(1, USD // 2)
            grant.features.extend(self._random.choice(([], ["input.tokens"])))
            await self._shop.stub.CreateGrant(grant)
            if self._random.random() < 0.4:
                await self._shop.stub.VoidGrant(pb.VoidGrantRequest(id=f"g{self._random.randrange(number + 1)}"))
            if self._random.random() < 0.2:
                await self._shop.hot.drop((TENANT, self._customer()))
