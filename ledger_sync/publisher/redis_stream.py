"""Events into a Redis or Valkey stream: one entry an event, fields id, type, tenant, customer and body.

The stream is a window, not an archive: it keeps about the last `maxlen` entries (trimming is approximate: it may hold a
node more, never less), and a consumer that falls further behind than that reads the rest from the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Self
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from entitlement.redis_address import Endpoint
from ledger_sync.publisher.address import Address, BadPublisher
from ledger_sync.publisher.protocol import Outgoing, PublishFailed
from ledger_sync.redis_client import client_of

STREAM: Final = "entitlement:events"
MAXLEN: Final = 100_000
CONNECTIONS: Final = 4
MAXLEN_MAX: Final = 1_000_000_000
CHUNK: Final = 100  # Entries in one transaction: others on this server wait some 200 µs for it.


class RedisStreamPublisher:
    """Accepted is what the server has executed: as durable as its `appendfsync` makes it. With fsync=yes in the URL
    (Valkey, Redis 7.2 and later, with an append-only file) `publish` returns only when the events are on its disk.

    Entries are added in transactions of 100, one after the other: of each all entries are added, in order, or none.
    """

    def __init__(self, address: Address, deadline_ms: int, client: Redis | None = None) -> None:
        address.refuse_options_but("stream", "maxlen", "fsync", "db")
        self._address = address
        self._deadline_ms = deadline_ms
        self._stream = address.options.get("stream", STREAM)
        self._maxlen = address.integer("maxlen", MAXLEN, low=1, high=MAXLEN_MAX)
        self._fsync = address.choice("fsync", "no", "yes", "no") == "yes"
        self._client = client or _client(address, deadline_ms / 1000)
        if not self._stream:
            raise BadPublisher("option 'stream' is empty", f"the name of a stream, {STREAM} when left out")

    @classmethod
    def beside(cls, hot_store: Endpoint, deadline_ms: int) -> Self:
        """The default stream, in the hot store itself, whatever its shape."""
        client = client_of(hot_store, connections=CONNECTIONS, timeout_s=deadline_ms / 1000)
        return cls(Address("redis", (str(hot_store),), "", {}), deadline_ms, client)

    def __repr__(self) -> str:
        return f"RedisStreamPublisher({self._address}, stream={self._stream!r}, maxlen={self._maxlen})"

    async def start(self) -> None: ...

    async def publish(self, events: Sequence[Outgoing]) -> None:
        if not events:
            return
        try:
            async with asyncio.timeout(self._deadline_ms / 1000):
                for first in range(0, len(events), CHUNK):
                    await self._append(events[first : first + CHUNK])
                if self._fsync:
                    await self._wait_for_disk()
        except TimeoutError:
            raise PublishFailed(str(self._address), f"no answer within {self._deadline_ms} ms") from None
        except (RedisError, OSError) as error:
            raise PublishFailed(str(self._address), str(error)) from error

    async def _append(self, events: Sequence[Outgoing]) -> None:
        async with self._client.pipeline(transaction=True) as pipeline:
            for event in events:
                pipeline.xadd(
                    self._stream,
                    {
                        "id": event.id,
                        "type": event.type,
                        "tenant": event.tenant,
                        "customer": event.customer,
                        "body": event.body,
                    },
                    maxlen=self._maxlen,
                    approximate=True,
                )
            await pipeline.execute()

    async def _wait_for_disk(self) -> None:
        local, _ = await self._client.execute_command(  # type: ignore[no-untyped-call]
            "WAITAOF", 1, 0, self._deadline_ms
        )
        if local < 1:
            raise TimeoutError

    async def stop(self) -> None:
        await self._client.aclose()


def _client(address: Address, timeout_s: float) -> Redis:
    """No retries of its own: after a failure the caller publishes again, in order."""
    socket_path, host, port = _endpoint(address)
    return Redis(
        unix_socket_path=socket_path,
        host=host,
        port=port,
        ssl=address.scheme == "rediss",
        db=_database(address),
        username=address.username or None,
        password=address.password or None,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
    )


def _endpoint(address: Address) -> tuple[str | None, str, int]:
    if address.scheme == "unix":
        if address.hosts or not address.path.startswith("/"):
            raise BadPublisher("the socket is not given by an absolute path", "unix:///path/to/socket?stream=NAME")
        return address.path, "", 0
    if len(address.hosts) != 1:
        raise BadPublisher(f"{len(address.hosts)} hosts are given", "one: redis://host:port?stream=NAME")
    host = urlsplit(f"//{address.hosts[0]}")
    return None, host.hostname or "", host.port or 6379


def _database(address: Address) -> int:
    text = address.options.get("db", "")
    if address.scheme != "unix" and address.path not in ("", "/"):
        text = address.path.removeprefix("/")
    if text and not (text.isascii() and text.isdigit() and len(text) < 6):
        raise BadPublisher("the database is not a number", "redis://host:port/0 or unix:///socket?db=0")
    return int(text or 0)
