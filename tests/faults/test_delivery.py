"""Group C, as far as it concerns processes: repeated keys, lost memories, a publisher that is away, two of one kind."""

from __future__ import annotations

import asyncio
from time import monotonic

import grpc

from tests.faults.cluster import Cluster
from tests.faults.conftest import Deploy
from tests.faults.customers import PRICE
from tests.faults.load import Outcome, Record
from tests.faults.marks import CASE, large_only
from tests.faults.scenario import Run, off, play, rounds

pytestmark = CASE

AT_ONCE = 64
TAKES_OVER_S = 5.0
SLOWER = 3.0
RICH = 12  # the first customers have plenty


async def test_c2_one_key_asked_for_by_many_at_once_is_charged_once(deploy: Deploy) -> None:
    async def asked(run: Run) -> None:
        await run.warm()
        for number in range(10):
            record = run.load.draw(customer=run.customers[number])
            answers = await asyncio.gather(*[run.load.once(record, 10) for _ in range(AT_ONCE)])
            places = {
                (answer.verdict, answer.epoch, answer.sequence, answer.consumed[0].amount_nanos) for answer in answers
            }
            assert len(places) == 1
            assert sum(not answer.replayed for answer in answers) == 1
            await run.load.tell(record)

    await play("C2", await off(deploy), asked, n=rounds(1))


async def test_c3_one_key_with_another_payload_is_refused(deploy: Deploy) -> None:
    async def asked(run: Run) -> None:
        await run.warm()
        for number in range(20):
            record = run.load.draw(customer=run.customers[number % RICH])
            assert await run.load.tell(record) is grpc.StatusCode.OK
            other = Record(record.key, record.customer, record.feature, record.units + 1, 0)
            assert await run.load.tell(other) is grpc.StatusCode.ALREADY_EXISTS

    await play("C3", await off(deploy), asked, n=rounds(1))


async def test_c4_a_key_that_the_hot_store_has_forgotten_is_charged_once(deploy: Deploy) -> None:
    """The ledger knows it: the hot account gets back what it paid twice."""

    async def forgotten(run: Run) -> None:
        await run.warm()
        await run.more()
        await run.settled()
        known = [record for record in run.load.of(Outcome.OK) if record.feature == "calls"]
        with run.cluster.primary.client() as client:
            for key in list(client.scan_iter("i:*", count=1_000)):
                client.delete(key)
        asked = run.random.sample(known, min(20, len(known)))
        answers = await asyncio.gather(*[run.load.once(record, 10) for record in asked])
        assert any(not answer.replayed and answer.consumed for answer in answers)  # It was charged there again.

    await play("C4", await off(deploy), forgotten, n=rounds(1))


async def test_c7_publisher_away_and_back(deploy: Deploy) -> None:
    """The ledger goes on without it, and no event is missed."""
    cluster: Cluster = await off(deploy)
    aside = cluster.events.with_suffix(".aside")

    async def away(run: Run) -> None:
        await run.more()
        cluster.events.touch()
        cluster.events.rename(aside)
        cluster.events.mkdir()  # No file can be opened there.
        await run.more(200, least=100)
        await run.settled()
        cluster.events.rmdir()
        aside.rename(cluster.events)
        await run.more()

    await play("C7", cluster, away, n=rounds(1))


@large_only
async def test_c9_two_ledger_syncs_by_mistake(deploy: Deploy) -> None:
    """They share the work; when one dies, the other takes over its part."""
    cluster: Cluster = await off(deploy)

    async def doubled(run: Run) -> None:
        second = await off(cluster.second_sync)
        await run.more()
        await off(cluster.syncs[0].kill)
        await run.more(20)
        took_s = await run.settled(TAKES_OVER_S * SLOWER)
        run.note(f"taken over in {took_s:.1f} s")
        await off(cluster.syncs[0].restart)
        await run.more()
        await off(second.pause if run.random.random() < 0.5 else second.kill)
        await run.more(20)
        took_s = await run.settled(TAKES_OVER_S * SLOWER)
        run.note(f"and in {took_s:.1f} s")
        second.resume() if second.alive else None
        await off(cluster.end_second_sync)

    await play("C9", cluster, doubled, n=rounds(1, 20))


async def test_c10_ledger_changes_reach_the_hot_store_once_over_a_bad_wire(deploy: Deploy) -> None:
    """Each grant is there once, however often its change was sent, and in whatever state the wire was."""
    cluster: Cluster = await off(deploy)

    async def cut(run: Run) -> None:
        await run.warm()
        began = monotonic()
        for number in range(12):
            await run.grant(run.customers[number % 4], PRICE * run.random.randint(1, 9))
            wire = run.random.choice([cluster.sync_wire.towards, cluster.sync_wire.back])
            wire.slow(run.random.uniform(0, 40))
            wire.silent = run.random.random() < 0.3
            await run.more(20)
            cluster.sync_wire.heal()
            await off(cluster.sync_wire.cut)
        run.note(f"{number + 1} grants in {monotonic() - began:.1f} s")

    await play("C10", cluster, cut, n=rounds(1, 20))
