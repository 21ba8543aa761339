"""The envelope: CloudEvents 1.0 in JSON, data in protobuf's JSON form."""

from __future__ import annotations

import json

import msgspec
import pytest

from ledger_sync.cloudevents import Int32, envelope, source_of


class Line(msgspec.Struct, frozen=True, rename="camel"):
    amount_nanos: int
    dimensions: dict[str, str]
    hold_id: str | None = None


def build(data: dict[str, object] | msgspec.Struct, **changed: str) -> bytes:
    attributes = {
        "id": "req-1",
        "source": source_of("acme"),
        "type": "entitlement.rated.v1",
        "subject": "bob",
        "time": "2026-01-02T03:04:05.000006Z",
        "partitionkey": "bob",
    } | changed
    return envelope(**attributes, data=data)


def test_the_envelope_has_the_attributes_of_cloudevents_1_0() -> None:
    assert json.loads(build({"tenant": "acme"})) == {
        "specversion": "1.0",
        "id": "req-1",
        "source": "/entitlement/acme",
        "type": "entitlement.rated.v1",
        "subject": "bob",
        "time": "2026-01-02T03:04:05.000006Z",
        "partitionkey": "bob",
        "datacontenttype": "application/json",
        "data": {"tenant": "acme"},
    }


def test_int64_is_a_decimal_string_and_int32_a_number() -> None:
    data: dict[str, object] = {
        "usedNanos": -(2**63),
        "epoch": 2**64 - 1,
        "percent": Int32(80),
        "degraded": True,
        "lines": [{"quantity": 0}],
    }
    assert json.loads(build(data))["data"] == {
        "usedNanos": "-9223372036854775808",
        "epoch": "18446744073709551615",
        "percent": 80,
        "degraded": True,
        "lines": [{"quantity": "0"}],
    }


def test_a_struct_gives_its_encoded_names_and_leaves_map_keys_alone() -> None:
    data = json.loads(build({"lines": [Line(5, {"token_kind": "input"})]}))["data"]
    assert data == {"lines": [{"amountNanos": "5", "dimensions": {"token_kind": "input"}}]}
    assert json.loads(build(Line(5, {}, hold_id="h")))["data"] == {"amountNanos": "5", "dimensions": {}, "holdId": "h"}


def test_the_same_event_gives_the_same_single_line() -> None:
    body = build({"note": "two\nlines, ünïcode"})
    assert body == build({"note": "two\nlines, ünïcode"})
    assert b"\n" not in body


def test_a_tenant_cannot_leave_its_part_of_the_source() -> None:
    assert source_of("a/../b?c#d é") == "/entitlement/a%2F..%2Fb%3Fc%23d%20%C3%A9"


@pytest.mark.parametrize("name", ["id", "source", "type", "subject", "time", "partitionkey"])
def test_an_empty_attribute_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"attribute {name} is empty"):
        build({}, **{name: ""})


@pytest.mark.parametrize("value", [1.0, b"x", object(), float("nan")])
def test_what_has_no_exact_form_is_refused_with_its_path(value: object) -> None:
    with pytest.raises(TypeError, match=r"data\.lines\.amount"):
        build({"lines": [{"amount": value}]})


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_more_than_64_bits_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"data\.n is .* 64 bits"):
        build({"n": value})


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(TypeError):
        build({"note": "\ud800"})
