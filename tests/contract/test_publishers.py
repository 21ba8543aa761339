"""One suite for every publisher, and below it what each target promises besides."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import orjson
import pytest
from redis.asyncio import Redis

from ledger_sync.cloudevents import envelope, source_of
from ledger_sync.publisher import Outgoing, Publisher, PublishFailed, open_publisher
from tests.contract.conftest import (
    Away,
    FileTarget,
    KafkaTarget,
    NatsTarget,
    Received,
    RedisTarget,
    Target,
    start_nats,
    value,
)
from tests.servers import DEADLINE_S, ValkeyProcess, free_port

pytestmark = pytest.mark.asyncio

SHORT_MS = 1_000
SLACK_S = 2.0  # What a busy machine may add to a deadline.
TENANTS = ("acme", "a.b/c %*>", "größe")
CUSTOMERS = tuple(f"customer {n}/ü" for n in range(12))


def event(number: int, tenant: str = "acme", customer: str = "bob") -> Outgoing:
    id, type = f"key/{number}:ü", "entitlement.rated.v1"
    body = envelope(
        id=id,
        source=source_of(tenant),
        type=type,
        subject=customer,
        time="2026-01-02T03:04:05Z",
        partitionkey=customer,
        data={"tenant": tenant, "customer": customer, "sequence": number},
    )
    return Outgoing(id=id, tenant=tenant, type=type, customer=customer, body=body)


def events(count: int, seed: int) -> list[Outgoing]:
    chance = random.Random(seed)
    return [event(number, chance.choice(TENANTS), chance.choice(CUSTOMERS)) for number in range(count)]


def assert_arrived(received: Sequence[Received], sent: Sequence[Outgoing]) -> None:
    """Every event with its id and bytes, a customer's in order once repeats are dropped by id, and nothing else."""
    first = {item.id: item.body for item in reversed(received)}
    assert first == {item.id: item.body for item in sent}
    order = list(dict.fromkeys(item.id for item in received))
    for customer in {(item.tenant, item.customer) for item in sent}:
        expected = [item.id for item in sent if (item.tenant, item.customer) == customer]
        assert [id for id in order if id in set(expected)] == expected


@asynccontextmanager
async def opened(url: str, deadline_ms: int = int(DEADLINE_S * 1000)) -> AsyncIterator[Publisher]:
    publisher = open_publisher(url, deadline_ms=deadline_ms)
    await publisher.start()
    try:
        yield publisher
    finally:
        await publisher.stop()


