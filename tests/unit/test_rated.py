"""Published events: the fast bytes equal the envelope's, and the data is the protobuf message's JSON form."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format

from entitlement.journal import Consumed, Crossing
from entitlement.v1 import events_pb2
from ledger_sync.cloudevents import envelope, source_of
from ledger_sync.rated import rated_event, rfc3339, threshold_events
from tests.journal_records import NOW_MS, PERIOD_MS, TENANT, adjusted, consumed, posted

GRANTS = {1: "ada-1", 2: "ada-2"}
RECORDS = {
    "one line": consumed("key-1", 7),
    "a subject, two grants, overage": consumed(
        "a@b/c=~", 8, ("x.y", 3, 90, {1: 50, 2: 30, 0: 10}), ("z", 0, 0, {}), subject="user@example.org"
    ),
    "nothing to pay": consumed("free", 9, ("x", 1, 0, {})),
    "an earlier event": consumed("late", 10, event_ms=NOW_MS - 86_400_000),
    "the largest amount": consumed("big", 11, ("x", 10**15, 2**63 - 1, {1: 2**63 - 1})),
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_the_bytes_are_those_of_the_envelope(record: Consumed) -> None:
    event = posted(record)
    body = rated_event(event, record, 42, GRANTS)
    lines = [
        {
            "feature": line.feature,
            "dimensions": dict(line.dimensions),
            "quantity": charged.quantity,
            "amountNanos": charged.amount,
            "rateCard": "llm",
            "rateCardVersion": "3",
            "burned": [{"grant": GRANTS[b.grant], "amountNanos": b.amount} for b in charged.burns if b.grant] or None,
        }
        for line, charged in zip(event.lines, record.lines, strict=True)
    ]
    assert body == envelope(
        id=event.key,
        source=source_of(TENANT),
        type="entitlement.rated.v1",
        subject="ada",
        time=rfc3339(record.event_ms),
        partitionkey="ada",
        data={
            "idempotencyKey": event.key,
            "tenant": TENANT,
            "customer": "ada",
            "subject": event.subject or None,
            "eventTime": rfc3339(record.event_ms),
            "recordedAt": rfc3339(record.recorded_ms),
            "creditType": "USD",
            "lines": lines,
            "epoch": record.epoch,
            "sequence": record.sequence,
            "transaction": "42",
        },
    )


def test_the_data_is_a_rated_event() -> None:
    record = RECORDS["a subject, two grants, overage"]
    body = json.loads(rated_event(posted(record), record, 42, GRANTS))
    message = json_format.ParseDict(body["data"], events_pb2.RatedEvent())
    assert (message.idempotency_key, message.customer, message.subject) == ("a@b/c=~", "ada", "user@example.org")
    assert message.event_time.ToMilliseconds() == record.event_ms
    assert message.recorded_at.ToMilliseconds() == record.recorded_ms
    assert [(line.feature, line.quantity, line.amount_nanos) for line in message.lines] == [("x.y", 3, 90), ("z", 0, 0)]
    assert [(burn.grant, burn.amount_nanos) for burn in message.lines[0].burned] == [("ada-1", 50), ("ada-2", 30)]
    assert (message.sequence, message.transaction) == (8, "42")


def test_an_event_without_a_transaction_names_none() -> None:
    record = RECORDS["nothing to pay"]
    assert "transaction" not in json.loads(rated_event(posted(record), record, None, GRANTS))["data"]


def test_each_crossing_is_an_event_with_an_id_of_its_own() -> None:
    record = consumed("key-1", 7, crossings=[Crossing(80, True, 1), Crossing(90, True, 2)], settled=95, allowance=100)
    found = list(threshold_events(posted(record), record))
    assert [(event_id, kind) for event_id, kind, _ in found] == [
        (f"ada/{PERIOD_MS}/80/1/up", "entitlement.threshold.crossed.v1"),
        (f"ada/{PERIOD_MS}/90/2/up", "entitlement.threshold.crossed.v1"),
    ]
    body = json.loads(found[0][2])
    message = json_format.ParseDict(body["data"], events_pb2.ThresholdEvent())
    assert (message.percent, message.used_nanos, message.allowance_nanos, message.crossing) == (80, 95, 100, 1)
    assert (message.caused_by, message.cycle_start.ToMilliseconds()) == ("key-1", PERIOD_MS)
    assert body["id"] == found[0][0] and body["time"] == rfc3339(record.recorded_ms)


def test_a_recovery_names_the_ledger_change_that_caused_it() -> None:
    record = adjusted(8, 3, crossings=[Crossing(80, False, 1)])
    ((event_id, kind, body),) = threshold_events(posted(record), record)
    assert (event_id, kind) == (f"ada/{PERIOD_MS}/80/1/down", "entitlement.threshold.recovered.v1")
    assert json.loads(body)["data"]["causedBy"] == "delta:ada:3"


def test_times_are_rfc_3339_in_utc() -> None:
    assert rfc3339(NOW_MS) == "2026-01-02T03:04:05.678Z"
    assert rfc3339(0) == "1970-01-01T00:00:00.000Z"
