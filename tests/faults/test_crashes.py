"""Group A: processes and servers are killed, all at once too, and end gently under load."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from time import monotonic

import grpc
import pytest

from tests.faults import witnesses
from tests.faults.cluster import Cluster
from tests.faults.conftest import Deploy
from tests.faults.customers import put_many
from tests.faults.marks import CASE, large_only
from tests.faults.processes import Program
from tests.faults.proxy import Wire
from tests.faults.scenario import Run, off, play, rounds
from tests.gateway_process import installed

pytestmark = CASE

SERVES_AGAIN_S = 3.0
REOPENS_S = 5.0
CONVERGES_S = 30.0
SLOWER = 3.0  # this machine has other things to do
IN_FLIGHT = 500
SMALLEST = 200  # bytes of a decision's command, at least


async def dies(program: Program) -> None:
    """Returns when the child has killed itself, the load going on meanwhile."""
    assert await off(program.exit_code) == -signal.SIGKILL


@pytest.mark.parametrize("transport", ["grpcio", pytest.param("envoy", marks=large_only)])
async def test_a1_gateway_killed_at_random_points(deploy: Deploy, transport: str) -> None:
    installed(transport)

    async def killed(run: Run) -> None:
        await run.more()
        began = monotonic()
        await off(run.cluster.gateways[0].restart)
        assert monotonic() - began < SERVES_AGAIN_S * SLOWER

    cluster = await off(lambda: deploy(transport=transport))
    await play("A1", cluster, killed, n=rounds(3, 300))


@pytest.mark.parametrize(
    "failpoint",
    [
        pytest.param("consume.after_reply", marks=large_only, id="a3"),
        pytest.param("receipts.before_sync", id="a2"),
        pytest.param("receipts.after_sync", id="a3-receipt"),
    ],
)
async def test_a2_a3_gateway_killed_between_decision_and_answer(deploy: Deploy, failpoint: str) -> None:
    """The caller does not know; asked again, the key has the first outcome, and is charged once."""

    async def killed(run: Run) -> None:
        gateway = run.cluster.gateways[0]
        await run.warm()
        await off(gateway.again, f"{failpoint}:{run.random.randint(1, 60)}")
        await dies(gateway)
        await off(gateway.again)
        await run.more(20)

    audit = await play(f"A2-A3-{failpoint}", await off(deploy), killed, n=rounds(1))
    assert audit.replayed > 0  # Somebody was charged and not told, at first.


@pytest.mark.parametrize("failpoint", ["settle.before_commit", "settle.after_commit", "publish.before_mark"])
async def test_a4_ledger_sync_killed_around_its_commits(deploy: Deploy, failpoint: str) -> None:
    """Nothing is booked twice; every event leaves at least once, as it was."""

    async def killed(run: Run) -> None:
        sync = run.cluster.syncs[0]
        await off(sync.again, f"{failpoint}:{run.random.randint(1, 12)}")
        await dies(sync)
        await off(sync.again)
        await run.more()

    audit = await play(f"A4-{failpoint}", await off(deploy), killed, n=rounds(1))
    assert failpoint != "publish.before_mark" or audit.republished > 0  # It was there, and it was taken twice.


async def test_a5_database_killed_mid_batch(deploy: Deploy) -> None:
    """Decisions do not need it."""

    async def killed(run: Run) -> None:
        await run.warm()
        await run.more()
        failed, before_ms = run.load.failures.total(), run.load.percentile_ms(99)
        began = monotonic()
        await off(run.cluster.database.kill)
        await run.more(300, least=200)
        assert run.load.failures.total() == failed, run.load.failures
        away_ms = run.load.percentile_ms(99, began)
        run.note(f"p99 {before_ms:.0f} ms, without a database {away_ms:.0f} ms")
        await off(run.cluster.database.restart)
        await run.more()

    await play("A5", await off(deploy), killed, n=rounds(1))


async def test_a6_hot_store_killed_and_started_with_its_file(deploy: Deploy) -> None:
    async def killed(run: Run) -> None:
        await run.more()
        await off(run.cluster.restart_hot)
        await run.answers_again()

    audit = await play("A6", await off(deploy), killed, n=rounds(2))
    assert audit.again_s < REOPENS_S * SLOWER


async def test_a7_everything_killed_at_once_and_started_in_any_order(deploy: Deploy) -> None:
    cluster: Cluster = await off(deploy)

    async def killed(run: Run) -> None:
        await run.more()
        children = [cluster.primary, cluster.database, *cluster.syncs, *cluster.gateways]
        run.random.shuffle(children)
        for child in children:
            await off(child.kill)
        run.random.shuffle(children)
        async with asyncio.TaskGroup() as group:  # Each is tried again until what it needs is there.
            for child in children:
                group.create_task(off(child.restart))
        await run.answers_again()
        await run.more()

    await play("A7", cluster, killed, n=rounds(1))


async def test_a8_hot_store_comes_back_empty(deploy: Deploy) -> None:
    """What was settled is built anew from the ledger, what was not is replayed, and no receipt is debited twice."""

    async def emptied(run: Run) -> None:
        await run.more()
        if run.random.random() < 0.5:  # Some receipts are not settled then.
            await off(run.cluster.syncs[0].pause)
            await run.more(60, least=30)
        await off(lambda: run.cluster.restart_hot(empty=True))
        await off(run.cluster.syncs[0].resume)
        await run.answers_again()
        await run.more()

    await play("A8", await off(deploy), emptied, n=rounds(1), wounds=True)


@large_only
async def test_a9_sigkill_right_after_sigterm_is_a_kill(deploy: Deploy) -> None:
    async def killed(run: Run) -> None:
        await run.more()
        run.cluster.gateways[0].terminate()
        await off(run.cluster.gateways[0].restart)  # Kills it first.
        await run.more(30)

    await play("A9-kill", await off(deploy), killed, n=rounds(1))


@large_only
async def test_a8_many_accounts_come_back_in_time(deploy: Deploy) -> None:
    """By themselves, in the background; 10,000 with N = 100."""
    count = 10_000 if rounds(0) >= 100 else 500

    async def emptied(run: Run) -> None:
        more = await off(put_many, run.cluster.admin_address(), run.random, count)
        run.customers += more
        names = [customer.id for customer in more]
        await run.load.ask_again([run.load.draw(customer=customer) for customer in more], CONVERGES_S)
        await off(lambda: run.cluster.restart_hot(empty=True))
        began = monotonic()
        with run.cluster.primary.client() as hot:
            async with asyncio.timeout(CONVERGES_S * SLOWER):
                while await off(witnesses.loaded, hot, names) < count:  # noqa: ASYNC110  It is elsewhere.
                    await asyncio.sleep(0.05)
        run.note(f"{count} accounts are back after {monotonic() - began:.1f} s")

    await play("A8-many", await off(deploy), emptied, wounds=True, pace_s=0.05)


async def test_a10_stopped_gateway_goes_on(deploy: Deploy) -> None:
    """A call that waited in a stopped process is decided once, whoever asked for it again meanwhile."""

    async def stopped(run: Run) -> None:
        await run.more()
        await off(run.cluster.gateways[0].pause)
        long = rounds(0) >= 100 and run.random.random() < 0.1
        await asyncio.sleep(run.random.uniform(0.5, 30 if long else 2))
        run.cluster.gateways[0].resume()
        await run.more(30)

    await play("A10", await off(deploy), stopped, n=rounds(1))


@large_only
async def test_a10_stopped_gateway_finds_another_hot_store(deploy: Deploy) -> None:
    """It looks who that is before it decides anything."""

    async def stopped(run: Run) -> None:
        await run.more(200, least=50)
        await off(run.cluster.gateways[0].pause)
        await off(run.cluster.fail_over)
        run.cluster.gateways[0].resume()
        await run.more(30)

    await play("A10-failover", await off(deploy), stopped, n=rounds(1), wounds=True)


@large_only
async def test_a9_sigterm_lets_what_is_in_flight_finish(deploy: Deploy) -> None:
    """500 calls that the gateway has taken are answered, though it has been told to end."""
    cluster: Cluster = await off(lambda: deploy(gateway={"REDIS_TIMEOUT_MS": "5000"}, replica=False))
    gateway, wire = cluster.gateways[0], cluster.gateway_wires[0]

    async def ended(run: Run) -> None:
        await run.warm()
        wire.back.paused = True  # All are in flight when it is told.
        before = wire.carried
        calls = [asyncio.create_task(run.load.tell(run.load.draw())) for _ in range(IN_FLIGHT)]
        await quiet(wire, before + IN_FLIGHT * SMALLEST)
        assert not [call for call in calls if call.done()]
        gateway.terminate()
        wire.heal()
        statuses = await asyncio.gather(*calls)
        assert await off(gateway.exit_code) == 0
        assert set(statuses) == {grpc.StatusCode.OK}, Counter(statuses)
        await off(gateway.restart)

    await play("A9", cluster, ended, n=rounds(1), callers=1, pace_s=0.2)


async def quiet(wire: Wire, least: int) -> None:
    """Returns when that much has gone into it, and nothing more comes."""
    seen = -1
    async with asyncio.timeout(20):
        while seen < least or wire.carried != seen:  # Another thread counts.
            seen = wire.carried
            await asyncio.sleep(0.1)