async def publish_until_accepted(publisher: Publisher, sent: Sequence[Outgoing]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return await publisher.publish(sent)
        except PublishFailed:
            assert time.monotonic() < deadline


async def assert_fails_in_time(publisher: Publisher, sent: Sequence[Outgoing]) -> None:
    began = time.monotonic()
    with pytest.raises(PublishFailed):
        await publisher.publish(sent)
    assert time.monotonic() - began < SHORT_MS / 1000 + SLACK_S


async def test_every_event_arrives_whole_and_in_order_per_customer(target: Target, seed: int) -> None:
    sent = events(1000, seed)
    async with opened(target.url) as publisher:
        for first in range(0, len(sent), 300):
            await publisher.publish(sent[first : first + 300])
    received = await target.received()
    assert len(received) == len(sent)
    assert_arrived(received, sent)


async def test_a_repeat_carries_the_same_id(target: Target, seed: int) -> None:
    sent = events(50, seed)
    async with opened(target.url) as publisher:
        await publisher.publish(sent)
    async with opened(target.url) as publisher:
        await publisher.publish(sent)
    received = await target.received()
    assert len(received) == len(sent) * (1 if target.drops_repeats else 2)
    assert_arrived(received, sent)


async def test_a_target_that_is_away_fails_in_time_and_is_found_again(away: Away, seed: int) -> None:
    sent = events(300, seed)
    async with opened(away.target.url, SHORT_MS) as publisher:
        await publish_until_accepted(publisher, sent[:100])
        with away.absent():
            await assert_fails_in_time(publisher, sent[100:200])
            await assert_fails_in_time(publisher, sent[100:200])
        await publish_until_accepted(publisher, sent[100:200])
        await publish_until_accepted(publisher, sent[200:])
    assert_arrived(await away.target.received(), sent)


async def test_a_publisher_starts_without_its_target(away: Away, seed: int) -> None:
    sent = events(20, seed)
    publisher = open_publisher(away.target.url, deadline_ms=SHORT_MS)
    with away.absent():
        await publisher.start()
        await publisher.publish([])
        await assert_fails_in_time(publisher, sent)
    await publish_until_accepted(publisher, sent)
    await publisher.stop()
    assert_arrived(await away.target.received(), sent)


async def test_an_outage_in_the_middle_of_a_publish_loses_and_reorders_nothing(away: Away, seed: int) -> None:
    sent = events(3000, seed)
    async with opened(away.target.url, SHORT_MS) as publisher:
        await publish_until_accepted(publisher, sent[:10])
        publishing = asyncio.create_task(publish_until_accepted(publisher, sent[10:]))
        await asyncio.wait([publishing], timeout=random.Random(seed).uniform(0, 0.02))
        with away.absent():
            pass
        await publishing
    assert_arrived(await away.target.received(), sent)


async def test_a_cancelled_publish_can_be_repeated(away: Away, seed: int) -> None:
    sent = events(200, seed)
    async with opened(away.target.url, SHORT_MS) as publisher:
        await publish_until_accepted(publisher, sent[:50])
        with away.absent():
            publishing = asyncio.create_task(publisher.publish(sent[50:150]))
            await asyncio.wait([publishing], timeout=0.02)
            publishing.cancel()
            with pytest.raises((asyncio.CancelledError, PublishFailed)):
                await publishing
        await publish_until_accepted(publisher, sent[50:])
    assert_arrived(await away.target.received(), sent)


async def test_stop_survives_a_second_time_and_a_stop_before_the_start(target: Target) -> None:
    publisher = open_publisher(target.url)
    await publisher.stop()
    await publisher.start()
    await publisher.publish([event(1)])
    await publisher.stop()
    await publisher.stop()
    assert_arrived(await target.received(), [event(1)])


@pytest.mark.parametrize("target_of", ["redis://user:{}@{}", "kafka://user:{}@{}/topic", "nats://user:{}@{}/prefix"])
async def test_a_failure_does_not_tell_the_secret(
    target_of: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async with opened(target_of.format("hunter2", "127.0.0.1:1"), SHORT_MS) as publisher:
        with pytest.raises(PublishFailed) as failed:
            await publisher.publish([event(1)])
    assert "127.0.0.1:1" in str(failed.value)
    told = (
        f"{failed.value!r} {failed.value} {failed.value.__cause__!r} {publisher!r} {caplog.text} {capfd.readouterr()}"
    )
    assert "hunter2" not in told


async def test_redis_takes_the_password_of_the_url() -> None:
    with ValkeyProcess(port=free_port(), requirepass="p@ss/1") as server:
        async with opened(f"redis://:p%40ss%2F1@127.0.0.1:{server.port}/2?stream=s") as publisher:
            await publisher.publish([event(1)])
        async with opened(f"redis://:hunter2@127.0.0.1:{server.port}") as publisher:
            with pytest.raises(PublishFailed, match="invalid username-password") as failed:
                await publisher.publish([event(1)])
    assert "hunter2" not in str(failed.value)


@pytest.mark.parametrize(
    ("options", "login"), [(("--user", "u", "--pass", "p@ss/1"), "u:p%40ss%2F1"), (("--auth", "t0ken"), "t0ken")]
)
async def test_nats_takes_the_login_of_the_url(tmp_path: Path, options: tuple[str, ...], login: str) -> None:
    with start_nats(tmp_path, *options) as server:
        async with opened(f"nats://{login}@{server.announced[1]}/events") as publisher:
            await publisher.publish([event(1)])
        async with opened(f"nats://u:hunter2@{server.announced[1]}/events") as publisher:
            with pytest.raises(PublishFailed, match=r"(?i)authorization violation") as failed:
                await publisher.publish([event(1)])
    assert "hunter2" not in str(failed.value)


async def test_none_accepts_and_forgets() -> None:
    async with opened("none:") as publisher:
        await publisher.publish([event(1)])


# Redis stream


async def test_a_redis_entry_has_the_documented_fields(redis_target: RedisTarget) -> None:
    async with opened(redis_target.url) as publisher:
        await publisher.publish([event(1)])
    async with Redis.from_url(redis_target.server.url) as client:
        entries = await client.xrange(redis_target.stream) or []
    assert [fields for _, fields in entries] == [
        {
            b"id": "key/1:ü".encode(),
            b"type": b"entitlement.rated.v1",
            b"tenant": b"acme",
            b"customer": b"bob",
            b"body": event(1).body,
        }
    ]


async def test_a_redis_stream_keeps_about_maxlen_entries(redis_target: RedisTarget, seed: int) -> None:
    async with opened(f"{redis_target.url}&maxlen=500") as publisher:
        await publisher.publish(events(2000, seed))
    received = await redis_target.received()
    assert 500 <= len(received) < 700
    assert [item.id for item in received] == [item.id for item in events(2000, seed)][-len(received) :]


async def test_a_redis_server_that_cannot_write_takes_all_of_a_chunk_or_none(seed: int) -> None:
    with ValkeyProcess(maxmemory="3mb", maxmemory_policy="noeviction") as server:
        target = RedisTarget(server, "events")
        sent = events(20_000, seed)
        async with opened(target.url) as publisher:
            with pytest.raises(PublishFailed, match="maxmemory"):
                await publisher.publish(sent)
        async with Redis.from_url(server.url) as client:
            await client.config_set("maxmemory", "0")
        received = await target.received()
        assert 0 < len(received) < len(sent)
        assert len(received) % 100 == 0
        assert_arrived(received, sent[: len(received)])


async def test_redis_with_fsync_waits_for_the_disk_and_says_when_there_is_none(redis_target: RedisTarget) -> None:
    async with opened(f"{redis_target.url}&fsync=yes") as publisher:
        await publisher.publish([event(1)])
    with ValkeyProcess(appendonly="no") as volatile:
        async with opened(f"{volatile.url}?fsync=yes") as publisher:
            with pytest.raises(PublishFailed, match="appendonly"):
                await publisher.publish([event(1)])


# JSON lines


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (b"", b""),
        (b'{"id":"a"}\n', b'{"id":"a"}\n'),
        (b'{"id":"a"}', b'{"id":"a"}\n'),
        (b'{"id":"a"}\n{"id":"b"', b'{"id":"a"}\n'),
        (b'{"id":"a"}\n{"id":"b"}', b'{"id":"a"}\n{"id":"b"}\n'),
        (b'{"id":"a"}\n4', b'{"id":"a"}\n'),
        (b'{"id":"a"}\n\xc3', b'{"id":"a"}\n'),
        (b'{"id":"a', b""),
        (b'{"id":"a"}\n{"id":"' + b"b" * 200_000, b'{"id":"a"}\n'),
        (b'{"id":"' + b"b" * 200_000 + b'"}', b'{"id":"' + b"b" * 200_000 + b'"}\n'),
    ],
)
async def test_a_torn_last_line_is_mended_at_start(file_target: FileTarget, left: bytes, kept: bytes) -> None:
    file_target.path.write_bytes(left)
    async with opened(file_target.url):
        assert file_target.path.read_bytes() == kept
    async with opened(file_target.url) as publisher:
        await publisher.publish([event(1)])
    assert file_target.path.read_bytes() == kept + event(1).body + b"\n"


