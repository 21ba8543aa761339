"""Group D: clocks, period ends, hot keys, slow hot stores, storms, a database that is away; and F9, cancellations."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from time import monotonic

import asyncpg
import grpc
import msgspec
import pytest

from entitlement.periods import HOUR
from entitlement.v1 import ledger_pb2
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from tests.faults import clock, witnesses
from tests.faults.cluster import TIMEOUT_MS, Cluster
from tests.faults.conftest import Deploy
from tests.faults.customers import PLAN
from tests.faults.load import Outcome
from tests.faults.marks import CASE, large_only
from tests.faults.processes import Program
from tests.faults.scenario import Run, off, play, rounds
from tests.stacks import CHANNEL

pytestmark = CASE

SLOWER = 3.0
RECOVERS_S = 2.0
CALM_S = 10.0
BOUNDARY_MS = 4_000  # how far ahead a period's end is put


@large_only
@pytest.mark.parametrize("clock_s", [3_600, -3_600], ids=["ahead", "behind"])
async def test_d1_gateway_with_a_wrong_clock(deploy: Deploy, clock_s: int) -> None:
    """Only the clocks of the hot store and the ledger count."""
    cluster: Cluster = await off(deploy)
    gateway = cluster.gateways[0]

    async def wrong(run: Run) -> None:
        gateway._by = clock.ahead(clock_s)
        await off(gateway.restart)
        try:
            await run.more(100, least=50)
        finally:
            gateway._by = ()
        events = await witnesses.value(
            cluster.database.dsn,
            "SELECT count(*) FROM usage_events WHERE abs(extract(epoch FROM now() - event_time)) > 600",
        )
        assert events == 0
        await off(gateway.restart)

    await play(f"D1-{clock_s:+}s", cluster, wrong, n=rounds(1, 20))


@large_only
async def test_d2_period_ends_in_the_middle_of_load(deploy: Deploy) -> None:
    """Every charge is of exactly one period, by its event time, and both periods add up to all of it."""
    cluster: Cluster = await off(deploy)

    async def rolls(run: Run) -> None:
        now_ms = await witnesses.value(cluster.database.dsn, "SELECT ledger_now_ms()")
        boundary_ms = now_ms + BOUNDARY_MS
        mine = run.customers[:3]
        async with grpc.aio.insecure_channel(cluster.admin_address(), options=CHANNEL) as channel:
            for customer in mine:
                contract = ledger_pb2.Contract(id=f"{customer.id}-c", customer=customer.id, rate_card=PLAN)
                contract.billing, contract.period = ledger_pb2.Contract.PREPAID, ledger_pb2.HOUR
                contract.anchor.FromMilliseconds(boundary_ms - HOUR)
                await LedgerAdminStub(channel).PutContract(contract, timeout=20)
        run.customers[:3] = [msgspec.structs.replace(customer, rolls=True) for customer in mine]
        run.load.customers = mine
        while await witnesses.value(cluster.database.dsn, "SELECT ledger_now_ms()") < boundary_ms + 500:
            await run.more(50)
        await periods_add_up(run, [customer.id for customer in mine], boundary_ms)

    await play("D2", cluster, rolls, callers=32, pace_s=0.005)


async def periods_add_up(run: Run, customers: list[str], boundary_ms: int) -> None:
    answered = sum(record.amount for record in run.load.of(Outcome.OK) if record.customer in customers)
    await run.settled()
    connection = await asyncpg.connect(run.cluster.database.dsn, timeout=20)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            rows = await connection.fetch(
                """SELECT period_start, (extract(epoch FROM event_time) * 1000)::bigint AS at, amount FROM usage_events
               WHERE customer = ANY($1::text[])""",
                customers,
            )
            kept = await connection.fetchval(
                "SELECT sum(settled) FROM account_periods WHERE customer = ANY($1::text[])", customers
            )
    finally:
        await connection.close()
    late = [row for row in rows if row["period_start"] >= boundary_ms]
    assert late and len(late) < len(rows)
    assert not [row for row in rows if (row["at"] >= boundary_ms) != (row["period_start"] >= boundary_ms)]
    assert sum(row["amount"] for row in rows) == kept
    assert kept >= answered > 0
    run.note(f"{len(rows) - len(late)} events before the period's end, {len(late)} after it")


@large_only
async def test_d3_everybody_asks_for_one_account(deploy: Deploy) -> None:
    """It is not overspent, and the others do not wait much longer."""

    async def hot(run: Run) -> None:
        await run.warm()
        await run.more(300, least=299)
        uniform_ms, began = run.load.percentile_ms(99), monotonic()
        everyone = run.load.customers
        poor = next(customer for customer in everyone if customer.most_nanos < 10**12 and not customer.most_units)
        run.load.customers = [msgspec.structs.replace(poor, weight=40), *everyone[2:6]]
        await run.more(600, least=599)
        others = [customer.id for customer in everyone[2:6]]
        hot_ms, others_ms = (run.load.percentile_ms(99, began, names) for names in ([poor.id], others))
        run.note(f"p99 uniform {uniform_ms:.0f} ms, of the hot account {hot_ms:.0f} ms, of others {others_ms:.0f} ms")
        assert run.load.of(Outcome.DENIED)  # It ran out.

    await play("D3", await off(deploy), hot, callers=64, pace_s=0.02)


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=large_only) for how in ("50 ms", "5 s", "1 byte a second")] + ["hangs", "half-open"],
)
async def test_d4_slow_hot_store(deploy: Deploy, how: str) -> None:
    """Whoever waits is told in time; when it is well again, so are they."""
    cluster: Cluster = await off(deploy)
    wire = cluster.gateway_wires[0]

    async def slow(run: Run) -> None:
        await run.warm()
        match how:
            case "50 ms":
                wire.back.slow(50)
            case "5 s":
                wire.back.slow(5_000)
            case "hangs":
                wire.back.paused = True
            case "half-open":
                wire.back.silent = True
            case _:
                wire.back.rate = 1
        began = monotonic()
        told = await asyncio.gather(*[run.load.tell(run.load.draw(), 10) for _ in range(3)])
        slowest_s, statuses = monotonic() - began, Counter(status.name for status in told)
        assert statuses == ({"OK": 3} if how == "50 ms" else {"UNAVAILABLE": 3})
        assert slowest_s < TIMEOUT_MS / 1000 * (SLOWER / 2)
        healed = monotonic()
        wire.heal()
        if how in ("half-open", "5 s", "1 byte a second"):
            await off(wire.cut)  # As a network that has lost something of a connection ends it.
        await run.more(1)
        took_s = monotonic() - healed
        run.note(f"{how}: slowest {slowest_s * 1000:.0f} ms, well {took_s:.2f} s after")
        assert took_s < RECOVERS_S * SLOWER

    await play(f"D4-{how}", cluster, slow, n=rounds(1, 20))


@large_only
async def test_d5_retry_storm_after_an_outage_calms_down(deploy: Deploy) -> None:
    """Ten times the callers all try again at once."""
    cluster: Cluster = await off(deploy)
    wire = cluster.gateway_wires[0]

    async def storm(run: Run) -> None:
        await run.warm()
        await run.more(300, least=299)
        before_ms = run.load.percentile_ms(99)
        wire.refuse()
        await off(wire.cut)
        async with asyncio.timeout(20):
            failed = run.load.failures.total()
            while run.load.failures.total() < failed + 1_000:  # noqa: ASYNC110  The load counts.
                await asyncio.sleep(0.02)
        wire.heal()
        healed = after = monotonic()
        while True:
            await run.more(300, least=299)
            now_ms, after = run.load.percentile_ms(99, after), monotonic()
            if now_ms < max(50.0, before_ms * SLOWER):
                break
            assert after < healed + CALM_S * SLOWER, f"p99 was {before_ms:.0f} ms and is {now_ms:.0f} ms"
        run.note(f"p99 {before_ms:.0f} ms before, {now_ms:.0f} ms again {after - healed:.1f} s after")

    await play("D5", cluster, storm, n=rounds(1, 20), callers=160, pace_s=0.2)


async def test_d6_database_away_under_full_load(deploy: Deploy) -> None:
    """Decisions go on; then the backlog drains at least at twice the rate of arrival. Ten minutes with N = 100."""
    cluster: Cluster = await off(deploy)
    away_s = 600.0 if rounds(0) >= 100 else 15.0 if rounds(0) else 2.0

    async def away(run: Run) -> None:
        await run.warm()
        await off(cluster.database.kill)
        began, before, failed = monotonic(), run.load.answered, run.load.failures.total()
        while monotonic() < began + away_s:
            await run.more(50)
        assert run.load.failures.total() == failed, run.load.failures
        await off(cluster.database.restart)
        backlog, arrival = run.load.answered - before, (run.load.answered - before) / (monotonic() - began)
        drain = await drained(run)
        run.note(f"{away_s:.0f} s away, backlog {backlog}, arrival {arrival:.0f}/s, drained {drain:.0f}/s")
        assert drain >= 2 * arrival

    await play("D6", cluster, away)


async def drained(run: Run) -> float:
    """Events a second that ledger_sync books, from when it books again until it has what was waiting."""
    dsn, query = run.cluster.database.dsn, "SELECT count(*) FROM usage_events"
    at_first = await witnesses.value(dsn, query)
    async with asyncio.timeout(120):
        while await witnesses.value(dsn, query) == at_first:  # noqa: ASYNC110  It is elsewhere.
            await asyncio.sleep(0.01)
        began = monotonic()
        wanted = {record.key for record in run.load.of(Outcome.OK)}
        names = [customer.id for customer in run.customers]
        while wanted - (await witnesses.read_books(dsn, names)).booked.keys():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return (await witnesses.value(dsn, query) - at_first) / max(monotonic() - began, 0.001)


@large_only
async def test_d8_connections_come_and_go(deploy: Deploy) -> None:
    """5,000 a minute: what they took is given back."""
    cluster: Cluster = await off(deploy)
    count = 400 if rounds(0) else 100

    async def churn(run: Run) -> None:
        await run.warm()
        before = descriptors(cluster.gateways[0])
        for _ in range(count // 20):
            await asyncio.gather(*[one_connection(run) for _ in range(20)])
        async with asyncio.timeout(20):
            while descriptors(cluster.gateways[0]) > before + 5:  # noqa: ASYNC110  It is elsewhere.
                await asyncio.sleep(0.05)
        run.note(f"{count} connections, descriptors {before} before, {descriptors(cluster.gateways[0])} after")

    await play("D8", cluster, churn, callers=4)


async def one_connection(run: Run) -> None:
    options = (*CHANNEL, ("grpc.channel_id", run.random.getrandbits(31)))
    async with grpc.aio.insecure_channel(run.cluster.gateway_address(0), options=options) as channel:
        await run.load.once(run.load.draw(customer=run.customers[0]), 10, EntitlementGatewayStub(channel))


def descriptors(program: Program) -> int:
    return len(list(Path(f"/proc/{program.pid}/fd").iterdir()))


async def test_f9_callers_who_give_up_at_any_moment(deploy: Deploy) -> None:
    """No answer goes to another, nothing is left open, and what they had asked for is charged once or not at all."""
    cluster: Cluster = await off(deploy)
    count = 5_000 if rounds(0) else 300

    async def cancelled(run: Run) -> None:
        await run.warm()
        before, ended = descriptors(cluster.gateways[0]), Counter[str]()

        async def give_up() -> None:
            call = asyncio.create_task(run.load.tell(run.load.draw(), 10))
            await asyncio.sleep(run.random.choice([0, run.random.uniform(0, 0.02)]))
            call.cancel()
            ended.update(
                [
                    "cancelled"
                    if (await asyncio.gather(call, return_exceptions=True))[0] is not grpc.StatusCode.OK
                    else "OK"
                ]
            )

        for _ in range(count // 20):
            await asyncio.gather(*[give_up() for _ in range(20)])
        assert ended["cancelled"] > count // 10, ended
        assert descriptors(cluster.gateways[0]) <= before + 5
        run.note(f"calls {dict(ended)}")

    await play("F9", cluster, cancelled)
