"""A clock that a test moves: the hot store's scripts and the ledger read it instead of their servers' own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

import pytest
from redis.asyncio import Redis

from entitlement import lua
from ledger_sync import lua as own
from ledger_sync.hot_store import HotStore
from tests.control_rig import Rig, rig

KEY = "test:now"
_TIME = "redis.call('TIME')"
_NOW = (
    f"(function() local ms = redis.call('GET', '{KEY}')"
    " return {string.format('%d', math.floor(ms / 1000)), string.format('%d', ms % 1000 * 1000)} end)()"
)


class Clock:
    """Milliseconds since 1970, for the hot store and the ledger of one rig."""

    def __init__(self, redis: Redis, made: Rig) -> None:
        self._redis = redis
        self._rig = made
        self.now_ms = 0

    async def set(self, now_ms: int) -> None:
        """Moves both clocks, then lets the sweeper look at what is due."""
        assert now_ms >= self.now_ms, "time goes on"
        self.now_ms = now_ms
        await self._redis.set(KEY, now_ms)
        await self._rig.execute("UPDATE test_clock SET now_ms = $1", now_ms)
        self._rig.control.sweeper.wake()

    async def advance(self, ms: int) -> None:
        await self.set(self.now_ms + ms)


@asynccontextmanager
async def clocked_rig(
    monkeypatch: pytest.MonkeyPatch, valkey_url: str, dsn: str, start_ms: int
) -> AsyncIterator[tuple[Rig, Clock]]:
    """A control plane whose time stands still at `start_ms` until it is moved."""
    patch_scripts(monkeypatch)
    redis = Redis.from_url(valkey_url, protocol=2)
    await redis.set(KEY, start_ms)

    async def now_ms(_: HotStore) -> int:
        return int(await redis.get(KEY))

    monkeypatch.setattr(HotStore, "now_ms", now_ms)
    try:
        async with rig(valkey_url, dsn) as made:
            await made.execute("CREATE TABLE test_clock (now_ms bigint NOT NULL)")
            await made.execute("INSERT INTO test_clock VALUES ($1)", start_ms)
            await made.execute(
                """CREATE OR REPLACE FUNCTION ledger_now_ms() RETURNS bigint LANGUAGE sql VOLATILE AS
                   $$ SELECT now_ms FROM test_clock $$"""
            )
            clock = Clock(redis, made)
            clock.now_ms = start_ms
            yield made, clock
    finally:
        await redis.aclose()


def patch_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts with another clock in them; everything else is theirs."""
    shared, local = lua.script, own.script

    @cache
    def script(name: str) -> str:
        return shared(name).replace(_TIME, _NOW)

    @cache
    def own_script(name: str) -> str:
        return local(name).replace(_TIME, _NOW)

    assert _TIME in shared("consume") and _TIME in shared("apply_delta") and _TIME in local("until")
    own.install.cache_clear()
    monkeypatch.setattr(lua, "script", script)
    monkeypatch.setattr(own, "script", own_script)
    monkeypatch.setattr(own, "install", cache(lambda: own_script("until") + script("install")))
