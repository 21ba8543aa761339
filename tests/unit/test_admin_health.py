"""Health of LedgerAdmin, which anybody may ask for: who watches holds up nobody."""

from __future__ import annotations

import asyncio
import os
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entitlement.access import Entry, as_file, make_token
from entitlement.doorkeeper import Doorkeeper
from entitlement.v1.ledger_pb2 import ListFeaturesResponse, ListRequest
from entitlement.v1.ledger_pb2_grpc import LedgerAdminServicer, LedgerAdminStub
from ledger_sync.admin_server import MAX_CALLS, AdminServer
from ledger_sync.health import MAX_WATCHERS
from ledger_sync.identity import Guard

CHANNEL = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
ALL = health_pb2.HealthCheckRequest()
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Empty(LedgerAdminServicer):
    async def ListFeatures(self, request: ListRequest, context: object) -> ListFeaturesResponse:
        return ListFeaturesResponse()


class Deaf:
    """Of one who does not read: a write to it never ends."""

    def __init__(self) -> None:
        self.written = asyncio.Event()

    async def write(self, message: object) -> None:
        self.written.set()
        await asyncio.Future()


async def test_one_who_watches_and_does_not_read_stops_nobody() -> None:
    server = AdminServer(Empty(), (), guard=Guard(Doorkeeper(dict, lambda: 0), "acme"), reflected=False)
    await server.serving(True)
    deaf = Deaf()
    watcher = asyncio.create_task(server._health.Watch(ALL, deaf))  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(20):
            await deaf.written.wait()
            await server.tell({"worker": False})
            await server.stop(0)
    finally:
        watcher.cancel()


async def test_who_only_watches_leaves_room_for_who_may_call() -> None:
    token, mark, digest = make_token(os.urandom)
    book = as_file([Entry(name="desk", tenant="acme", scopes=("read",), token=mark, sha256=digest)]).encode()
    guard = Guard(Doorkeeper(lambda: {"a": book}, lambda: time.time_ns() // 1_000_000), "acme")
    server = AdminServer(Empty(), ("127.0.0.1:0",), guard=guard, reflected=False)
    await server.start()
    (address,) = server.addresses
    async with (
        grpc.aio.insecure_channel(address, options=CHANNEL) as theirs,
        grpc.aio.insecure_channel(address, options=CHANNEL) as ours,
    ):
        watch = health_pb2_grpc.HealthStub(theirs).Watch
        watchers = [watch(ALL, timeout=20) for _ in range(MAX_WATCHERS)]
        assert [(await one.read()).status for one in watchers] == [NOT_SERVING] * MAX_WATCHERS
        for _ in range(MAX_CALLS - MAX_WATCHERS):
            with pytest.raises(grpc.aio.AioRpcError, match="64 watch already, the limit"):
                await watch(ALL, timeout=20).read()
        who = (("authorization", f"Bearer {token}"),)
        assert await LedgerAdminStub(ours).ListFeatures(ListRequest(), metadata=who, timeout=20) is not None
        watchers.pop().cancel()
        await server.serving(True)
        assert {(await one.read()).status for one in watchers} == {SERVING}  # All of them, also after one has gone.
        for one in watchers:
            one.cancel()
    await server.stop(0)
