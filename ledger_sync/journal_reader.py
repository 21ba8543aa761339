"""The journal streams of some partitions, as a member of the ledger's consumer group reads them.

The read position is the group's, in the hot store: it shares the fate of the streams. What was read and not
acknowledged comes again. Nothing here is retried: Unavailable ends the reading; whoever starts it again reads what is
pending first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, Self, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from entitlement import keys
from entitlement.errors import Unavailable
from entitlement.journal import FIELD
from entitlement.opening import Opening
from entitlement.redis_address import Endpoint
from ledger_sync.posting import Arrival
from ledger_sync.redis_client import client_of, identify
from ledger_sync.redis_cluster import ClusterRedis

TIMEOUT_S: Final = 10.0  # of one exchange; longer than any read blocks
CONNECTIONS: Final = 32  # one reads, the others ask; beyond it they wait
FETCH: Final = 512  # entries in one reply, about: reading shall not hold up decisions
MAX_COUNT: Final = 256  # entries of one stream in one reply
CLAIM: Final = 1_000
ACKNOWLEDGE: Final = 1_000  # ids in one command
POLL_S: Final = 0.005  # between two looks at streams of a cluster, at first
POLL_MOST_S: Final = 0.05

Entries = dict[str, list[tuple[bytes, bytes | None]]]  # by stream: id and record, None for one that was trimmed
StreamId = tuple[int, int]
Value = bytes | bytearray | memoryview | str | int | float  # as the client library takes it
_Reply = list[tuple[bytes, list[tuple[bytes, list[bytes] | None]]]]


class Lag(msgspec.Struct, frozen=True):
    """Records in the journal that are not settled. `oldest_ms`: when the oldest was written, 0 = none."""

    records: int
    oldest_ms: int


class JournalReader:
    """Reads the streams of `partitions` under a stable consumer name. One caller at a time; others only ask."""

    def __init__(self, client: Redis, partitions: Sequence[int], consumer: str) -> None:
        self._client = client
        for command in ("XREADGROUP", "XAUTOCLAIM"):
            self._client.set_response_callback(command, _as_it_comes)
        self.partitions = tuple(partitions)
        self._streams = [keys.journal(partition) for partition in partitions]
        self._partition_of = dict(zip(self._streams, partitions, strict=True))
        self._consumer = consumer
        self._count = max(1, FETCH // len(self._streams))
        self._read = self._read_each if isinstance(client, ClusterRedis) else self._read_all

    @classmethod
    def connect(cls, where: Endpoint | str, partitions: Sequence[int], consumer: str) -> Self:
        """Connects when first used."""
        endpoint = Endpoint.parse(where) if isinstance(where, str) else where
        return cls(client_of(endpoint, connections=CONNECTIONS, timeout_s=TIMEOUT_S, protocol=2), partitions, consumer)

    async def close(self) -> None:
        await self._client.aclose()

    async def join(self, opening: Opening | None = None) -> None:
        """Makes streams and groups that do not exist, from the beginning, and takes over what other members left.

        The caller holds the lease: no other member is at work. Unavailable: the hot store is not that of `opening`.
        """
        async with _translated():
            if opening is not None and opening.number:
                found = await identify(self._client)
                if found.identity.run_id != opening.identity.run_id:
                    await self._client.connection_pool.disconnect(inuse_connections=False)
                    raise Unavailable("hot store: it is not the one that has been opened")
            await self._make_groups()
        for stream in self._streams:
            await self._take_over(stream)

    async def _make_groups(self) -> None:
        async with self._client.pipeline(transaction=False) as pipeline:
            for stream in self._streams:
                pipeline.xgroup_create(stream, keys.GROUP, id="0", mkstream=True)
            replies = await pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, Exception) and "BUSYGROUP" not in str(reply):
                raise reply

    async def _take_over(self, stream: str) -> None:
        start: str | bytes = "0-0"
        while True:
            async with _translated():
                reply = await self._command(
                    *("XAUTOCLAIM", stream, keys.GROUP, self._consumer, 0, start, "COUNT", CLAIM, "JUSTID")
                )
            start = cast("list[bytes]", reply)[0]
            if start == b"0-0":
                return

    async def pending(self) -> AsyncIterator[Entries]:
        """What was read and not acknowledged, from the beginning of each stream."""
        positions = dict.fromkeys(self._streams, b"0")
        while positions:
            async with _translated():
                entries = await self._read(positions, MAX_COUNT)
            if entries:
                yield entries
            positions = {stream: found[-1][0] for stream, found in entries.items()}

    async def new(self, block_ms: int) -> tuple[Entries, bool]:
        """Entries that nobody has read, and whether there are likely more. Waits up to `block_ms`, 0: not at all.

        Streams that have vanished are made anew.
        """
        count = self._count
        try:
            async with _translated():
                entries = await self._read(dict.fromkeys(self._streams, b">"), count, block_ms)
        except Unavailable as error:
            if "NOGROUP" not in str(error):
                raise
            await self.join()
            return {}, True
        # Few busy streams may fill a reply alone.
        self._count = min(MAX_COUNT, max(1, FETCH // max(1, len(entries))))
        return entries, any(len(found) >= count for found in entries.values())

    async def _read_all(self, positions: Mapping[str, bytes], count: int, block_ms: int = 0) -> Entries:
        words = self._reading(count)
        if block_ms:
            words += ["BLOCK", block_ms]
        reply = await self._command(*words, "STREAMS", *positions, *positions.values())
        return _entries(reply)

    async def _read_each(self, positions: Mapping[str, bytes], count: int, block_ms: int = 0) -> Entries:
        """Of a cluster nobody can read streams of several slots in one command, or wait for them: they are looked at
        again and again, all of one primary in one write. What was read counts, although another stream has vanished.
        """
        loop, pause_s = asyncio.get_running_loop(), POLL_S
        deadline = loop.time() + block_ms / 1000
        while True:
            async with self._client.pipeline(transaction=False) as pipeline:
                for stream, position in positions.items():
                    pipeline.execute_command(*self._reading(count), "STREAMS", stream, position)
                replies = await pipeline.execute(raise_on_error=False)
            entries = await self._whole(replies)
            if entries or loop.time() >= deadline:
                return entries
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_MOST_S)

    async def _whole(self, replies: Sequence[object]) -> Entries:
        """An error ends the reading: then all that was read comes again. Only a vanished stream is no reason to."""
        entries: Entries = {}
        vanished = False
        for reply in replies:
            if isinstance(reply, ResponseError) and "NOGROUP" in str(reply):
                vanished = True
            elif isinstance(reply, Exception):
                raise reply
            else:
                entries |= _entries(reply)
        if vanished:
            await self._make_groups()
        return entries

    def _reading(self, count: int) -> list[str | bytes | int]:
        return ["XREADGROUP", "GROUP", keys.GROUP, self._consumer, "COUNT", count]

    async def _command(self, *words: str | bytes | int) -> object:
        """The answer is not looked at by the client library: this is the hot path."""
        return await self._client.execute_command(*words)  # type: ignore[no-untyped-call]

    async def acknowledge(
        self, settled: Mapping[str, Sequence[bytes]], opening: int = 0, *, all_read: bool = False
    ) -> None:
        """Everything up to these entries is committed: acknowledges them, says so to the gateways, which drop their
        receipts then, and trims the streams. A trim goes by whole blocks and leaves the last entry.

        What the group has pending before them is neither told nor trimmed. `all_read`: nothing else may be pending; if
        something is, a read that was given up has run late, and Unavailable says that it has to be read anew.
        """
        async with _translated():
            pending = await self._acknowledge(settled)
            held = {stream: first for stream, first in pending.items() if first is not None}
            await self._tell(settled, held, opening)
        if held and all_read:
            raise Unavailable(f"hot store: {', '.join(sorted(held))} has entries that were delivered to nobody")

    async def tell_settled(self, opening: int) -> None:
        """Says to the gateways how far each stream is settled. Nothing that was read may be unsettled."""
        positions = await self._positions(self._streams)
        reached: dict[Value, Value] = {
            partition: f"{opening} {position.delivered[0]}-{position.delivered[1]}"
            for partition, position in zip(self.partitions, positions, strict=True)
            if position is not None and position.pending is None
        }
        if reached:
            async with _translated():
                await self._client.hset(keys.SETTLED, mapping=reached)

    async def _acknowledge(self, settled: Mapping[str, Sequence[bytes]]) -> dict[str, StreamId | None]:
        """What is pending in each stream then: its first id."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for stream, ids in settled.items():
                for first in range(0, len(ids), ACKNOWLEDGE):
                    pipeline.xack(stream, keys.GROUP, *ids[first : first + ACKNOWLEDGE])
            for stream in settled:
                pipeline.xpending(stream, keys.GROUP)
            replies = (await pipeline.execute())[-len(settled) :] if settled else []
        firsts = [reply["min"] for reply in replies]
        return {stream: parse_id(first) if first else None for stream, first in zip(settled, firsts, strict=True)}

    async def _tell(self, settled: Mapping[str, Sequence[bytes]], held: Mapping[str, StreamId], opening: int) -> None:
        reached: dict[Value, Value] = {}
        async with self._client.pipeline(transaction=False) as pipeline:
            for stream, ids in settled.items():
                last, first = parse_id(ids[-1]), held.get(stream)
                if first is not None and first <= last:
                    reached[self._partition_of[stream]] = f"{opening} {_text(_before(first))}"
                    pipeline.xtrim(stream, minid=_text(first), approximate=True)
                else:
                    reached[self._partition_of[stream]] = f"{opening} {_text(last)}"
                    pipeline.xtrim(stream, minid=ids[-1], approximate=True)
            if reached:
                pipeline.hset(keys.SETTLED, mapping=reached)
            await pipeline.execute()

    async def is_settled(self, stream: str, stream_id: StreamId) -> bool:
        """Whether every entry up to `stream_id` has been acknowledged, as the hot store knows it now."""
        (position,) = await self._positions([stream])
        return position is None or position.settled(stream_id)

    async def has_pending(self) -> bool:
        """Whether anything was read, by whomever, and is not acknowledged."""
        return any(position and position.pending for position in await self._positions(self._streams))

    async def lag(self) -> Lag:
        """What is in these streams and not settled."""
        positions = zip(self._streams, await self._positions(self._streams), strict=True)
        behind = {stream: position for stream, position in positions if position and position.unsettled}
        oldest = [position.pending for position in behind.values() if position.pending]
        oldest += await self._first_unread({s: p.delivered for s, p in behind.items() if not p.pending})
        return Lag(sum(position.unsettled for position in behind.values()), min(oldest, default=(0, 0))[0])

    async def _first_unread(self, delivered: Mapping[str, StreamId]) -> list[StreamId]:
        """Not the last that was read: after a quiet hour that is an hour older."""
        async with _translated(), self._client.pipeline(transaction=False) as pipeline:
            for stream, last in delivered.items():
                pipeline.xrange(stream, min=f"({_text(last)}", count=1)
            return [parse_id(entries[0][0]) for entries in await pipeline.execute() if entries]

    async def _positions(self, streams: Sequence[str]) -> list[_Position | None]:
        """None: the stream does not exist."""
        async with _translated():
            async with self._client.pipeline(transaction=True) as pipeline:
                for stream in streams:
                    pipeline.xinfo_stream(stream)
                    pipeline.xinfo_groups(stream)
                    pipeline.xpending(stream, keys.GROUP)
                replies = await pipeline.execute(raise_on_error=False)
            return [_position(*replies[first : first + 3]) for first in range(0, len(replies), 3)]


