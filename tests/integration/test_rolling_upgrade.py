"""N, N+1 and N again under load, one process after the other: no call fails, and all is booked once."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from entitlement import keys
from entitlement.rating import cost
from gateway.client import Client
from tests.next_version import COLUMN, FIELD
from tests.servers import DEADLINE_S, ServerProcess
from tests.stacks import CALLS, Site, put_catalogue, site

ROOT = Path(__file__).parents[2]
PARTITIONS = 4
MOST = 20_000  # calls of one caller, at most
GRANT = 10**15
TODAY, NEXT = ("-m",), ("-m", "tests.next_version")


class Deployment:
    """Two gateways and one ledger_sync, each of a version of its own."""

    def __init__(self, folder: Path, redis_url: str, dsn: str) -> None:
        self.gateways = [f"unix:{folder}/gateway-{number}.sock" for number in range(2)]
        self.admin = f"unix:{folder}/admin.sock"
        shared = {"REDIS_URL": redis_url, "PARTITIONS": PARTITIONS}
        self._environment: dict[str, dict[str, object]] = {
            f"gateway-{number}": shared
            | {
                "LISTEN": address,
                "RECEIPTS_DIR": f"{folder}/receipts-{number}",
                "TRANSPORT": "grpcio",
                "ANONYMOUS": "all",
            }
            for number, address in enumerate(self.gateways)
        }
        self._environment["sync"] = shared | {
            **{"LISTEN": self.admin, "DATABASE_URL": dsn, "PATROL_S": 0, "ANONYMOUS": "all"}
        }
        self._parts: dict[str, ServerProcess] = {}

    def roll(self, name: str, version: tuple[str, ...]) -> None:
        """Returns when the part of this version serves in place of what was there, which was ended in order."""
        if name in self._parts:
            self._parts[name].stop()
        program, prefix = ("ledger_sync", "SYNC") if name == "sync" else ("gateway", "GATEWAY")
        given = [f"ENTITLEMENT_{prefix}_{key}={value}" for key, value in self._environment[name].items()]
        argv = ["env", *given, sys.executable, *version, program]
        self._parts[name] = ServerProcess(argv, ready=r"ready \w+=(\S+)", cwd=ROOT)

    def stop(self) -> None:
        for part in self._parts.values():
            part.stop()


@pytest.fixture
def deployment(valkey_url: str, database_dsn: str, folders: Callable[[], Path]) -> Iterator[Deployment]:
    made = Deployment(folders(), valkey_url, database_dsn)
    try:
        for name in ("sync", "gateway-0", "gateway-1"):
            made.roll(name, TODAY)
        yield made
    finally:
        made.stop()


class Caller:
    """Asks one gateway, one call after the other, and keeps one stream open. None of that may fail."""

    def __init__(self, address: str, customer: str) -> None:
        self.customer = customer
        self.acknowledged: dict[str, int] = {}
        self.metered = 0
        self._address = address
        self._over = False
        self._news = asyncio.Event()

    async def run(self) -> None:
        async with Client(self._address, timeout_ms=int(DEADLINE_S * 1000)) as client:
            meter = await client.open_meter(self.customer, "calls", 1_000_000)
            assert meter.allowed, meter.reason
            for number in itertools.count():
                key = f"{self.customer}-{number}"
                decision = await client.check_and_consume(self.customer, "calls", 1, key=key)
                assert decision.allowed, decision
                self.acknowledged[key] = decision.consumed[0].amount_nanos
                meter.use("calls", 1)
                self.metered += 1
                self._news.set()
                if self._over or number >= MOST:
                    break
            await meter.end()

    async def goes_on(self, more: int = 20) -> None:
        wanted = len(self.acknowledged) + more
        while len(self.acknowledged) < wanted:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), DEADLINE_S)

    def end(self) -> None:
        self._over = True


async def fields_of(redis_url: str, customer: str) -> set[bytes]:
    """Of the newest entries of the customer's journal."""
    async with Redis.from_url(redis_url) as client:
        stream = keys.journal(keys.partition_of("default", customer, PARTITIONS))
        entries: list[Any] = await client.xrevrange(stream, count=3)
    return {name for _, fields in entries for name in fields}


async def test_every_process_is_replaced_under_load_and_back(
    deployment: Deployment, valkey_url: str, database_dsn: str, folders: Callable[[], Path]
) -> None:
    stack: Any = SimpleNamespace(
        gateway=deployment.gateways[0],
        admin=deployment.admin,
        redis_url=valkey_url,
        database_url=database_dsn,
        data=folders(),
    )
    put_catalogue(stack)
    async with site(stack) as at:
        callers = [Caller(address, await at.customer(GRANT)) for address in deployment.gateways]
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(caller.run())
            for version in (NEXT, TODAY):
                for name in ("gateway-0", "sync", "gateway-1"):
                    await asyncio.to_thread(deployment.roll, name, version)
                    for caller in callers:
                        await caller.goes_on()
                told = await fields_of(valkey_url, callers[0].customer)
                assert (FIELD in told) is (version is NEXT), told
            for caller in callers:
                caller.end()
        for caller in callers:
            await all_booked(at, caller)
        await at.verified()
    assert await has_column(database_dsn)


async def all_booked(at: Site, caller: Caller) -> None:
    """Once each, as it was answered; what was metered for the sum of its price."""
    await at.verified(caller.customer)
    booked = await at.booked(caller.customer)
    assert {key: booked.pop(key, None) for key in caller.acknowledged} == caller.acknowledged
    total = cost(CALLS, len(caller.acknowledged) + caller.metered)
    assert sum(booked.values()) + sum(caller.acknowledged.values()) == total


async def has_column(dsn: str) -> bool:
    """Whether the migration of the next version is there: the program of today went on with it."""
    connection = await asyncpg.connect(dsn, timeout=DEADLINE_S)
    try:
        query = "SELECT EXISTS (SELECT 1 FROM information_schema.columns WHERE column_name = $1)"
        return bool(await connection.fetchval(query, COLUMN))
    finally:
        await connection.close()
