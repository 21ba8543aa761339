"""Publishers: committed events leave the ledger through one narrow contract, to whichever target the URL names.

redis://[user:password@]host[:port][/db]?stream=NAME&maxlen=N&fsync=yes|no     the default; also rediss://
unix:///path/to/socket?db=0&stream=NAME&maxlen=N&fsync=yes|no                  the same over a Unix socket
file:///path/events.jsonl                                                      JSON lines
kafka://[user:password@]host:port[,host:port]/topic?...                        extra `kafka`
nats://[user:password@]host:port[,host:port]/subject_prefix?stream=NAME        extra `nats`; also nats+tls:// and token@
none:                                                                          drops everything; for benchmarks
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from entitlement.redis_address import Endpoint
from ledger_sync.publisher.address import BadPublisher, parse_address
from ledger_sync.publisher.protocol import Discard, Outgoing, Publisher, PublishFailed

__all__ = ["BadPublisher", "Outgoing", "PublishFailed", "Publisher", "open_publisher"]

EXPECTED: Final = (
    "redis://host:port?stream=NAME, unix:///socket?stream=NAME, file:///path/events.jsonl, "
    "kafka://host:port/topic, nats://host:port/subject_prefix?stream=NAME or none:"
)
DEADLINE_MS: Final = 10_000


def open_publisher(url: str, *, deadline_ms: int = DEADLINE_MS, hot_store: Endpoint | None = None) -> Publisher:
    """The publisher that `url` names, not yet started: nothing is opened or connected before `start` and `publish`.

    Each `publish` returns or raises within `deadline_ms`. BadPublisher: the URL cannot be used, or needs an extra that
    is not installed. An empty one names a stream in the hot store.
    """
    assert deadline_ms > 0
    if not url and hot_store is not None:
        from ledger_sync.publisher.redis_stream import RedisStreamPublisher

        return RedisStreamPublisher.beside(hot_store, deadline_ms)
    address = parse_address(url, EXPECTED)
    match address.scheme:
        case "redis" | "rediss" | "unix":
            from ledger_sync.publisher.redis_stream import RedisStreamPublisher

            return RedisStreamPublisher(address, deadline_ms)
        case "file":
            from ledger_sync.publisher.json_lines import JsonLinesPublisher

            return JsonLinesPublisher(address, deadline_ms)
        case "kafka":
            with _extra("kafka"):
                from ledger_sync.publisher.kafka import KafkaPublisher

            return KafkaPublisher(address, deadline_ms)
        case "nats" | "nats+tls":
            with _extra("nats"):
                from ledger_sync.publisher.nats_jetstream import NatsJetStreamPublisher

            return NatsJetStreamPublisher(address, deadline_ms)
        case "none" if url == "none:":
            return Discard()
    raise BadPublisher("it names no known target", EXPECTED)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as missing:
        raise BadPublisher(
            f"{missing.name} is not installed", f"the extra {name!r}: pip install 'entitlement-gateway[{name}]'"
        ) from None
