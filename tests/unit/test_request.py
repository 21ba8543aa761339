"""What a call may contain: every bad input is refused with the field, the problem and the bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.decision import Line, Mode
from entitlement.errors import InvalidArgument
from entitlement.quantity import MAX_QUANTITY
from entitlement.request import MAX_REQUEST_BYTES, MAX_SECONDS, parse_consume
from entitlement.v1 import gateway_pb2 as pb

IDS = "A-Z a-z 0-9 . _ ~ @ / + = -"
NAMES = "a-z 0-9 . _ - with a letter first"
Change = Callable[[pb.CheckAndConsumeRequest], None]


def request(**fields: object) -> pb.CheckAndConsumeRequest:
    given: dict[str, object] = {"idempotency_key": "k1", "customer": "bob"} | fields
    given.setdefault("usage", [pb.Usage(feature="tokens", quantity=5)])
    return pb.CheckAndConsumeRequest(**given)  # type: ignore[arg-type]


def usage(quantity: int = 1, feature: str = "tokens", **dimensions: str) -> list[pb.Usage]:
    return [pb.Usage(feature=feature, quantity=quantity, dimensions=dimensions)]


def refusal(bad: pb.CheckAndConsumeRequest) -> str:
    with pytest.raises(InvalidArgument) as error:
        parse_consume("acme", bad)
    return str(error.value)


def test_a_good_call_is_read_whole() -> None:
    good = request(
        subject="key-1",
        usage=[pb.Usage(feature="tokens", quantity=MAX_QUANTITY, dimensions={"type": "in", "model": "m1"})],
        event_time=Timestamp(seconds=1_700_000_000, nanos=123_999_999),
        mode=pb.MODE_BEST_EFFORT,
    )
    found = parse_consume("acme", good)
    assert (found.tenant, found.customer, found.subject, found.key) == ("acme", "bob", "key-1", "k1")
    assert found.lines == (Line("tokens", MAX_QUANTITY, (("model", "m1"), ("type", "in"))),)
    assert (found.mode, found.event_ms) == (Mode.BEST_EFFORT, 1_700_000_000_123)
    assert pb.CheckAndConsumeRequest.FromString(found.payload) == good


BAD: list[tuple[str, pb.CheckAndConsumeRequest, str]] = [
    ("an empty key", request(idempotency_key=""), "idempotency_key: is empty; expected 1..128 bytes"),
    ("a long key", request(idempotency_key="k" * 129), "idempotency_key: has 129 bytes; expected 1..128"),
    ("NUL in the key", request(idempotency_key="a\0b"), f"idempotency_key: 'a\\x00b' has a character outside {IDS}"),
    ("braces in the key", request(idempotency_key="{}"), f"idempotency_key: '{{}}' has a character outside {IDS}"),
    ("no customer", request(customer=""), "customer: is empty; expected 1..128 bytes"),
    ("a long customer", request(customer="c" * 10_000), "customer: has 10000 bytes; expected 1..128"),
    ("NUL in the customer", request(customer="\0"), f"customer: '\\x00' has a character outside {IDS}"),
    ("braces in the customer", request(customer="a{1}"), f"customer: 'a{{1}}' has a character outside {IDS}"),
    ("a colon in the customer", request(customer="a:b"), f"customer: 'a:b' has a character outside {IDS}"),
    ("a newline in the customer", request(customer="a\n"), f"customer: 'a\\n' has a character outside {IDS}"),
    ("a bidi mark", request(customer="\u202ea"), f"customer: '\\u202ea' has a character outside {IDS}"),
    ("a long subject", request(subject="s" * 129), "subject: has 129 bytes; expected 1..128"),
    ("a space in the subject", request(subject="a b"), f"subject: 'a b' has a character outside {IDS}"),
    ("no line", request(usage=[]), "usage: has 0 lines; expected 1..16"),
    ("17 lines", request(usage=usage() * 17), "usage: has 17 lines; expected 1..16"),
    ("10,000 lines", request(usage=usage() * 10_000), "request: has 120009 bytes; expected at most 16384"),
    ("no feature", request(usage=usage(feature="")), "usage[0].feature: is empty; expected 1..64 bytes"),
    ("a long feature", request(usage=usage(feature="f" * 65)), "usage[0].feature: has 65 bytes; expected 1..64"),
    (
        "a capital",
        request(usage=usage(feature="Tokens")),
        f"usage[0].feature: 'Tokens' has a character outside {NAMES}",
    ),
    (
        "quantity 0",
        request(usage=usage(0)),
        f"usage[0].quantity: 0 in every line consumes nothing; expected 1..{10**15}",
    ),
    ("quantity -1", request(usage=usage(-1)), f"usage[0].quantity: -1 is outside 0..{10**15}"),
    ("quantity -2^63", request(usage=usage(-(2**63))), f"usage[0].quantity: {-(2**63)} is outside 0..{10**15}"),
    ("one too many", request(usage=usage(10**15 + 1)), f"usage[0].quantity: {10**15 + 1} is outside 0..{10**15}"),
    ("quantity 2^53", request(usage=usage(2**53)), f"usage[0].quantity: {2**53} is outside 0..{10**15}"),
    ("quantity 2^53+1", request(usage=usage(2**53 + 1)), f"usage[0].quantity: {2**53 + 1} is outside 0..{10**15}"),
    ("quantity 2^63-1", request(usage=usage(2**63 - 1)), f"usage[0].quantity: {2**63 - 1} is outside 0..{10**15}"),
    ("the second line", request(usage=usage() + usage(-1)), f"usage[1].quantity: -1 is outside 0..{10**15}"),
    (
        "9 dimensions",
        request(usage=usage(**{f"d{number}": "v" for number in range(9)})),
        "usage[0].dimensions: has 9 dimensions; expected at most 8",
    ),
    (
        "a bad dimension",
        request(usage=[pb.Usage(feature="tokens", quantity=1, dimensions={"a=b": "v"})]),
        f"usage[0].dimensions key: 'a=b' has a character outside {NAMES}",
    ),
    (
        "a bad value",
        request(usage=usage(model="m,1")),
        "usage[0].dimensions[model]: 'm,1' has a character outside A-Z a-z 0-9 . _ ~ @ / + -",
    ),
    (
        "an empty value",
        request(usage=usage(model="")),
        "usage[0].dimensions[model]: is empty; expected 1..128 bytes",
    ),
    ("an unknown mode", request(mode=5), "mode: 5 is unknown; expected 0..4"),
    ("a negative mode", request(mode=-1), "mode: -1 is unknown; expected 0..4"),
    ("no time", request(event_time=Timestamp()), f"event_time.seconds: 0 is outside 1..{MAX_SECONDS}"),
    ("before 1970", request(event_time=Timestamp(seconds=-1)), f"event_time.seconds: -1 is outside 1..{MAX_SECONDS}"),
    (
        "after 9999",
        request(event_time=Timestamp(seconds=MAX_SECONDS + 1)),
        f"event_time.seconds: {MAX_SECONDS + 1} is outside 1..{MAX_SECONDS}",
    ),
    (
        "negative nanos",
        request(event_time=Timestamp(seconds=1, nanos=-1)),
        "event_time.nanos: -1 is outside 0..999999999",
    ),
    (
        "too many nanos",
        request(event_time=Timestamp(seconds=1, nanos=10**9)),
        "event_time.nanos: 1000000000 is outside 0..999999999",
    ),
]


@pytest.mark.parametrize(("bad", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_input_is_refused_with_field_problem_and_bound(bad: pb.CheckAndConsumeRequest, message: str) -> None:
    assert refusal(bad) == message


@pytest.mark.parametrize(
    ("mode", "meant"),
    [(0, Mode.NORMAL), (1, Mode.NORMAL), (2, Mode.BEST_EFFORT), (3, Mode.CHECK_ONLY), (4, Mode.ADJUST_ONLY)],
)
def test_every_mode_of_the_contract_is_known(mode: int, meant: Mode) -> None:
    assert parse_consume("acme", request(mode=mode)).mode is meant


def test_a_check_may_ask_for_nothing() -> None:
    assert parse_consume("acme", request(usage=usage(0), mode=pb.MODE_CHECK_ONLY)).lines == (Line("tokens", 0),)


def test_one_line_above_zero_is_enough() -> None:
    assert [line.quantity for line in parse_consume("acme", request(usage=usage(0) + usage(1))).lines] == [0, 1]


def test_a_call_on_every_bound_is_accepted() -> None:
    dimensions = {f"d{number}": "v" for number in range(8)}
    bound = request(
        idempotency_key="k" * 128,
        customer="c" * 128,
        subject="s" * 128,
        usage=usage(10**15, "f" * 64, **dimensions) * 16,
    )
    assert len(parse_consume("acme", bound).lines) == 16
    assert parse_consume("acme", request(event_time=Timestamp(seconds=MAX_SECONDS, nanos=999_999_999))).event_ms > 0


def test_a_call_with_too_many_bytes_is_refused_with_the_bound() -> None:
    """Fields that this version does not know are journaled too, and count."""
    unknown = b"\x9a\x06" + b"\x80\x80\x01" + bytes(16_384)  # field 99, 16384 bytes
    large = pb.CheckAndConsumeRequest.FromString(request().SerializeToString() + unknown)
    assert refusal(large).startswith("request: has 164")
    assert refusal(large).endswith(f"bytes; expected at most {MAX_REQUEST_BYTES}")


def test_a_varint_beyond_64_bits_arrives_negative_and_is_refused() -> None:
    overflow = b"\x22\x13\x0a\x06tokens\x10" + b"\x80" * 9 + b"\x01"  # usage { feature: tokens, quantity: 2^63 }
    bad = pb.CheckAndConsumeRequest.FromString(b"\x0a\x02k1\x12\x03bob" + overflow)
    assert refusal(bad) == f"usage[0].quantity: {-(2**63)} is outside 0..{10**15}"


def test_equal_calls_have_equal_payloads_whatever_the_order_of_their_dimensions() -> None:
    one = request(usage=usage(a="1", b="2", c="3"))
    other = request(usage=usage(c="3", b="2", a="1"))
    assert parse_consume("acme", one).payload == parse_consume("acme", other).payload
    assert parse_consume("acme", one).payload != parse_consume("acme", request(usage=usage(a="1"))).payload
