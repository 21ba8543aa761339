"""A traceparent in a request's bytes: taken out, kept behind, never compared; and only what W3C calls one."""

from __future__ import annotations

import sys

import pytest

from entitlement import receipt
from entitlement.decision import Charge, Limits, Price, consume_arguments
from entitlement.errors import InvalidArgument
from entitlement.extras import need
from entitlement.hold_requests import parse_extend, parse_reserve, parse_settle
from entitlement.identity import fingerprint
from entitlement.journal import Held, HeldLine
from entitlement.request import decode, parse_consume, read_consume
from entitlement.traceparent import field_of, in_request, is_traceparent, mark, split, text_of
from entitlement.v1 import gateway_pb2 as pb
from gateway.store.packing import Packer
from ledger_sync.cloudevents import envelope
from ledger_sync.hold_books import folded
from ledger_sync.posting import Posted, read
from ledger_sync.rated import rated_event
from tests.journal_records import consumed, posted

TENANT = "acme"
SAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-01"
UNSAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-00"
BAD = [
    "",
    "x",
    SAMPLED.upper(),
    SAMPLED[:-1],
    f"{SAMPLED}0",
    f"{SAMPLED}\n",
    f"01{SAMPLED[2:]}",
    f"ff{SAMPLED[2:]}",
    f"00-{'0' * 32}-{'cd' * 8}-01",
    f"00-{'ab' * 16}-{'0' * 16}-01",
    SAMPLED.replace("-", "_"),
    "٠" * 55,
]


def asked(traceparent: str = "", **more: object) -> pb.CheckAndConsumeRequest:
    usage = [pb.Usage(feature="tokens", quantity=300, dimensions={"model": "m1"})]
    request = pb.CheckAndConsumeRequest(idempotency_key="k1", customer="bob", usage=usage, traceparent=traceparent)
    request.MergeFrom(pb.CheckAndConsumeRequest(**more))  # type: ignore[arg-type]
    return request


def as_bytes(request: pb.CheckAndConsumeRequest) -> bytes:
    return request.SerializeToString(deterministic=True)


@pytest.mark.parametrize("text", BAD)
def test_what_is_none_is_passed_over(text: str) -> None:
    assert not is_traceparent(text) and field_of(text) == b""
    read_one = read_consume(TENANT, as_bytes(asked(text)))
    assert (read_one.payload, read_one.trace) == (as_bytes(asked()), b"")


@pytest.mark.parametrize("more", [{}, {"mode": 2}, {"subject": "user-1", "mode": 4}], ids=["plain", "mode", "subject"])
@pytest.mark.parametrize(("text", "kept"), [(SAMPLED, True), (UNSAMPLED, False)], ids=["sampled", "not"])
def test_it_is_kept_behind_the_request_only_when_it_is_sampled(text: str, kept: bool, more: dict[str, object]) -> None:
    data = as_bytes(asked(text, **more))
    shape = read_consume(TENANT, as_bytes(asked(**more)))  # The shape of the line is known from here on.
    fast, slow = read_consume(TENANT, data), parse_consume(TENANT, decode(data))
    assert fast == slow
    assert (fast.payload, text_of(fast.trace)) == (shape.payload, text if kept else "")
    assert (in_request(data), in_request(shape.payload)) == (text, "")


def test_bytes_that_only_look_like_it_are_part_of_the_request() -> None:
    """A dimension may hold what a traceparent's field would be: it is compared, and stays where it is."""
    request = pb.CheckAndConsumeRequest(idempotency_key="k1", customer="bob")
    request.usage.add(feature="tokens", quantity=1, dimensions={"z7": f"z7{SAMPLED}"})
    data = as_bytes(request)
    assert split(data)[1], "else this shows nothing"
    for _ in range(2):  # The second time by the short way.
        found = read_consume(TENANT, data)
        assert (found.payload, found.trace) == (data, b"")
    other = as_bytes(request).replace(b"cd" * 8, b"ef" * 8)
    assert mark(data, "") != mark(other, "")


def test_it_is_journaled_and_not_compared() -> None:
    plain, traced = (read_consume(TENANT, as_bytes(asked(text))) for text in ("", SAMPLED))
    charge = Charge("plan", 1, 0, 0, (Price("tokens", "U 1 1"),))
    mark_of, journaled, *_ = consume_arguments(traced, charge, Limits())
    assert mark_of == fingerprint(plain.payload) == consume_arguments(plain, charge, Limits())[0]
    assert journaled == as_bytes(asked(SAMPLED)), "as one who does not know of the field would read it"
    packer = Packer("0" * 40, Limits(), 64)
    packed = packer.pack(traced, charge)
    assert journaled in packed and fingerprint(plain.payload) in packed


