"""Leases on a real PostgreSQL: a session that falls silent loses what it holds, one that is kept does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from ledger_sync import changes
from ledger_sync.lease import IDLE_S
from ledger_sync.ledger import SILENT_MS, Lease, Ledger, LedgerUnavailable, Presence
from tests.journal_records import TENANT, open_account

DEADLINE_S = 10.0


@pytest.fixture
async def ledger(database_dsn: str) -> AsyncIterator[Ledger]:
    opened = await Ledger.open(database_dsn)
    yield opened
    await opened.close()


async def test_a_session_that_is_silent_is_ended_and_another_has_its_lease(ledger: Ledger) -> None:
    async with ledger._session("it", Lease) as silent:
        assert await silent.take()
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(IDLE_S + 1), ledger.lease("it"):
            assert not silent.held  # It knew no later than the other.
        assert asyncio.get_running_loop().time() - began > IDLE_S - 1
        async with asyncio.timeout(DEADLINE_S):
            await silent.lost.wait()


async def test_one_that_is_kept_keeps_it(ledger: Ledger) -> None:
    async with ledger.lease("it") as kept, ledger.presence("it") as present:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(IDLE_S + 1.5), ledger.lease("it"):
                raise AssertionError("two have it")
        assert kept.held and await present.count() == 1


async def test_one_that_waits_says_so_all_the_while(ledger: Ledger) -> None:
    waited = asyncio.Event()
    async with ledger.lease("it"):
        task = asyncio.create_task(_hold(ledger, waited))
        async with asyncio.timeout(DEADLINE_S):
            await waited.wait()
    async with asyncio.timeout(DEADLINE_S):
        await task


async def _hold(ledger: Ledger, waited: asyncio.Event) -> None:
    async with ledger.lease("it", waited.set):
        pass


async def test_who_is_silent_is_not_there(ledger: Ledger) -> None:
    async with ledger.presence("them") as present, ledger._session("them", Presence) as silent:
        await silent.take()
        assert await present.count() == 2
        async with asyncio.timeout(DEADLINE_S):
            await silent.lost.wait()
        assert await present.count() == 1
        with pytest.raises(LedgerUnavailable, match="them"):
            await silent.count()


async def test_whoever_stops_in_the_middle_of_a_change_gives_the_account_up(ledger: Ledger) -> None:
    async with ledger.transaction() as connection:
        await open_account(connection)
    with pytest.raises(LedgerUnavailable):
        async with ledger.transaction() as stopped, ledger.presence("them") as present:
            await changes.lock(stopped, TENANT, "ada")
            waiting = asyncio.create_task(_lock(ledger))
            async with asyncio.timeout(DEADLINE_S):
                while not await present.end_silent():
                    assert not waiting.done()
                await waiting


async def test_who_stands_in_nobodys_way_may_take_its_time(ledger: Ledger) -> None:
    async with ledger.transaction() as connection:
        await open_account(connection)
    async with ledger.transaction() as slow, ledger.presence("them") as present:
        await changes.lock(slow, TENANT, "ada")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENT_MS / 1000 + 0.5):
                while not await present.end_silent():  # noqa: ASYNC110
                    await asyncio.sleep(0.1)


async def _lock(ledger: Ledger) -> None:
    async with ledger.transaction() as connection:
        assert (await changes.lock(connection, TENANT, "ada")).customer == "ada"
