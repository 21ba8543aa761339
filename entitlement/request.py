"""A CheckAndConsumeRequest from the wire, checked: the one place that says what a call may contain."""

from __future__ import annotations

from functools import lru_cache

from entitlement.decision import Consume, Line, Mode, Shape
from entitlement.errors import InvalidArgument
from entitlement.identity import MAX_DIMENSIONS, check_id, check_name, check_value, is_id
from entitlement.quantity import MAX_LINES, MAX_QUANTITY
from entitlement.v1 import gateway_pb2 as pb

MAX_REQUEST_BYTES = 16_384
MAX_REMEMBERED_SHAPES = 16_384  # distinct usage lines, but for their quantity, whose check is remembered
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
    lines = (
        (_line(0, usage[0]),) if len(usage) == 1 else tuple([_line(index, line) for index, line in enumerate(usage)])
    )
    if mode is not Mode.CHECK_ONLY and not any(line.quantity for line in lines):
        raise InvalidArgument("usage[0].quantity", f"0 in every line consumes nothing; expected 1..{MAX_QUANTITY}")
    return lines


def _line(index: int, usage: pb.Usage) -> Line:
    quantity = usage.quantity
    if not 0 <= quantity <= MAX_QUANTITY:
        raise InvalidArgument(f"usage[{index}].quantity", f"{quantity} is outside 0..{MAX_QUANTITY}")
    usage.quantity = 0  # What is left is the line's shape; shapes repeat, so that one is checked once.
    try:
        feature, dimensions = _shape(usage.SerializeToString(deterministic=True))
    except InvalidArgument as error:
        raise InvalidArgument(f"usage[{index}].{error.field}", error.problem) from None
    finally:
        usage.quantity = quantity
    return Line(feature, quantity, dimensions)


@lru_cache(MAX_REMEMBERED_SHAPES)
def _shape(encoded: bytes) -> Shape:
    """The feature and dimensions of a usage line, checked. Pure: what is remembered is only the work."""
    usage = pb.Usage.FromString(encoded)
    check_name("feature", usage.feature)
    dimensions = tuple(sorted(usage.dimensions.items()))
    if len(dimensions) > MAX_DIMENSIONS:
        raise InvalidArgument("dimensions", f"has {len(dimensions)} dimensions; expected at most {MAX_DIMENSIONS}")
    for name, value in dimensions:
        check_name("dimensions key", name)
        check_value(f"dimensions[{name}]", value)
    return usage.feature, dimensions


def _event_ms(request: pb.CheckAndConsumeRequest) -> int:
    seconds, nanos = request.event_time.seconds, request.event_time.nanos
    if not 0 < seconds <= MAX_SECONDS:
        raise InvalidArgument("event_time.seconds", f"{seconds} is outside 1..{MAX_SECONDS}")
    if not 0 <= nanos <= 999_999_999:
        raise InvalidArgument("event_time.nanos", f"{nanos} is outside 0..999999999")
    return seconds * 1000 + nanos // 1_000_000
