"""The patrol: drift is found, told and healed without anybody's call, and nothing else is touched."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from urllib.request import urlopen

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from structlog.testing import capture_logs

from entitlement import keys
from entitlement.account import HotGrant
from gateway.cli.stack import DevStack
from ledger_sync import patrol as patrol_module
from ledger_sync import reconcile
from ledger_sync.control import LEASE, ControlPlane
from ledger_sync.hot_store import HotStore
from ledger_sync.ledger import LEASE_CLASS
from ledger_sync.patrol import Patrol
from ledger_sync.telemetry import Figures
from tests import journal_records, stacks
from tests.control_rig import DEADLINE_S, TENANT, USD, Rig, end, eventually, rig
from tests.integration.test_reconcile import Storm, forge, is_clean, verify
from tests.servers import free_port
from tests.stacks import environment, prepared, price_of, put_catalogue, site, until

END_LEASE = """
SELECT pg_terminate_backend(pid) FROM pg_locks
WHERE locktype = 'advisory' AND granted AND classid::bigint = $1 AND objid::bigint = $2"""


class Watch:
    """A patrol over a rig, and what it exports."""

    def __init__(self, shop: Rig, round_s: float = 0.0) -> None:
        self.registry = CollectorRegistry()
        self.patrol = Patrol(
            shop.ledger, shop.control.reconciler, TENANT, figures=Figures(self.registry), round_s=round_s
        )

    def figure(self, name: str) -> float:
        return self.registry.get_sample_value(f"entitlement_sync_{name}") or 0.0

    @property
    def drift(self) -> tuple[float, float, float]:
        """Nanos, customers, repairs."""
        return self.figure("drift_nanos"), self.figure("drifted_customers"), self.figure("patrol_repairs_total")


@pytest.fixture
async def shop(valkey_url: str, database_dsn: str) -> AsyncIterator[Rig]:
    """A catalogue, and bob and amy, who have used some of their credit."""
    async with rig(valkey_url, database_dsn) as made:
        await made.catalogue()
        for name in ("amy", "bob"):
            await made.customer(name, 10 * USD)
            await made.consume(name, "input.tokens", 1_000_000)
            await made.settled(name)
        yield made


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(valkey_url) as client:
        yield client


async def add_nano(shop: Rig, redis: Redis) -> None:
    (grant,) = (await shop.account("bob")).grants
    await forge(shop, redis, grants=[HotGrant(grant.no, grant.remaining + 1, grant.effective_ms)])


async def audited(shop: Rig) -> list[tuple[str, str, str]]:
    rows = await shop.rows("SELECT actor, action, subject FROM audit WHERE action LIKE 'Re%' ORDER BY id")
    return [tuple(row) for row in rows]


async def healed(shop: Rig) -> None:
    await shop.account_when("bob", lambda account: account.grants[0].remaining == 7 * USD)
    await shop.settled("bob")
    assert is_clean(await verify(shop))


class TestRounds:
    async def test_drift_is_told_when_seen_and_healed_when_seen_again(self, shop: Rig, redis: Redis) -> None:
        watch = Watch(shop)
        await watch.patrol.round()
        assert watch.drift == (0, 0, 0)
        await add_nano(shop, redis)
        with capture_logs() as logs:
            await watch.patrol.round()
            assert watch.drift == (1, 1, 0) and await audited(shop) == []
            await watch.patrol.round()
        assert watch.drift == (0, 0, 1)
        assert await audited(shop) == [("patrol", "Repair", "bob")]
        told = [line for line in logs if line["log_level"] == "error"]
        assert [(line["event"], line["customer"], line["part"]) for line in told] == [("drift", "bob", "grant:2")]
        await healed(shop)
        (note,) = await shop.rows("SELECT note FROM transactions WHERE kind = 'adjust'")
        assert note["note"] == f"grant:2 hot {7 * USD + 1} ledger {7 * USD}"
        await watch.patrol.round()
        assert watch.drift == (0, 0, 1)

    async def test_what_agrees_again_in_between_is_not_touched(self, shop: Rig, redis: Redis) -> None:
        watch = Watch(shop)
        right = await shop.account("bob")
        await add_nano(shop, redis)
        await watch.patrol.round()
        await forge(shop, redis, grants=right.grants)
        await watch.patrol.round()
        assert watch.drift == (0, 0, 0)
        await add_nano(shop, redis)
        await watch.patrol.round()
        assert watch.drift == (1, 1, 0) and await audited(shop) == []

    async def test_a_projection_that_is_wrong_is_healed_not_followed(self, shop: Rig) -> None:
        watch = Watch(shop)
        await shop.execute("UPDATE grant_balances SET remaining = remaining + 5 WHERE grant_no = 2")
        for _ in range(2):
            await watch.patrol.round()
        assert await audited(shop) == [("patrol", "RepairProjection", "bob")]
        await healed(shop)

    async def test_a_customer_with_a_record_in_quarantine_is_told_of_but_left(self, shop: Rig, redis: Redis) -> None:
        watch = Watch(shop)
        record = journal_records.arrival(journal_records.consumed("k", 1, customer="bob"), "1-1", "j:{x}")
        await shop.execute(
            "INSERT INTO quarantine (stream, entry_id, reason, record) VALUES ('x', '1-1', 'refused: x', $1)",
            record.data,
        )
        await add_nano(shop, redis)
        for _ in range(3):
            await watch.patrol.round()
        assert watch.drift == (1, 1, 0) and await audited(shop) == []
        await shop.execute("UPDATE quarantine SET resolved_at = now()")
        await watch.patrol.round()
        assert watch.drift == (0, 0, 1)
        await healed(shop)

    async def test_an_account_that_has_lost_its_repair_is_built_anew(self, shop: Rig, redis: Redis) -> None:
        watch = Watch(shop)
        await add_nano(shop, redis)
        for _ in range(2):
            await watch.patrol.round()
        await healed(shop)
        await forge(shop, redis, version=2)  # Back to before the repair.
        for _ in range(2):
            await watch.patrol.round()
        assert await audited(shop) == [("patrol", "Repair", "bob"), ("patrol", "Rebuild", "bob")]
        assert (await shop.account("bob")).epoch == 2
        await healed(shop)

    async def test_it_goes_page_by_page(self, shop: Rig, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (reconcile, patrol_module):
            monkeypatch.setattr(module, "BATCH", 1)
        watch = Watch(shop)
        await add_nano(shop, redis)
        await watch.patrol.round()
        assert watch.drift == (1, 1, 0)
        await watch.patrol.round()
        assert watch.drift == (0, 0, 1)
        await healed(shop)

    async def test_a_round_takes_its_time(self, shop: Rig) -> None:
        watch = Watch(shop, round_s=0.5)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await watch.patrol.round()
        assert loop.time() - began >= 0.5


class TestTwo:
    async def test_what_two_see_at_once_is_repaired_once(self, shop: Rig, redis: Redis) -> None:
        await add_nano(shop, redis)
        both = [Watch(shop), Watch(shop)]
        for _ in range(2):
            await asyncio.gather(*[watch.patrol.round() for watch in both])
        await healed(shop)
        assert await shop.value("SELECT count(*) FROM transactions WHERE kind = 'adjust'") == 1


class TestLoop:
    async def test_forged_drift_is_healed_without_a_call(self, shop: Rig, redis: Redis) -> None:
        watch = Watch(shop, round_s=0.05)
        task = asyncio.create_task(watch.patrol.run())
        try:
            await add_nano(shop, redis)

            async def repaired() -> bool:
                return watch.figure("patrol_repairs_total") == 1

            await eventually(repaired)
        finally:
            await end(task)
        await healed(shop)
        assert await audited(shop) == [("patrol", "Repair", "bob")]

    async def test_who_stops_no_longer_tells_of_drift(self, shop: Rig, redis: Redis) -> None:
        await add_nano(shop, redis)
        watch = Watch(shop, round_s=60)
        task = asyncio.create_task(watch.patrol.run())

        async def told() -> bool:
            return watch.drift == (1, 1, 0)

        await eventually(told)
        await end(task)
        assert watch.drift == (0, 0, 0)

    async def test_traffic_loses_nothing_and_is_never_repaired(self, shop: Rig, redis: Redis, seed: int) -> None:
        storm = Storm(shop, redis, Random(seed))
        for number in range(1, 4):
            await shop.customer(f"c{number}", USD)
        watch = Watch(shop)
        task = asyncio.create_task(watch.patrol.run())
        try:
            async with asyncio.timeout(3 * DEADLINE_S), asyncio.TaskGroup() as group:
                for lane in range(4):
                    group.create_task(storm.traffic(f"lane{lane}", 100))
                group.create_task(storm.changes(30))
        finally:
            await end(task)
        for row in await shop.rows("SELECT customer, version FROM accounts WHERE epoch > 0"):
            await shop.account_when(row["customer"], lambda account, row=row: account.version >= row["version"])  # type: ignore[misc]
            await shop.settled(row["customer"])
        report = await verify(shop)
        assert is_clean(report) and report.events == len(storm.charged) + 2
        assert watch.figure("patrol_repairs_total") == 0 and await audited(shop) == []

    async def test_the_one_control_plane_that_has_the_lease_patrols(self, shop: Rig, redis: Redis) -> None:
        watch = Watch(shop)
        second = ControlPlane(shop.ledger, shop.hot, shop.drain.settled, TENANT)
        second.patrol = watch.patrol
        await add_nano(shop, redis)
        waiting = asyncio.create_task(second.run())
        try:
            for _ in range(3):
                assert (await verify(shop)).drifted == 1
            assert watch.drift == (0, 0, 0)
            await shop.rows(END_LEASE, LEASE_CLASS, zlib.crc32(LEASE.encode()) & 0x7FFFFFFF)

            async def repaired() -> bool:
                return watch.figure("patrol_repairs_total") == 1

            await eventually(repaired)
            await healed(shop)
        finally:
            await end(waiting)


async def test_a_whole_stack_heals_itself_and_exports_it(folders: Callable[[], Path]) -> None:
    """ledger_sync as a process of its own, by its settings alone."""
    metrics = f"127.0.0.1:{free_port()}"
    settings = {"ENTITLEMENT_SYNC_PATROL_S": "1", "ENTITLEMENT_SYNC_METRICS": metrics}
    with DevStack(prepared(folders() / "data"), env=environment("grpcio", {"sync": settings})) as stack:
        put_catalogue(stack)
        async with site(stack) as at:
            customer = await at.customer(price_of(10))
            await at.consume(customer)
            await at.verified(customer)
            hot = HotStore.connect(stack.redis_url)
            name = (stacks.TENANT, customer)
            (account,) = await hot.snapshots([name])
            assert account is not None
            forged = msgspec.structs.replace(account, overage=account.overage + 7).encode()
            await at.hot.hset(keys.account(hot.partition(name), *name), mapping=forged)  # type: ignore[arg-type]
            await hot.close()

            async def exported() -> str:
                answer = await asyncio.to_thread(urlopen, f"http://{metrics}/metrics")
                return str(answer.read().decode())

            def healed(text: str) -> bool:  # A figure that is read before the other is from before the repair.
                return "patrol_repairs_total 1.0" in text and "entitlement_sync_drift_nanos 0.0" in text

            await until(exported, healed, "the repair")
            await at.balance_when(customer, price_of(9))
            await at.verified(customer)
            assert healed(await exported())
