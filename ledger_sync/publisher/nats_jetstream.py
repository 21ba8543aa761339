"""Events into a NATS JetStream stream, on the subjects `<prefix>.<tenant>.<type>`. Each carries a `Nats-Msg-Id`, so
that the server drops repeats within the stream's duplicate window.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final
from urllib.parse import quote

import nats.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import RetentionPolicy, StorageType
from nats.js.errors import BadRequestError, NotFoundError

from ledger_sync.publisher.address import Address, BadPublisher
from ledger_sync.publisher.protocol import Outgoing, PublishFailed

URL: Final = "nats://host:port/subject_prefix?stream=NAME"
STREAM: Final = "ENTITLEMENT"
IN_FLIGHT: Final = 256
DUPLICATE_WINDOW_S: Final = 600.0
MAX_AGE_S: Final = 7 * 24 * 3600.0
CLOSE_S: Final = 1.0
log = logging.getLogger(__name__)

REFUSALS: Final = (nats.errors.Error, OSError, TimeoutError)

Lane = list[Outgoing]


class NatsJetStreamPublisher:
    """Accepted is what the stream has acknowledged: stored, on a majority of its replicas.

    Customers go out side by side, at most 256 events in flight; of one customer an event leaves when the one before it
    is acknowledged, because a refused event could not call back those sent behind it. A stream that does not exist is
    created: file storage, seven days, a duplicate window of ten minutes. One that exists is used as it is.
    """

    def __init__(self, address: Address, deadline_ms: int) -> None:
        address.refuse_options_but("stream")
        self._prefix = address.path.removeprefix("/")
        self._stream = address.options.get("stream", STREAM)
        if not address.hosts:
            raise BadPublisher("no host", URL)
        if not self._prefix or not all(map(_is_token, self._prefix.split("."))):
            raise BadPublisher("the subject prefix is missing or malformed", URL)
        if not _is_token(self._stream) or "." in self._stream:
            raise BadPublisher("option 'stream' is malformed", URL)
        self._address = address
        self._deadline_ms = deadline_ms
        self._connection: Client | None = None
        self._in_flight = asyncio.Semaphore(IN_FLIGHT)

    def __repr__(self) -> str:
        return f"NatsJetStreamPublisher({self._address}, stream={self._stream!r})"

    async def start(self) -> None: ...

    async def publish(self, events: Sequence[Outgoing]) -> None:
        if not events:
            return
        try:
            async with AsyncExitStack() as unless_accepted, asyncio.timeout(self._deadline_ms / 1000):
                # What is still buffered must not leave later, behind its repetition.
                unless_accepted.push_async_callback(self.stop)
                await self._publish_lanes(_lanes(events))
                unless_accepted.pop_all()
        except REFUSALS as error:
            raise self._failed(error) from error
        except ExceptionGroup as group:
            if group.split(REFUSALS)[1] is not None:
                raise
            raise self._failed(group.exceptions[0]) from group

    async def stop(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            try:
                await asyncio.wait_for(connection.close(), CLOSE_S)
            except (nats.errors.Error, OSError, TimeoutError) as error:
                log.warning("closing the connection to %s: %s", self._address, error)

    async def _publish_lanes(self, lanes: Sequence[Lane]) -> None:
        jetstream = await self._connected()
        async with asyncio.TaskGroup() as tasks:
            for lane in lanes:
                tasks.create_task(self._publish_lane(jetstream, lane))

    async def _publish_lane(self, jetstream: JetStreamContext, lane: Lane) -> None:
        for event in lane:
            async with self._in_flight:
                await jetstream.publish(
                    f"{self._prefix}.{_token(event.tenant)}.{event.type}",
                    event.body,
                    timeout=self._deadline_ms / 1000,
                    stream=self._stream,
                    headers={"Nats-Msg-Id": _message_id(event), "Content-Type": "application/cloudevents+json"},
                )

    async def _connected(self) -> JetStreamContext:
        if self._connection is None or not self._connection.is_connected:
            await self.stop()
            scheme = "tls" if self._address.scheme == "nats+tls" else "nats"
            self._connection = Client()
            await self._connection.connect(
                servers=[f"{scheme}://{host}" for host in self._address.hosts],
                user=self._address.username if self._address.password else None,
                password=self._address.password or None,
                token=None if self._address.password else self._address.username,  # nats://token@host
                name="entitlement-ledger-sync",
                allow_reconnect=False,  # A failure is ours to report, and a new connection ours to make.
                connect_timeout=max(1, self._deadline_ms // 1000),
                error_cb=_log_error,
            )
            await self._ensure_stream(self._connection.jetstream(timeout=self._deadline_ms / 1000))
        return self._connection.jetstream(timeout=self._deadline_ms / 1000)

    async def _ensure_stream(self, jetstream: JetStreamContext) -> None:
        try:
            await jetstream.stream_info(self._stream)
        except NotFoundError:
            try:
                await jetstream.add_stream(
                    name=self._stream,
                    subjects=[f"{self._prefix}.>"],
                    retention=RetentionPolicy.LIMITS,
                    storage=StorageType.FILE,
                    max_age=MAX_AGE_S,
                    duplicate_window=DUPLICATE_WINDOW_S,
                )
            except BadRequestError:  # Another worker was first: fine when it exists now.
                await jetstream.stream_info(self._stream)

    def _failed(self, error: Exception) -> PublishFailed:
        if isinstance(error, TimeoutError):
            return PublishFailed(str(self._address), f"no answer within {self._deadline_ms} ms")
        return PublishFailed(str(self._address), str(error) or type(error).__name__)


def _lanes(events: Sequence[Outgoing]) -> Sequence[Lane]:
    lanes: dict[tuple[str, str], Lane] = {}
    for event in events:
        lanes.setdefault((event.tenant, event.customer), []).append(event)
    return list(lanes.values())


def _message_id(event: Outgoing) -> str:
    return "/".join(quote(part, safe=":@") for part in (event.tenant, event.type, event.id))


def _token(text: str) -> str:
    """One token of a subject: percent-encoded, dots as well, since they divide tokens."""
    return quote(text, safe="").replace(".", "%2E")


def _is_token(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable() and not set(text) & set(" *>/\\@")


async def _log_error(error: Exception) -> None:
    log.warning("nats: %s", error)
