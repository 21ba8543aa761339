"""The gateway's health may be watched by anybody, who cannot take all calls by it."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import grpc
import pytest
from grpc_health.v1 import health_pb2

from gateway.lasting import Lasting
from gateway.transport import health
from gateway.transport.asgi import MAX_CALLS
from gateway.transport.health import Health


class RefusedError(Exception):
    pass


class Watcher:
    def __init__(self) -> None:
        self.told = asyncio.Event()

    async def write(self, message: object) -> None:
        self.told.set()

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise RefusedError(code.name, details)


async def test_watchers_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert health.MAX_WATCHERS < MAX_CALLS
    monkeypatch.setattr(health, "MAX_WATCHERS", 2)
    made, asked = Health(Lasting()), health_pb2.HealthCheckRequest()
    watchers = [Watcher() for _ in range(3)]
    tasks = [asyncio.create_task(made.Watch(asked, one)) for one in watchers[:2]]  # type: ignore[arg-type]
    async with asyncio.timeout(20):
        for one in watchers[:2]:
            await one.told.wait()
        with pytest.raises(RefusedError, match=r"RESOURCE_EXHAUSTED.*2 watch already"):
            await made.Watch(asked, watchers[2])  # type: ignore[arg-type]
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        again = asyncio.create_task(made.Watch(asked, watchers[2]))  # type: ignore[arg-type]
        await watchers[2].told.wait()
    for task in (tasks[1], again):
        task.cancel()