def test_of_holds_too() -> None:
    more = {"customer": "bob", "hold_id": "h1", "traceparent": SAMPLED}
    usage = [pb.Usage(feature="tokens", quantity=5)]
    calls = (
        parse_reserve(TENANT, pb.ReserveRequest(usage=usage, **more)),  # type: ignore[arg-type]
        parse_extend(TENANT, pb.ExtendRequest(more=usage, idempotency_key="e1", **more)),  # type: ignore[arg-type]
        parse_settle(TENANT, pb.SettleRequest(usage=usage, idempotency_key="s1", **more)),  # type: ignore[arg-type]
    )
    for call in calls:
        assert (call.asked.trace, SAMPLED.encode() in call.asked.payload) == (field_of(SAMPLED), False)
    ended = parse_settle(TENANT, pb.SettleRequest(final=True, idempotency_key="s2", **more))  # type: ignore[arg-type]
    assert SAMPLED.encode() not in ended.asked.payload


def test_a_receipt_brings_it_back() -> None:
    request = read_consume(TENANT, as_bytes(asked(SAMPLED)))
    found = receipt.parse(receipt.draft(request, b"plan\0" + b"1\0tokens", 5, receipt.DEGRADED), TENANT)
    assert isinstance(found, receipt.Granted)
    assert (found.request.payload, found.request.trace) == (request.payload, field_of(SAMPLED))


def test_a_hold_that_the_ledger_puts_back_is_compared_without_it() -> None:
    usage = [pb.Usage(feature="tokens", quantity=5)]
    reserve = pb.ReserveRequest(hold_id="h1", customer="bob", usage=usage).SerializeToString(deterministic=True)
    extend = pb.ExtendRequest(hold_id="h1", customer="bob", more=usage, idempotency_key="e1").SerializeToString()
    for trace in (b"", field_of(SAMPLED)):
        hold = folded([held(reserve + trace, 1), held(extend + trace, 2, extension=True)])
        assert hold is not None
        assert hold.fingerprint == fingerprint(reserve)
        assert [extension.fingerprint for extension in hold.extensions] == [fingerprint(extend)]


def held(payload: bytes, sequence: int, *, extension: bool = False) -> Held:
    return Held(
        **{"tenant": TENANT, "customer": "bob", "epoch": 1, "sequence": sequence, "version": 1, "recorded_ms": 5},
        **{"event_ms": 5, "created_ms": 5, "expires_ms": 9, "extension": extension, "amount": 5, "credit_type": "USD"},
        **{"plan": "llm", "rate_version": "1", "hold": "h1", "subject": "", "request": payload},
        lines=(HeldLine("tokens", 5, 5),),
    )


def test_the_ledger_reads_it_compares_without_it_and_publishes_it() -> None:
    record = consumed("key-1", 7)
    plain = posted(record)
    traced = posted(consumed("key-1", 7, payload=record.request + field_of(SAMPLED)))
    assert (traced.traceparent, traced.fingerprint) == (SAMPLED, plain.fingerprint)
    assert plain.traceparent == ""
    of_plain, of_traced = (rated_event(event, record, 42, {1: "ada-1"}) for event in (plain, traced))
    told = f',"traceparent":"{SAMPLED}"'.encode()
    assert told in of_traced and of_traced.replace(told, b"") == of_plain
    attributes = dict.fromkeys(("id", "source", "type", "subject", "time", "partitionkey"), "x")
    same = envelope(**attributes, traceparent=SAMPLED, data={})
    assert b'"partitionkey":"x"' + told + b',"datacontenttype"' in same


@pytest.mark.parametrize("text", [*BAD[1:], UNSAMPLED])
def test_a_record_with_a_bad_one_is_booked_without(text: str) -> None:
    """No gateway writes it; the ledger is not to publish what it has not checked."""
    record = consumed("key-1", 7)
    request = pb.CheckAndConsumeRequest.FromString(record.request)
    request.traceparent = text
    found = read(posted(consumed("key-1", 7, payload=as_bytes(request))).arrival)
    assert isinstance(found, Posted) and found.traceparent == ""


def test_an_extra_that_is_not_installed_is_named_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    need("tracing", "json", "otel")
    monkeypatch.setitem(sys.modules, "absent", None)
    for module in ("not_there", "not_there.sdk", "json.not_there"):
        with pytest.raises(InvalidArgument, match=r"^tracing: needs .* pip install 'entitlement-gateway\[otel\]'$"):
            need("tracing", module, "otel")
