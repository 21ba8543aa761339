"""Group B: the hot store fails over, is emptied, forgets its scripts, is full, has another clock, or is two."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest
import redis
from redis.exceptions import ResponseError

from entitlement import keys
from tests.faults.auditor import Audit
from tests.faults.cluster import Cluster
from tests.faults.conftest import Deploy
from tests.faults.load import Outcome
from tests.faults.marks import CASE, large_only
from tests.faults.processes import Hot, until
from tests.faults.scenario import ANSWERED_S, Run, off, play, rounds

pytestmark = CASE

REPLAY_S = 5.0
REOPENS_S = 5.0
SLOWER = 3.0
MAX_LAG_S = 2.0  # after which a primary without a replica refuses


async def fails_over(run: Run) -> None:
    await run.more(200, least=50)
    await off(run.cluster.lose_primary)
    await run.answers_again()
    await off(run.cluster.new_replica)
    await run.more(50)


@pytest.mark.parametrize(
    "delay_ms", [pytest.param(1, marks=large_only), 10, pytest.param(100, marks=large_only)], ids=lambda ms: f"{ms}ms"
)
async def test_b1_failovers_in_a_row_lose_nothing(deploy: Deploy, delay_ms: int) -> None:
    cluster = await off(lambda: deploy(replica_delay_ms=float(delay_ms)))
    audit = await play(f"B1-{delay_ms}ms", cluster, fails_over, n=rounds(2, 300), wounds=True)
    assert audit.again_s < REOPENS_S * SLOWER


@large_only
async def test_b1_failovers_with_receipts_and_replica(deploy: Deploy) -> None:
    """Nothing is answered before the replica has it, too."""

    async def fails_over_to_two(run: Run) -> None:
        await run.more(200, least=50)
        await off(run.cluster.fail_over)  # Without a replica of its own, the new primary could not be answered from.
        await run.answers_again()
        await run.more(50)

    cluster = await off(lambda: deploy(durability="receipt+replica"))
    await play("B1-receipt+replica", cluster, fails_over_to_two, n=rounds(2, 300), wounds=True)


async def test_b1_durability_redis_is_seen_to_lose_answers(deploy: Deploy) -> None:
    """The harness bites: without receipts, what a failover takes with it is lost, and the auditor sees it."""
    cluster = await off(lambda: deploy(durability="redis"))
    audit = await play("B1-redis", cluster, fails_over, n=rounds(2, 20), strict=False, wounds=True)
    assert audit.lost > 0


async def test_b2_the_last_second_never_reached_the_replica(deploy: Deploy) -> None:
    """The ledger is ahead of it."""

    async def fails_over_behind(run: Run) -> None:
        await run.more(100)
        run.cluster.replication.back.paused = True
        await asyncio.sleep(run.random.uniform(0.3, 1.0))
        await off(run.cluster.lose_primary)
        run.cluster.replication.back.paused = False
        await off(run.cluster.new_replica)
        await run.more(50)

    await play("B2", await off(deploy), fails_over_behind, n=rounds(1), wounds=True)


@large_only
async def test_b3_two_primaries_for_a_while(deploy: Deploy) -> None:
    """Half of the gateways still reach the old one; it refuses once it has had no replica for long enough."""
    cluster: Cluster = await off(lambda: deploy(gateways=2))

    async def splits(run: Run) -> None:
        await off(lambda: cluster.primary.set(min_replicas_to_write="1", min_replicas_max_lag="1"))
        await run.more(100)
        old, new = cluster.primary, cluster.replica
        assert new is not None
        cluster.replication.back.silent = cluster.replication.towards.silent = True  # Nobody is told.
        await off(new.promote)
        cluster.put_aside(old)
        cluster.primary, cluster.replica = new, None
        await off(cluster.lead_to, new)
        cluster.gateway_wires[0].lead_to(old.path)  # This one has not heard of it.
        await off(cluster.gateway_wires[0].cut)
        began = monotonic()
        await off(refuses, old)
        run.note(f"old primary refused after {monotonic() - began:.1f} s")
        assert monotonic() - began < MAX_LAG_S * SLOWER
        await asyncio.sleep(run.random.uniform(0, 5 if rounds(0) else 1))
        cluster.gateway_wires[0].lead_to(new.path)
        await off(cluster.gateway_wires[0].cut)
        await off(old.stop)
        await off(cluster.replication.cut)
        cluster.replication.towards.heal()
        cluster.replication.back.silent = False
        await off(cluster.new_replica)
        await run.more(50)

    pace_s = 0.1 if rounds(0) else 0.01  # A round takes 15 seconds: many of them would come to too many keys.
    await play("B3", cluster, splits, n=rounds(1), wounds=True, pace_s=pace_s)


def refuses(old: Hot) -> None:
    """Returns when that hot store takes no writes any more."""
    with old.client() as client:

        def refused() -> bool:
            try:
                client.set("faults:probe", 1)
            except ResponseError as error:
                return "NOREPLICAS" in str(error)
            return False

        until(refused, "the old primary goes on")


@large_only
async def test_b4_second_failover_while_the_first_is_recovered(deploy: Deploy) -> None:
    """A replay that is cut short is done again, on yet another hot store."""

    async def fails_over_twice(run: Run) -> None:
        await run.more(200, least=50)
        await off(run.cluster.lose_primary, False)
        await off(run.cluster.new_replica)
        await off(run.cluster.lead_to, run.cluster.primary)  # Only now do clients find it.
        await asyncio.sleep(run.random.uniform(0, 0.8))
        await off(run.cluster.lose_primary)
        await run.answers_again()
        await off(run.cluster.new_replica)
        await run.more(50)

    audit = await play("B4", await off(deploy), fails_over_twice, n=rounds(1), wounds=True)
    in_time(audit)


@large_only
@pytest.mark.parametrize("clock_s", [60, -60], ids=["ahead", "behind"])
async def test_b5_the_new_primary_has_another_clock(deploy: Deploy, clock_s: int) -> None:
    """No record is passed over: all that was granted is settled."""
    cluster: Cluster = await off(deploy)

    async def fails_over_in_time(run: Run) -> None:
        await off(cluster.new_replica, clock_s)
        await run.more(100, least=50)
        await off(cluster.fail_over)
        await run.more(50)

    await play(f"B5-{clock_s}s", cluster, fails_over_in_time, n=rounds(1), wounds=True)
    cluster.clean = False  # Its clock is not everybody's.


async def test_b6_scripts_are_flushed_again_and_again(deploy: Deploy) -> None:
    """No caller notices."""

    async def flushed(run: Run) -> None:
        await run.warm()
        failed = run.load.failures.total()
        with run.cluster.primary.client() as client:
            for _ in range(10):
                await off(client.script_flush)
                await run.more(20)
        assert run.load.failures.total() == failed, run.load.failures

    await play("B6", await off(deploy), flushed, n=rounds(1))


async def test_b8_memory_is_full_and_nothing_is_evicted(deploy: Deploy) -> None:
    """UNAVAILABLE, and nothing halfway; then as before."""

    async def full(run: Run) -> None:
        await run.warm()
        await run.more()
        await off(lambda: run.cluster.primary.set(maxmemory="1"))
        refused = run.load.failures["UNAVAILABLE"]
        async with asyncio.timeout(20):
            while run.load.failures["UNAVAILABLE"] < refused + 50:  # noqa: ASYNC110  The load counts.
                await asyncio.sleep(0.02)
        await off(lambda: run.cluster.primary.set(maxmemory="0"))
        await run.more()

    await play("B8", await off(deploy), full, n=rounds(1))


@large_only
async def test_b9_many_receipts_are_replayed_in_time(deploy: Deploy) -> None:
    """Nothing of them is settled when the hot store comes back empty; 100,000 with N = 100."""
    cluster: Cluster = await off(deploy)
    count = 100_000 if rounds(0) >= 100 else 2_000

    async def emptied(run: Run) -> None:
        await run.warm()
        await off(cluster.syncs[0].kill)
        while run.load.answered < count:
            await run.load.many(500)
        await off(lambda: cluster.restart_hot(empty=True))
        began = monotonic()
        await off(cluster.syncs[0].restart)
        await run.more(1)
        took_s = monotonic() - began
        run.note(f"{run.load.answered} receipts replayed, answering again after {took_s:.1f} s")
        assert took_s < REPLAY_S * SLOWER

    audit = await play("B9", cluster, emptied, wounds=True, insist_s=60)
    assert audit.acknowledged >= count // 2


async def test_flushall_under_load(deploy: Deploy) -> None:
    """No grant from an account that is not loaded; everything answered is in the ledger once."""

    async def flushed(run: Run) -> None:
        await run.more()
        with run.cluster.primary.client() as client:
            await off(client.flushall)
            await opened(run, client)
        await run.more()

    audit = await play("flushall", await off(deploy), flushed, n=rounds(1), wounds=True)
    assert audit.again_s < REOPENS_S * SLOWER


@large_only
async def test_flushall_again_while_the_first_is_recovered(deploy: Deploy) -> None:
    async def flushed(run: Run) -> None:
        await run.more(60, least=30)
        with run.cluster.primary.client() as client:
            await off(client.flushall)
            await asyncio.sleep(run.random.uniform(0, 0.5))
            await off(client.flushall)
            await opened(run, client)
        await run.more()

    audit = await play("flushall-twice", await off(deploy), flushed, n=rounds(1, 3), wounds=True)
    in_time(audit)


async def opened(run: Run, client: redis.Redis) -> None:
    """Returns when the ledger has opened an emptied hot store, and callers are answered."""
    began = monotonic()
    async with asyncio.timeout(ANSWERED_S):
        while not await off(client.exists, keys.OPEN):  # noqa: ASYNC110  It is elsewhere.
            await asyncio.sleep(0.02)
    run.again_s = max(run.again_s, monotonic() - began + await run.answers_again())


def in_time(audit: Audit) -> None:
    """Callers were answered again soon enough after two faults in a row: the first opening is not waited for."""
    assert audit.again_s <= REOPENS_S * SLOWER, f"no answer for {audit.again_s:.0f} s"


@large_only
async def test_flushall_without_receipts_is_seen_to_lose_answers(deploy: Deploy) -> None:
    """The harness bites here too."""

    async def flushed(run: Run) -> None:
        await run.more()
        await off(run.cluster.syncs[0].pause)
        await run.more(60, least=30)  # None of these is settled.
        with run.cluster.primary.client() as client:
            await off(client.flushall)
        run.cluster.syncs[0].resume()
        await run.more(20)

    cluster = await off(lambda: deploy(durability="redis"))
    audit = await play("flushall-redis", cluster, flushed, strict=False, wounds=True)
    assert audit.lost > 0


@large_only
async def test_retold_what_callers_were_told_stays_so(deploy: Deploy) -> None:
    """Asked again after everything, a key still has its first answer."""
    cluster: Cluster = await off(deploy)

    async def asked_again(run: Run) -> None:
        await run.more(200, least=100)
        await off(cluster.gateways[0].restart)
        known = {record.key: record.answer for record in run.load.of(Outcome.OK)}
        records = [run.load.records[key] for key in run.random.sample(sorted(known), 50)]
        await run.load.ask_again(records, 20)
        for record in records:
            before = known[record.key]
            assert before is not None and record.answer is not None
            assert (record.answer.replayed, record.amount) == (True, before.amount)

    await play("retold", cluster, asked_again)
