"""Messages from JSON: an integer is plain, a name is known, a text is Unicode; an error says where, in our words."""

from __future__ import annotations

import json

import pytest

from entitlement.errors import InvalidArgument
from entitlement.v1 import gateway_pb2 as pb
from gateway.transport.json_form import parse

REQUEST = pb.CheckAndConsumeRequest.DESCRIPTOR


def quantity(value: str) -> bytes:
    return b'{"usage":[{"quantity":%b}]}' % value.encode()


BAD = [
    (b"[]", "body: expected a JSON object"),
    (b"{", "body: expected a JSON object"),
    (b'{"a":' * 5_000, "body: expected a JSON object"),
    (b'{"customer":"\xff"}', "body: expected a JSON object"),
    (quantity("9" * 5_000), "body: expected a JSON object"),
    (quantity("NaN"), "body: NaN is not JSON"),
    (quantity("-Infinity"), "body: -Infinity is not JSON"),
    (b'{"customer":"a","customer":"b"}', "'customer': is given twice"),
    (b'{"nope":1}', "body: 'nope' is no field of CheckAndConsumeRequest"),
    (b'{"\\ud800":1}', "body: '\\ud800' is no field of CheckAndConsumeRequest"),
    (b'{"customer":5}', "customer: 5 is not a text"),
    (b'{"customer":"\\ud800"}', "customer: has half of a surrogate pair"),
    (b'{"usage":{}}', "usage: expected a list"),
    (b'{"usage":[5]}', "usage[0]: expected an object"),
    (b'{"usage":[null]}', "usage[0]: expected an object"),
    (b'{"usage":[{"dimensions":[]}]}', "usage[0].dimensions: expected an object"),
    (b'{"usage":[{"dimensions":{"a":1}}]}', "usage[0].dimensions['a']: 1 is not a text"),
    (b'{"usage":[{"dimensions":{"\\ud800":"x"}}]}', "usage[0].dimensions['\\ud800']: has half of a surrogate pair"),
    *(
        (quantity(text), f"usage[0].quantity: {json.loads(text)!a} is not a plain decimal integer")
        for text in (
            *('"1e3"', '"0x10"', '" 7 "', '"\uff11"', '"1_000"', '"+5"', '"007"', '"-"', '""', '"nan"'),
            *("1.0", "1e400", "1e3", "true", "[]", "{}"),
        )
    ),
    (quantity(str(2**63)), f"usage[0].quantity: {2**63} is outside {-(2**63)}..{2**63 - 1}"),
    (b'{"mode":"X"}', "mode: 'X' is no Mode"),
    (b'{"mode":1.5}', "mode: 1.5 is not a plain decimal integer"),
    (b'{"mode":"\\ud800"}', "mode: '\\ud800' is no Mode"),
    (b'{"eventTime":5}', "eventTime: 5 is not a Timestamp"),
    (b'{"eventTime":"2025"}', "eventTime: '2025' is not a Timestamp"),
    (
        '{"eventTime":"\uff12025-01-01T00:00:00Z"}'.encode(),
        "eventTime: '\\uff12025-01-01T00:00:00Z' is not a Timestamp",
    ),
]


@pytest.mark.parametrize(("body", "problem"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_what_is_not_the_form_is_refused_with_its_place(body: bytes, problem: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        parse(REQUEST, body)
    assert str(error.value).startswith(problem)
    assert str(error.value).isascii() and len(str(error.value)) < 200


@pytest.mark.parametrize("body", [b'{"final":1}', b'{"final":"true"}'])
def test_a_truth_is_true_or_false(body: bytes) -> None:
    with pytest.raises(InvalidArgument, match="neither true nor false"):
        parse(pb.SettleRequest.DESCRIPTOR, body)


def test_two_names_of_one_field_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="body: idempotency_key and idempotencyKey are one field"):
        parse(REQUEST, b'{"idempotencyKey":"a","idempotency_key":"b"}')


def test_what_is_the_form_is_read() -> None:
    text = """{"idempotency_key": "k", "customer": "b\\u00f6b", "subject": null, "mode": "MODE_BEST_EFFORT", "usage": [
        {"feature": "tokens", "quantity": "9007199254740993", "dimensions": {"model": "m3"}}, {"quantity": -7}],
        "eventTime": "2025-01-01T00:00:00.5Z"}"""
    made = parse(REQUEST, text.encode())
    assert isinstance(made, pb.CheckAndConsumeRequest)
    assert (made.idempotency_key, made.customer, made.mode) == ("k", "b\u00f6b", pb.MODE_BEST_EFFORT)
    assert [line.quantity for line in made.usage] == [2**53 + 1, -7]
    assert dict(made.usage[0].dimensions) == {"model": "m3"}
    assert made.event_time.ToMilliseconds() == 1_735_689_600_500
    assert parse(REQUEST, b"") == pb.CheckAndConsumeRequest()
    assert parse(REQUEST, b'{"mode": 3}') == pb.CheckAndConsumeRequest(mode=pb.MODE_CHECK_ONLY)
