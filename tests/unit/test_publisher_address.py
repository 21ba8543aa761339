"""The publisher setting: what is accepted, how a mistake is told, and that no secret is told with it."""

from __future__ import annotations

import sys

import pytest

from ledger_sync.publisher import BadPublisher, open_publisher

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://localhost", "RedisStreamPublisher"),
        ("redis://u:p@[::1]:6380/3?stream=s&maxlen=10&fsync=yes", "RedisStreamPublisher"),
        ("rediss://localhost:6380", "RedisStreamPublisher"),
        ("unix:///run/valkey.sock?stream=s&db=1", "RedisStreamPublisher"),
        ("file:///var/lib/events.jsonl", "JsonLinesPublisher"),
        ("kafka://a:9092,b:9092/events", "KafkaPublisher"),
        ("kafka://u:p@a:9092/events?security.protocol=SASL_PLAINTEXT&sasl.mechanism=SCRAM-SHA-512", "KafkaPublisher"),
        ("nats://a:4222,b:4222/billing.events?stream=BILLING", "NatsJetStreamPublisher"),
        ("nats+tls://token@a:4222/billing", "NatsJetStreamPublisher"),
        ("none:", "Discard"),
    ],
)
def test_the_url_names_the_publisher(url: str, kind: str) -> None:
    assert type(open_publisher(url)).__name__ == kind


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "no known target"),
        ("none://x", "no known target"),
        ("amqp://host/x", "no known target"),
        ("redis://", "0 hosts are given"),
        ("redis://a,b", "2 hosts are given"),
        ("redis://host:port", "a host is malformed"),
        ("redis://host:99999", "a host is malformed"),
        ("redis://host/events", "the database is not a number"),
        ("redis://host?maxlen=0", "'maxlen' is '0'; expected a whole number from 1"),
        ("redis://host?maxlen=1e6", "'maxlen' is '1e6'"),
        ("redis://host?maxlen=" + "9" * 5000, "'maxlen' is"),
        ("redis://host?stream=", "'stream' is empty"),
        ("redis://host?fsync=maybe", "'fsync' is not known; expected one of yes, no"),
        ("redis://host?steam=x", "unknown option 'steam'; expected one of stream"),
        ("redis://host?stream=a&stream=b", "given twice"),
        ("redis://host?stream", "not a URL"),
        ("redis://host?stream=a#b", "contains '#'"),
        ("unix://run/valkey.sock", "absolute path"),
        ("unix:?stream=s", "absolute path"),
        ("file://events.jsonl", "absolute path"),
        ("file:///var/lib/", "absolute path"),
        ("file:///x?maxlen=1", "unknown option 'maxlen'; expected no options"),
        ("kafka://host:9092", "the topic is missing"),
        ("kafka://host:9092/a/b", "the topic is missing or malformed"),
        ("kafka:///topic", "no host"),
        ("kafka://host:9092/t?acks=0", "unknown option 'acks'"),
        ("nats://host:4222", "the subject prefix is missing"),
        ("nats://host:4222/a..b", "the subject prefix is missing or malformed"),
        ("nats://host:4222/a.*", "the subject prefix is missing or malformed"),
        ("nats:///prefix", "no host"),
        ("nats://host/p?stream=a.b", "'stream' is malformed"),
    ],
)
def test_a_mistake_is_told_with_the_setting_and_what_is_expected(url: str, told: str) -> None:
    with pytest.raises(BadPublisher) as mistake:
        open_publisher(url)
    text = str(mistake.value)
    assert text.startswith("publisher: ")
    assert told in text
    assert "expected" in text
    assert len(text) < 500


@pytest.mark.parametrize(
    "url",
    [
        f"redis://u:{SECRET}@host:6379",
        f"redis://:{SECRET}@host:6379",
        f"rediss://{SECRET}@host:6379",
        f"kafka://u:{SECRET}@host:9092/topic",
        f"nats://u:{SECRET}@host:4222/prefix",
        f"nats://{SECRET}@host:4222/prefix",
    ],
)
def test_a_publisher_does_not_show_its_secret(url: str) -> None:
    publisher = open_publisher(url)
    assert SECRET not in repr(publisher) + str(publisher)
    assert "host" in repr(publisher)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://u:{SECRET}@host:bad",
        f"redis://u:{SECRET}/x@host",
        f"redis://u:{SECRET}@host?password={SECRET}",
        f"redis://u:1{SECRET}#x@host",
        f"kafka://u:{SECRET}/y@host:9092/topic",
        f"kafka://u:1/{SECRET}@host:9092/topic",
        f"kafka://u:{SECRET}@host/topic?sasl.password={SECRET}",
        f"nats://u:{SECRET}@/prefix",
        f"nats://u:1/{SECRET}@host/prefix",
        f"nope://u:{SECRET}@host",
        f"redis://[{SECRET}",
    ],
)
def test_a_mistake_does_not_tell_the_secret(url: str) -> None:
    with pytest.raises(BadPublisher) as mistake:
        open_publisher(url)
    assert SECRET not in str(mistake.value)
    assert mistake.value.__cause__ is None
    assert mistake.value.__suppress_context__ or mistake.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "library", "module", "extra"),
    [
        ("kafka://host:9092/topic", "confluent_kafka", "kafka", "kafka"),
        ("nats://host:4222/prefix", "nats", "nats_jetstream", "nats"),
    ],
)
def test_a_missing_library_is_told_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, url: str, library: str, module: str, extra: str
) -> None:
    monkeypatch.delitem(sys.modules, f"ledger_sync.publisher.{module}", raising=False)
    for name in [name for name in sys.modules if name == library or name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadPublisher, match=rf"entitlement-gateway\[{extra}\]"):
        open_publisher(url)
