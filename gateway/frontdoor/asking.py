"""What a rule makes of a request or descriptor: a call to ask, or why there is none. Pure."""

from __future__ import annotations

import re
from typing import Final, TypeAlias
from urllib.parse import unquote_to_bytes

import msgspec

from entitlement.decision import Consume, Line, Mode
from entitlement.errors import InvalidArgument
from entitlement.identity import check_id, check_name, check_value
from entitlement.quantity import MAX_QUANTITY, parse_integer
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2 as pb
from gateway.frontdoor.rules import Call, Facts, Rule, Source, Table

# What a proxy and the server behind it may read differently: a rule for one path must not let another one through.
# A ';' begins what some servers leave out of a segment; a '#' is no part of a path, and some cut there; a space or a
# control character is trimmed by some.
_AMBIGUOUS = re.compile(r"//|\\|[;#\x00-\x20\x7f]|/\.\.?(?:/|$)|%(?:2[ef]|5c)", re.IGNORECASE | re.ASCII)
_WIRE_MODES: Final = {Mode.NORMAL: 1, Mode.CHECK_ONLY: 3, Mode.ADJUST_ONLY: 4}


class Passed(msgspec.Struct, frozen=True):
    """Nothing is asked, and it passes."""


class Refused(msgspec.Struct, frozen=True):
    """Nothing is asked, and it does not pass."""

    status: int
    reason: str
    message: str
    shadow: bool = False  # it passes all the same, and is told so


class Asked(msgspec.Struct, frozen=True):
    """One line for somebody."""

    call: Call
    customer: str
    subject: str
    key: str
    line: Line


Found: TypeAlias = Passed | Refused | Asked


class _Missing(Exception):
    def __init__(self, name: str, source: Source) -> None:
        super().__init__(f"{name}: {source} is missing")
        self.passes = source.on_missing == "allow"


def of_request(table: Table, method: str, path: str, host: str, facts: Facts) -> Found:
    """`path` as the proxy has it, with its query; `host` with or without its port."""
    plain = path.partition("?")[0]
    decoded = unquote_to_bytes(plain).decode("utf-8", "replace")
    if table.of_paths and (not plain.startswith("/") or _AMBIGUOUS.search(plain) or _AMBIGUOUS.search(decoded)):
        message = (
            f"path: {plain[:80]!a} has an empty or dot segment, an escaped separator, a ';', '#', space or control "
            "character; let the proxy normalize it"
        )
        return Refused(400, "AMBIGUOUS_PATH", message)
    name = re.sub(r":[0-9]*$", "", host).lower().rstrip(".")
    return of_rule(table.request(method, decoded, name), facts, table, f"{method} {plain[:80]}")


def of_rule(rule: Rule | None, facts: Facts, table: Table, what: str) -> Found:
    if rule is None:
        return Passed() if table.otherwise else Refused(403, "NO_RULE", f"{what!a}: no rule of the mapping matches it")
    return Passed() if rule.call is None else _asked(rule.call, facts)


def _asked(call: Call, facts: Facts) -> Found:
    try:
        quantity = _value("quantity", call.quantity, facts)
        amount = parse_integer(f"quantity: {call.quantity}", quantity, 0, MAX_QUANTITY)
        if not amount and call.mode is Mode.ADJUST_ONLY:
            return Passed()  # An explicit zero is zero.
        if not amount and call.mode is Mode.NORMAL:
            raise InvalidArgument(f"quantity: {call.quantity}", f"0 is outside 1..{MAX_QUANTITY}")
        return Asked(
            call,
            check_id(f"customer: {call.customer}", _value("customer", call.customer, facts)),
            _subject(call, facts),
            check_id(f"key: {call.key}", _value("key", call.key, facts)) + call.key_suffix,
            Line(
                check_name(f"feature: {call.feature}", _value("feature", call.feature, facts)), amount, _of(call, facts)
            ),
        )
    except _Missing as missing:
        return Passed() if missing.passes else Refused(403, "MISSING", str(missing), call.shadow)
    except InvalidArgument as error:
        return Refused(400, "INVALID_ARGUMENT", str(error), call.shadow)


def _value(name: str, source: Source, facts: Facts) -> str:
    """Raises _Missing when it is not there, unless nothing stands for it, as its mapping says."""
    value = source.find(facts)
    if not value and source.default is None:
        raise _Missing(name, source)
    return value


def _subject(call: Call, facts: Facts) -> str:
    value = "" if call.subject is None else _value("subject", call.subject, facts)
    return check_id(f"subject: {call.subject}", value) if value else ""


def _of(call: Call, facts: Facts) -> tuple[tuple[str, str], ...]:
    """The dimensions that are there."""
    given = ((name, source, _value(f"dimensions[{name}]", source, facts)) for name, source in call.dimensions)
    return tuple((name, check_value(f"dimensions[{name}]: {source}", value)) for name, source, value in given if value)


def consume(tenant: str, asked: list[Asked], key: str) -> Consume:
    """One atomic call of lines that are for the same customer and subject. Raises InvalidArgument."""
    message = pb.CheckAndConsumeRequest(
        idempotency_key=key,
        customer=asked[0].customer,
        subject=asked[0].subject,
        mode=_WIRE_MODES[asked[0].call.mode],  # type: ignore[arg-type]
    )
    for each in asked:
        line = each.line
        message.usage.add(feature=line.feature, quantity=line.quantity, dimensions=dict(line.dimensions))
    return parse_consume(tenant, message)
