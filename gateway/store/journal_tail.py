"""Follows the journal from outside: reads its streams, writes nothing, holds nothing up.

The journal is no archive: an entry goes soon after the ledger has it. Who reads too slowly misses entries; `missed`
counts them by the sequences of accounts, which have no gaps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final, Self

import msgspec

from entitlement import keys
from entitlement.errors import CorruptRecord, InvalidArgument
from entitlement.journal import FIELD, Record, decode
from entitlement.redis_address import Endpoint
from gateway.store.cluster import ClusterLink
from gateway.store.connection import Reply, StoreError, pack
from gateway.store.link import Link, reach

TIMEOUT_MS: Final = 5_000
MAX_ACCOUNTS: Final = 50_000  # whose place is remembered; then all are forgotten
LOOK_S: Final = 0.05  # between two looks at a cluster
COUNT: Final = 64  # entries of one stream in one reply, so that reading does not hold up decisions


class Seen(msgspec.Struct, frozen=True):
    """A record, and when the hot store wrote it."""

    at_ms: int
    record: Record


class JournalTail:
    """Owns its link. Every method raises Unavailable when the store does not answer."""

    def __init__(self, link: Link, partitions: int) -> None:
        self._link = link
        self._read = self._read_each if isinstance(link, ClusterLink) else self._read_all
        self._position = {keys.journal(partition): "0-0" for partition in range(partitions)}
        self._places: dict[tuple[str, str], tuple[int, int]] = {}  # epoch and sequence last seen, by account
        self.missed = 0
        self.corrupt = 0

    @classmethod
    async def connect(cls, endpoint: Endpoint, partitions: int) -> Self:
        return cls(await reach(endpoint, TIMEOUT_MS), partitions)

    def close(self) -> None:
        """May be called twice."""
        self._link.close()

    async def begin(self, since_ms: int = 0) -> None:
        """From now on; with `since_ms`, from what of that time is still there."""
        for stream, facts in zip(self._position, await self._facts(), strict=True):
            if since_ms:
                self._position[stream] = f"{since_ms - 1}-{2**63}"
            else:
                self._position[stream] = facts.get("last-generated-id", "0-0")

    async def now_ms(self) -> int:
        """The clock that the entries are dated by."""
        reply = await self._link.nodes[0].call(pack("TIME"))
        assert isinstance(reply, list)
        return int(_text(reply[0])) * 1000 + int(_text(reply[1])) // 1000

    async def next(self, wait_ms: int) -> list[Seen]:
        """What came, in the order of its time as far as one reply shows it; nothing when `wait_ms` are over."""
        assert 0 < wait_ms < TIMEOUT_MS
        try:
            replies = await self._read(wait_ms)
        except StoreError as error:
            raise InvalidArgument("hot store", f"the journal cannot be read: {error}") from None
        found = [seen for reply in replies for seen in self._seen(reply)]
        return sorted(found, key=lambda seen: seen.at_ms)

    async def _read_all(self, wait_ms: int) -> list[Reply]:
        places = (*self._position, *self._position.values())
        return [await self._link.call(pack("XREAD", "COUNT", COUNT, "BLOCK", wait_ms, "STREAMS", *places))]

    async def _read_each(self, wait_ms: int) -> list[Reply]:
        """Streams of several slots cannot be waited for together: they are looked at again and again."""
        deadline = asyncio.get_running_loop().time() + wait_ms / 1000
        while True:
            commands = [pack("XREAD", "COUNT", COUNT, "STREAMS", *place) for place in self._position.items()]
            replies = await self._link.call_many(commands)
            for reply in replies:
                if isinstance(reply, StoreError):
                    raise reply
            if any(replies) or asyncio.get_running_loop().time() > deadline:
                return [reply for reply in replies if not isinstance(reply, StoreError)]
            await asyncio.sleep(LOOK_S)

    async def _facts(self) -> list[dict[str, str]]:
        """XINFO STREAM of each; empty for one that does not exist."""
        replies = await self._link.call_many([pack("XINFO", "STREAM", stream) for stream in self._position])
        return [_pairs(reply) for reply in replies]

    def _seen(self, reply: Reply) -> Iterator[Seen]:
        for stream, entries in _streams(reply):
            for entry_id, data in entries:
                self._position[stream] = entry_id
                try:
                    record = decode(data)
                except CorruptRecord:
                    self.corrupt += 1  # Its place is the quarantine, which tells more.
                    continue
                self._count_missed(record)
                yield Seen(int(entry_id.partition("-")[0]), record)

    def _count_missed(self, record: Record) -> None:
        name = (record.tenant, record.customer)
        epoch, sequence = self._places.get(name, (0, 0))
        if epoch == record.epoch:
            self.missed += max(0, record.sequence - sequence - 1)
        if len(self._places) >= MAX_ACCOUNTS:
            self._places.clear()
        self._places[name] = (record.epoch, record.sequence)


def _streams(reply: Reply) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    if not isinstance(reply, list):
        return
    for item in reply:
        assert isinstance(item, list) and isinstance(item[1], list)
        yield _text(item[0]), [_entry(entry) for entry in item[1]]


def _entry(entry: Reply) -> tuple[str, bytes]:
    assert isinstance(entry, list)
    fields = entry[1] if isinstance(entry[1], list) else []
    data = fields[1] if len(fields) >= 2 and fields[0] == FIELD else b""
    assert isinstance(data, bytes)
    return _text(entry[0]), data


def _pairs(reply: Reply | StoreError) -> dict[str, str]:
    if not isinstance(reply, list):
        return {}
    return {_text(name): _text(value) for name, value in zip(reply[::2], reply[1::2], strict=True)}


def _text(reply: Reply) -> str:
    return reply.decode(errors="replace") if isinstance(reply, bytes) else str(reply)