class _Position(msgspec.Struct, frozen=True):
    """Where the group stands in one stream."""

    last: StreamId  # that the stream has given
    delivered: StreamId  # the last entry that was read
    pending: StreamId | None  # the first that was read and is not acknowledged
    unsettled: int

    def settled(self, stream_id: StreamId) -> bool:
        """Also when the stream has begun anew since that id was given: then its entries are nowhere any more."""
        if self.last < stream_id:
            return True
        return self.delivered >= stream_id and (self.pending is None or self.pending > stream_id)


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield
    except TimeoutError:
        raise Unavailable(f"hot store: no answer within {TIMEOUT_S} s") from None
    except (RedisError, OSError, RuntimeError) as error:  # RuntimeError: uvloop's word for a closed transport.
        raise Unavailable(f"hot store: {type(error).__name__}: {error}") from error


def _position(info: object, groups: object, pending: object) -> _Position | None:
    if isinstance(info, ResponseError) and "no such key" in str(info):
        return None
    for reply in (info, groups):
        if isinstance(reply, Exception):
            raise reply
    assert isinstance(info, dict) and isinstance(groups, list)
    group = next((group for group in groups if group["name"] == keys.GROUP.encode()), None)
    if group is None:
        return _Position(parse_id(info["last-generated-id"]), (0, 0), None, info["length"])
    if isinstance(pending, Exception):
        raise pending
    assert isinstance(pending, dict)
    delivered, last = parse_id(group["last-delivered-id"]), parse_id(info["last-generated-id"])
    unread = group.get("lag") if last > delivered else 0
    if unread is None:  # Not known after deletions in the middle; then at most:
        unread = info["length"]
    first = pending["min"]
    return _Position(last, delivered, parse_id(first) if first else None, pending["pending"] + unread)