async def test_a_line_torn_by_another_process_is_mended_before_the_next(file_target: FileTarget) -> None:
    async with opened(file_target.url) as publisher:
        await publisher.publish([event(1)])
        with file_target.path.open("ab") as other:
            other.write(event(2).body[:20])
        await publisher.publish([event(3)])
    assert_arrived(await file_target.received(), [event(1), event(3)])


async def test_a_full_disk_leaves_no_part_of_the_call(file_target: FileTarget) -> None:
    async with opened(file_target.url) as publisher:
        await publisher.publish([event(1)])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_target.path.stat().st_size + len(event(2).body) + 20, hard))
        try:
            with pytest.raises(PublishFailed, match="File too large"):
                await publisher.publish([event(2), event(3)])
            assert file_target.path.read_bytes() == event(1).body + b"\n"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await publisher.publish([event(2), event(3)])
    assert_arrived(await file_target.received(), [event(1), event(2), event(3)])


async def test_a_rotated_file_is_left_alone_and_a_new_one_begun(file_target: FileTarget) -> None:
    async with opened(file_target.url) as publisher:
        await publisher.publish([event(1)])
        rotated = file_target.path.rename(file_target.path.with_suffix(".1"))
        await publisher.publish([event(2)])
    assert rotated.read_bytes() == event(1).body + b"\n"
    assert_arrived(await file_target.received(), [event(2)])


async def test_publishers_share_a_file_without_mixing_lines(file_target: FileTarget, seed: int) -> None:
    sent = [[event(number, "acme", f"customer {part}") for number in range(part, 1000, 4)] for part in range(4)]

    async def publish(part: Sequence[Outgoing]) -> None:
        async with opened(file_target.url) as publisher:
            for first in range(0, len(part), 10):
                await publisher.publish(part[first : first + 10])

    await asyncio.gather(*map(publish, sent))
    received = await file_target.received()
    assert len(received) == 1000
    assert_arrived(received, [item for part in sent for item in part])


