"""ledger_sync while it starts: what it logs of a database that is away, and what health says before its loops run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from entitlement.v1.ledger_pb2_grpc import LedgerAdminServicer
from ledger_sync import process
from ledger_sync.admin_server import AdminServer
from ledger_sync.identity import Guard
from ledger_sync.ledger import LedgerUnavailable
from ledger_sync.rereading import doorkeeper
from ledger_sync.settings import Settings


async def test_a_database_that_stays_away_is_told_of_when_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    whys: Iterator[str] = chain(repeat("refused", 50), repeat("starting", 50))
    there = object()

    async def open_(*_: object, **__: object) -> Any:
        if (why := next(whys, None)) is None:
            return there
        raise LedgerUnavailable(why)

    monkeypatch.setattr(process, "RETRY_S", 0)
    monkeypatch.setattr(process.Ledger, "open", open_)
    with capture_logs() as lines:
        assert await process.open_ledger(Settings()) is there  # type: ignore[comparison-overlap]
    assert [line["error"] for line in lines if line["event"] == "waiting_for_database"] == ["refused", "starting"]


async def test_and_is_told_of_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1_000, 4))  # seconds, at each look
    whys = iter(["refused"] * 10)

    async def open_(*_: object, **__: object) -> Any:
        if (why := next(whys, None)) is not None:
            raise LedgerUnavailable(why)

    monkeypatch.setattr(process, "RETRY_S", 0)
    monkeypatch.setattr(process, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(process.Ledger, "open", open_)
    with capture_logs() as lines:
        await process.open_ledger(Settings(start_ms=600_000))
    assert 2 <= len(lines) <= 10


async def test_health_says_not_serving_until_the_loops_run() -> None:
    nobody = Guard(doorkeeper(()), "default")
    server = AdminServer(LedgerAdminServicer(), ("127.0.0.1:0",), guard=nobody, reflected=False)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.addresses[0], options=(("grpc.enable_http_proxy", 0),)) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await server.tell({"drain": False, "outbox": True})
            await server.tell({"drain": True, "outbox": True})
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
    finally:
        await server.stop(0)