def _entries(reply: object) -> Entries:
    return {
        stream.decode(): [(entry_id, _record(fields)) for entry_id, fields in entries]
        for stream, entries in cast("_Reply | None", reply) or ()
        if entries
    }


def _as_it_comes(response: object, **_: object) -> object:
    return response


def parse_id(text: str | bytes) -> StreamId:
    """'milliseconds-number'"""
    if isinstance(text, bytes):
        text = text.decode("ascii")
    ms, _, number = text.partition("-")
    return int(ms), int(number or 0)


def _text(stream_id: StreamId) -> str:
    return f"{stream_id[0]}-{stream_id[1]}"


def _before(stream_id: StreamId) -> StreamId:
    """The id right before another one."""
    ms, number = stream_id
    return (ms, number - 1) if number else (ms - 1, 2**63 - 1)


def _record(fields: Sequence[bytes] | None) -> bytes | None:
    """The record of an entry; of one that has other fields, whatever it has, which no codec takes for a record."""
    if fields is None:
        return None
    if len(fields) >= 2 and fields[0] == FIELD:  # Fields after it are of a later version (docs/upgrades.md).
        return fields[1]
    return b"not a journal record: " + b" ".join(fields)


def arrivals(entries: Entries) -> list[Arrival]:
    """The entries that still have a record, in the order of each stream."""
    return [Arrival(stream, at, data) for stream, found in entries.items() for at, data in found if data is not None]