async def test_a_body_of_two_lines_is_refused_and_nothing_written(file_target: FileTarget) -> None:
    async with opened(file_target.url) as publisher:
        with pytest.raises(PublishFailed, match="more than one line"):
            await publisher.publish([event(1), Outgoing("a", "acme", "t", "bob", b"{\n}")])
    assert file_target.path.read_bytes() == b""


# Kafka


async def test_a_kafka_message_has_key_and_headers_and_a_customer_one_partition(
    kafka_target: KafkaTarget, seed: int
) -> None:
    sent = events(200, seed)
    async with opened(kafka_target.url) as publisher:
        await publisher.publish(sent)
    messages = await asyncio.to_thread(kafka_target.messages)
    partitions: dict[bytes, set[int | None]] = {}
    for message in messages:
        body = orjson.loads(value(message))
        key = message.key()
        assert isinstance(key, bytes)
        assert key.decode() == body["subject"]
        assert dict(message.headers() or []) == {
            "content-type": b"application/cloudevents+json",
            "ce_id": body["id"].encode(),
            "ce_type": b"entitlement.rated.v1",
        }
        partitions.setdefault(key, set()).add(message.partition())
    assert len(set.union(*partitions.values())) > 1
    assert all(len(used) == 1 for used in partitions.values())


async def test_a_message_too_large_for_kafka_fails_and_does_not_stop_the_next_call(kafka_target: KafkaTarget) -> None:
    large = Outgoing("large", "acme", "t", "bob", b'"' + b"x" * 2_000_000 + b'"')
    async with opened(kafka_target.url) as publisher:
        with pytest.raises(PublishFailed, match="too large"):
            await publisher.publish([large, event(1)])
        await publisher.publish([event(2)])
    assert_arrived(await kafka_target.received(), [event(2)])


# NATS JetStream


async def test_nats_subjects_name_tenant_and_type(nats_target: NatsTarget) -> None:
    sent = [event(1, "acme"), event(2, "a.b/c %*>"), event(3, "größe")]
    async with opened(nats_target.url) as publisher:
        await publisher.publish(sent)
    messages = {message.subject: message for message in await nats_target.messages()}
    tenants = ["acme", "a%2Eb%2Fc%20%25%2A%3E", "gr%C3%B6%C3%9Fe"]
    assert sorted(messages) == sorted(f"{nats_target.prefix}.{tenant}.entitlement.rated.v1" for tenant in tenants)
    headers = messages[f"{nats_target.prefix}.acme.entitlement.rated.v1"].headers or {}
    assert headers["Nats-Msg-Id"] == "acme/entitlement.rated.v1/key%2F1:%C3%BC"
    assert headers["Content-Type"] == "application/cloudevents+json"


async def test_a_nats_stream_that_exists_is_used_as_it_is(nats_target: NatsTarget) -> None:
    client = await nats.connect(f"nats://{nats_target.address}")
    try:
        await client.jetstream().add_stream(
            name=nats_target.stream, subjects=[f"{nats_target.prefix}.acme.>"], max_msgs=7
        )
        async with opened(nats_target.url, SHORT_MS) as publisher:
            await publisher.publish([event(1, "acme")])
            with pytest.raises(PublishFailed):  # No stream has this subject.
                await publisher.publish([event(2, "other")])
            await publisher.publish([event(3, "acme")])
        config = (await client.jetstream().stream_info(nats_target.stream)).config
    finally:
        await client.close()
    assert config.max_msgs == 7
    assert_arrived(await nats_target.received(), [event(1, "acme"), event(3, "acme")])


async def test_an_event_that_nats_refuses_has_none_of_its_customer_behind_it(nats_target: NatsTarget) -> None:
    large = Outgoing("large", "acme", "t", "bob", b'"' + b"x" * 5_000 + b'"')
    client = await nats.connect(f"nats://{nats_target.address}")
    try:
        jetstream = client.jetstream()
        await jetstream.add_stream(name=nats_target.stream, subjects=[f"{nats_target.prefix}.>"], max_msg_size=4_000)
        async with opened(nats_target.url) as publisher:
            with pytest.raises(PublishFailed, match="message size exceeds"):
                await publisher.publish([event(1), large, *(event(number) for number in range(2, 100))])
    finally:
        await client.close()
    assert_arrived(await nats_target.received(), [event(1)])


async def test_workers_that_start_together_make_one_nats_stream(nats_target: NatsTarget, seed: int) -> None:
    async def publish(part: int) -> None:
        async with opened(nats_target.url) as publisher:
            await publisher.publish([event(part, "acme", f"customer {part}")])

    await asyncio.gather(*(publish(part) for part in range(8)))
    assert len(await nats_target.received()) == 8
