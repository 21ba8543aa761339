"""Events into a Kafka topic: key = customer, so that a customer's events share a partition and keep their order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from ledger_sync.publisher.address import Address, BadPublisher
from ledger_sync.publisher.protocol import Outgoing, PublishFailed

URL: Final = "kafka://host:port[,host:port]/topic"
TOPIC_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
PURGE_S: Final = 1.0
OVERHEAD_BYTES: Final = 512  # At most, of one event: key, headers and framing.
CHUNK_BYTES: Final = 500_000
CHUNK_EVENTS: Final = 1_000
LINGER_MS: Final = 5_000  # Longer than it takes to hand over a chunk, which leaves when it is flushed.
log = logging.getLogger(__name__)


class KafkaPublisher:
    """Accepted is what all in-sync replicas have (acks=all, idempotent producer).

    A chunk leaves as one batch a partition, which the broker takes whole or not at all, and the next chunk when all of
    it is acknowledged: an event refused for good has none of its customer's behind it.

    After any failure the producer is thrown away with what it still held, so that nothing of a failed call leaves
    behind its repetition; the next call makes a new one.
    """

    def __init__(self, address: Address, deadline_ms: int) -> None:
        self._config = _config(address, deadline_ms)
        self._topic = address.path.removeprefix("/")
        if not 0 < len(self._topic) < 250 or not TOPIC_CHARACTERS.issuperset(self._topic):
            raise BadPublisher("the topic is missing or malformed", URL)
        self._address = address
        self._deadline_ms = deadline_ms
        self._producer: Producer | None = None
        self._last_error = ""
        self._thread: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"KafkaPublisher({self._address})"

    async def start(self) -> None:
        """BadPublisher: the client library refuses an option of the URL."""
        try:
            self._producer = self._producer or self._new_producer()
        except KafkaException as error:
            raise BadPublisher("the Kafka client refuses an option", f"one it knows: {error.args[0].str()}") from None

    async def publish(self, events: Sequence[Outgoing]) -> None:
        """Cancelled, its thread still ends within the deadline, before the next call begins."""
        if not events:
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "kafka")
        reason = await asyncio.get_running_loop().run_in_executor(self._thread, self._deliver, tuple(events))
        if reason is not None:
            raise PublishFailed(str(self._address), reason)

    async def stop(self) -> None:
        thread, self._thread = self._thread or ThreadPoolExecutor(1, "kafka"), None
        thread.submit(self._discard)
        await asyncio.to_thread(thread.shutdown)

    def _deliver(self, events: Sequence[Outgoing]) -> str | None:
        """Chunk after chunk. Returns why an event is not acknowledged, or None."""
        deadline = time.monotonic() + self._deadline_ms / 1000
        self._last_error = ""
        for chunk in _chunks(events):
            reason = self._deliver_chunk(chunk, deadline)
            if reason is not None:
                self._discard()
                return reason
        return None

    def _deliver_chunk(self, events: Sequence[Outgoing], deadline: float) -> str | None:
        reports = _Reports()
        try:
            self._producer = self._producer or self._new_producer()
            for event in events:
                self._producer.produce(
                    self._topic, event.body, event.customer.encode(), headers=_headers(event), on_delivery=reports.add
                )
            missing = self._producer.flush(max(0.0, deadline - time.monotonic()))
        except (KafkaException, BufferError) as error:
            return str(error)
        if missing and reports.refusal is None:
            return f"{missing} not acknowledged within {self._deadline_ms} ms. {self._last_error}".rstrip(" .")
        return reports.refusal

    def _new_producer(self) -> Producer:
        return Producer({**self._config, "error_cb": self._on_error}, logger=log)

    def _on_error(self, error: KafkaError) -> None:
        self._last_error = error.str()

    def _discard(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            producer.purge()
            producer.flush(PURGE_S)


class _Reports:
    """The delivery reports of one chunk: the first refusal is remembered."""

    def __init__(self) -> None:
        self.refusal: str | None = None

    def add(self, error: KafkaError | None, _: Message) -> None:
        if error is not None and self.refusal is None:
            self.refusal = error.str()


def _chunks(events: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    chunk: list[Outgoing] = []
    size = 0
    for event in events:
        size += len(event.body) + OVERHEAD_BYTES
        if chunk and (size > CHUNK_BYTES or len(chunk) == CHUNK_EVENTS):
            yield chunk
            chunk, size = [], len(event.body) + OVERHEAD_BYTES
        chunk.append(event)
    if chunk:
        yield chunk


def _headers(event: Outgoing) -> list[tuple[str, str | bytes | None]]:
    return [
        ("content-type", b"application/cloudevents+json"),
        ("ce_id", event.id.encode()),
        ("ce_type", event.type.encode()),
    ]


def _config(address: Address, deadline_ms: int) -> dict[str, object]:
    address.refuse_options_but("security.protocol", "sasl.mechanism", "ssl.ca.location", "compression.type")
    if not address.hosts:
        raise BadPublisher("no host", URL)
    login: dict[str, object] = {}
    if address.username is not None:
        login = {"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN"}
        login |= {"sasl.username": address.username, "sasl.password": address.password}
    return {
        "bootstrap.servers": ",".join(address.hosts),
        "client.id": "entitlement-ledger-sync",
        **login,
        **address.options,
        "acks": "all",
        "enable.idempotence": True,
        "partitioner": "murmur2_random",  # A customer's partition is the one that Java producers choose.
        "linger.ms": LINGER_MS,
        "batch.size": 2 * CHUNK_BYTES,
        # Our deadline comes first: no message times out alone while those behind it are delivered.
        "message.timeout.ms": deadline_ms * 2 + LINGER_MS,
    }
