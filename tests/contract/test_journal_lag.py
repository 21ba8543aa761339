"""How old the oldest record is that the ledger does not have."""

from __future__ import annotations

import redis

from entitlement import keys
from entitlement.journal import FIELD
from ledger_sync.journal_reader import JournalReader, Lag

QUIET_MS, NOW_MS = 1_000_000, 4_600_000  # an hour lies between them


async def test_after_a_quiet_hour_a_record_is_as_old_as_itself(valkey_url: str) -> None:
    reader = JournalReader.connect(valkey_url, [0, 1], "test")
    stream, other = keys.journal(0), keys.journal(1)
    try:
        with redis.Redis.from_url(valkey_url) as client:
            await reader.join()
            for name in (stream, other):
                client.xadd(name, {FIELD: b"x"}, id=f"{QUIET_MS}-0")
            entries, _ = await reader.new(0)
            assert await reader.lag() == Lag(2, QUIET_MS)  # Read, and not booked: it is that old.
            await reader.acknowledge({name: [at for at, _ in found] for name, found in entries.items()})
            assert await reader.lag() == Lag(0, 0)
            client.xadd(stream, {FIELD: b"x"}, id=f"{NOW_MS}-0")
            client.xadd(stream, {FIELD: b"x"}, id=f"{NOW_MS}-1")
            client.xadd(other, {FIELD: b"x"}, id=f"{NOW_MS + 1}-0")
            assert await reader.lag() == Lag(3, NOW_MS)
    finally:
        await reader.close()
