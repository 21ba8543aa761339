"""Every loop of ledger_sync shows that it goes round, also while it waits; a part that hangs is started again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from random import Random

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from standardwebhooks import Webhook

from entitlement.v1.ledger_pb2_grpc import LedgerAdminServicer
from ledger_sync.admin_server import AdminServer
from ledger_sync.beat import Beat
from ledger_sync.control import ControlPlane
from ledger_sync.drain import Drain
from ledger_sync.hot_store import HotStore
from ledger_sync.identity import Guard
from ledger_sync.journal_reader import JournalReader
from ledger_sync.ledger import Ledger
from ledger_sync.outbox import Outbox
from ledger_sync.patrol import Patrol
from ledger_sync.publisher import Discard
from ledger_sync.rereading import doorkeeper
from ledger_sync.telemetry import Figures
from ledger_sync.webhooks import Target, Webhooks
from ledger_sync.worker import Loop, Worker
from tests.control_rig import TENANT, end, eventually

PARTITIONS = 4
DEADLINE_S = 30.0


class Sync:
    """All loops of one ledger_sync, in this process."""

    def __init__(self, valkey_url: str, ledger: Ledger) -> None:
        self.registry = CollectorRegistry()
        figures, random = Figures(self.registry), Random(1)
        self.readers = [JournalReader.connect(valkey_url, [lane, lane + 2], "one") for lane in range(2)]
        self.hot = HotStore.connect(valkey_url, PARTITIONS)
        self.drain = Drain(ledger, self.readers, figures=figures, on_commit=lambda _: None)
        self.control = ControlPlane(ledger, self.hot, self.drain.settled, TENANT)
        self.control.patrol = Patrol(ledger, self.control.reconciler, TENANT, figures=figures, round_s=3_600)
        target = Target(httpx.URL("http://127.0.0.1:9/"), Webhook(b"s" * 24), (), 1.0)
        self.loops: Mapping[str, Loop] = {
            "drain": self.drain,
            "outbox": Outbox(ledger, Discard(), figures=figures, random=random),
            "control": self.control,
            "webhooks": Webhooks(ledger, target, figures=figures, random=random),
        }
        self.worker = Worker(self.loops, figures=figures, random=random)

    @property
    def beats(self) -> dict[str, Beat]:
        return {
            f"{name}.{part}" if part else name: beat
            for name, loop in self.loops.items()
            for part, beat in loop.beats.items()
        }

    def figure(self, name: str, loop: str) -> float | None:
        return self.registry.get_sample_value(f"entitlement_sync_loop_{name}", {"loop": loop})

    async def close(self) -> None:
        await self.hot.close()
        for reader in self.readers:
            await reader.close()


@asynccontextmanager
async def running(sync: Sync) -> AsyncIterator[None]:
    task = asyncio.create_task(sync.worker.run())
    try:
        yield
    finally:
        await end(task)


@pytest.fixture
async def ledger(database_dsn: str) -> AsyncIterator[Ledger]:
    opened = await Ledger.open(database_dsn, connections=16)
    yield opened
    await opened.close()


@pytest.fixture
async def both(valkey_url: str, ledger: Ledger) -> AsyncIterator[tuple[Sync, Sync]]:
    made = Sync(valkey_url, ledger), Sync(valkey_url, ledger)
    yield made
    for sync in made:
        await sync.close()


async def go_round(beats: Iterable[Beat], times: int = 4) -> None:
    """Returns once each has gone round that often from now."""
    wanted = [(beat, beat.rounds + times) for beat in beats]

    async def gone() -> bool:
        return all(beat.rounds >= rounds for beat, rounds in wanted)

    await eventually(gone)


async def holds(what: Callable[[], bool]) -> None:
    async def now() -> bool:
        return what()

    await eventually(now)


async def test_every_loop_goes_round_when_there_is_nothing_to_do(both: tuple[Sync, Sync]) -> None:
    sync, _ = both
    async with running(sync):
        await holds(lambda: all(beat.running for beat in sync.beats.values()))
        await go_round(beat for name, beat in sync.beats.items() if name not in ("drain.lag", "webhooks.count"))
        await go_round((sync.beats["drain.lag"], sync.beats["webhooks.count"]), 1)
        told = {
            sample.labels["loop"]: sample.value
            for metric in sync.registry.collect()
            for sample in metric.samples
            if sample.name == "entitlement_sync_loop_healthy"
        }
    assert told == dict.fromkeys(sync.beats, 1.0)
    assert {health.restarts for health in sync.worker.health.values()} == {0}
    assert not any(beat.running for beat in sync.beats.values())


async def test_who_waits_for_the_leases_goes_round(both: tuple[Sync, Sync]) -> None:
    first, second = both
    async with running(first):
        await holds(lambda: all(beat.running for beat in first.beats.values()))
        async with running(second):
            await go_round(second.beats[name] for name in ("drain", "outbox", "control", "webhooks"))
            running_parts = {name for name, beat in second.beats.items() if beat.running}
            assert not running_parts & {"control.sweeper", "control.patrol", "webhooks.count"}


class Stuck:
    """A chore that hangs, once: something that never answers and has no deadline."""

    def __init__(self) -> None:
        self.tended = 0
        self.hanging = asyncio.Event()

    async def tend(self, now_ms: int) -> bool:
        self.tended += 1
        if self.tended == 2:
            self.hanging.set()
            await asyncio.Event().wait()
        return False


async def test_a_chore_that_hangs_is_noticed_and_its_loops_start_again(both: tuple[Sync, Sync]) -> None:
    sync, _ = both
    stuck = Stuck()
    sync.control.sweeper._chores = {"stuck": stuck}
    sync.control.sweeper.beat.deadline_s = 1.0
    async with running(sync), asyncio.timeout(DEADLINE_S):
        await stuck.hanging.wait()
        await holds(lambda: stuck.tended > 3)
        health = sync.worker.health["control"]
        assert (health.restarts, health.error) == (1, "control.sweeper hung: it was cancelled")
        assert sync.figure("hangs_total", "control.sweeper") == 1
        assert sync.worker.health["drain"].restarts == 0


async def test_a_lane_whose_hot_store_never_answers_is_noticed(
    both: tuple[Sync, Sync], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, _ = both
    hung, silent = asyncio.Event(), True

    async def new(reader: JournalReader, block_ms: int) -> object:
        if silent and reader is sync.readers[1]:
            hung.set()
            try:
                await asyncio.Event().wait()
            finally:  # It was noticed. A busy machine may take longer than this second for the next rounds.
                sync.beats["drain.lane1"].deadline_s = 60.0
        return await answered(reader, block_ms)

    answered = JournalReader.new
    monkeypatch.setattr(JournalReader, "new", new)
    monkeypatch.setattr("ledger_sync.worker.FINISH_S", 0.5)
    sync.beats["drain.lane1"].deadline_s = 1.0
    async with running(sync), asyncio.timeout(DEADLINE_S):
        await hung.wait()
        silent = False
        await holds(lambda: sync.worker.health["drain"].restarts == 1)
        assert sync.figure("hangs_total", "drain.lane1") == 1
        await go_round([sync.beats["drain.lane0"], sync.beats["drain.lane1"]])
        assert sync.worker.health["drain"].restarts == 1 and sync.drain.serving == (0, 1)


async def test_the_health_service_tells_which_loop_it_is() -> None:
    nobody = Guard(doorkeeper(()), "default")
    server = AdminServer(LedgerAdminServicer(), ("127.0.0.1:0",), guard=nobody, reflected=False)
    await server.start()
    try:
        async with (
            grpc.aio.insecure_channel(server.addresses[0], options=[("grpc.enable_http_proxy", 0)]) as channel,
            asyncio.timeout(DEADLINE_S),
        ):
            stub = health_pb2_grpc.HealthStub(channel)

            async def told(service: str) -> bool:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            services = ("", "entitlement.v1.LedgerAdmin", "loop/drain", "loop/control")
            await server.tell({"drain": True, "control": False})
            assert [await told(service) for service in services] == [False, False, True, False]
            await server.tell({"drain": True, "control": True})
            assert [await told(service) for service in services] == [True] * 4
    finally:
        await server.stop(0)
