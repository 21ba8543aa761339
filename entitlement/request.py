"""A CheckAndConsumeRequest from the wire, checked: the one place that says what a call may contain."""

from __future__ import annotations

from entitlement.decision import Consume, Line, Mode
from entitlement.errors import InvalidArgument
from entitlement.identity import MAX_DIMENSIONS, check_id, check_name, check_value, is_id, is_name, is_value
from entitlement.quantity import MAX_LINES, MAX_QUANTITY
from entitlement.v1 import gateway_pb2 as pb

MAX_REQUEST_BYTES = 16_384
MAX_SECONDS = 253_402_300_799  # 9999-12-31T23:59:59Z, protobuf's own bound

_MODES = {0: Mode.NORMAL, 1: Mode.NORMAL, 2: Mode.BEST_EFFORT, 3: Mode.CHECK_ONLY, 4: Mode.ADJUST_ONLY}


def parse_consume(tenant: str, request: pb.CheckAndConsumeRequest) -> Consume:
    """The checked value of a request. Raises InvalidArgument, which names field, problem and bound."""
    key, customer, subject = request.idempotency_key, request.customer, request.subject
    if not is_id(key):
        check_id("idempotency_key", key)
    if not is_id(customer):
        check_id("customer", customer)
    if subject and not is_id(subject):
        check_id("subject", subject)
    mode = _MODES.get(request.mode)
    if mode is None:
        raise InvalidArgument("mode", f"{request.mode} is unknown; expected 0..4")
    payload = request.SerializeToString(deterministic=True)
    if len(payload) > MAX_REQUEST_BYTES:
        raise InvalidArgument("request", f"has {len(payload)} bytes; expected at most {MAX_REQUEST_BYTES}")
    event_ms = _event_ms(request) if request.HasField("event_time") else 0
    return Consume(tenant, customer, subject, key, mode, event_ms, parse_lines(request, mode), payload)


def parse_lines(request: pb.CheckAndConsumeRequest, mode: Mode) -> tuple[Line, ...]:
    """The usage lines, checked. A call that may consume has at least one quantity above zero."""
    usage = request.usage
    if not 1 <= len(usage) <= MAX_LINES:
        raise InvalidArgument("usage", f"has {len(usage)} lines; expected 1..{MAX_LINES}")
    lines = tuple([_line(index, line) for index, line in enumerate(usage)])
    if mode is not Mode.CHECK_ONLY and not any(line.quantity for line in lines):
        raise InvalidArgument("usage[0].quantity", f"0 in every line consumes nothing; expected 1..{MAX_QUANTITY}")
    return lines


def _line(index: int, usage: pb.Usage) -> Line:
    feature, quantity = usage.feature, usage.quantity
    if not is_name(feature):
        check_name(f"usage[{index}].feature", feature)
    if not 0 <= quantity <= MAX_QUANTITY:
        raise InvalidArgument(f"usage[{index}].quantity", f"{quantity} is outside 0..{MAX_QUANTITY}")
    if not usage.dimensions:
        return Line(feature, quantity)
    dimensions = tuple(sorted(usage.dimensions.items()))
    if len(dimensions) > MAX_DIMENSIONS:
        raise InvalidArgument(
            f"usage[{index}].dimensions", f"has {len(dimensions)} dimensions; expected at most {MAX_DIMENSIONS}"
        )
    for name, value in dimensions:
        if not is_name(name):
            check_name(f"usage[{index}].dimensions key", name)
        if not is_value(value):
            check_value(f"usage[{index}].dimensions[{name}]", value)
    return Line(feature, quantity, dimensions)


def _event_ms(request: pb.CheckAndConsumeRequest) -> int:
    seconds, nanos = request.event_time.seconds, request.event_time.nanos
    if not 0 < seconds <= MAX_SECONDS:
        raise InvalidArgument("event_time.seconds", f"{seconds} is outside 1..{MAX_SECONDS}")
    if not 0 <= nanos <= 999_999_999:
        raise InvalidArgument("event_time.nanos", f"{nanos} is outside 0..999999999")
    return seconds * 1000 + nanos // 1_000_000
