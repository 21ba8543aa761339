"""A CheckAndConsumeRequest from the wire, checked: the one place that says what a call may contain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.decision import Consume, Line, Mode, Shape
from entitlement.errors import InvalidArgument
from entitlement.identity import ID_BYTES, MAX_DIMENSIONS, check_id, check_name, check_value, is_id
from entitlement.quantity import MAX_LINES, MAX_QUANTITY
from entitlement.traceparent import field_of, split, taken, text_of
from entitlement.v1 import gateway_pb2 as pb

MAX_REQUEST_BYTES = 16_384
MAX_BATCH = 1_000
MAX_REMEMBERED_SHAPES = 16_384  # distinct usage lines, but for their quantity, whose check is remembered
MAX_SECONDS = 253_402_300_799  # 9999-12-31T23:59:59Z, protobuf's own bound

Usages = Sequence[pb.Usage]


class WithUsage(Protocol):
    """A message with usage lines."""

    @property
    def usage(self) -> Usages: ...


_MODES = {0: Mode.NORMAL, 1: Mode.NORMAL, 2: Mode.BEST_EFFORT, 3: Mode.CHECK_ONLY, 4: Mode.ADJUST_ONLY}
_KEY, _CUSTOMER, _SUBJECT, _USAGE, _MODE = b"\x0a\x12\x1a\x22\x30"  # tags of the request
_FEATURE, _QUANTITY = b"\x0a\x10"  # and of a usage line
_LONG = 0x80  # a length or number from here on takes another byte
_shapes: dict[bytes, Shape] = {}


def read_consume(tenant: str, data: bytes) -> Consume:
    """The checked value of a request as it came. Raises InvalidArgument, which names field, problem and bound."""
    return _read(tenant, data) or parse_consume(tenant, decode(data))


def decode(data: bytes) -> pb.CheckAndConsumeRequest:
    """Raises InvalidArgument."""
    try:
        return pb.CheckAndConsumeRequest.FromString(data)
    except (DecodeError, ValueError):
        raise InvalidArgument("request", "does not decode as the method's message") from None


def split_batch(data: bytes) -> list[bytes]:
    """The requests of a CheckAndConsumeBatchRequest, as bytes. Raises InvalidArgument."""
    requests = _cut(data)
    if requests:
        return requests
    try:
        found = pb.CheckAndConsumeBatchRequest.FromString(data).requests
    except (DecodeError, ValueError):
        raise InvalidArgument("request", "does not decode as the method's message") from None
    if not 1 <= len(found) <= MAX_BATCH:
        raise InvalidArgument("requests", f"has {len(found)} requests; expected 1..{MAX_BATCH}")
    return [request.SerializeToString(deterministic=True) for request in found]


def _cut(data: bytes) -> list[bytes] | None:
    """The values of field 1, when there is nothing else and each, and their number, is as short as it should be."""
    found: list[bytes] = []
    at, size = 0, len(data)
    try:
        while at < size:
            length = data[at + 1]
            if data[at] != _KEY or len(found) == MAX_BATCH:
                return None
            at += 2
            if length >= _LONG:
                if data[at] >= _LONG:
                    return None
                length += (data[at] << 7) - _LONG
                at += 1
            found.append(data[at : at + length])
            at += length
    except IndexError:
        return None
    return found if at == size else None


def _read(tenant: str, data: bytes, trace: bytes = b"") -> Consume | None:
    """What parse_consume would say of bytes in the usual form: short fields, in order, once, none at its default.

    A third of its time, for no message is made. None: they are not in that form, or something in them is new or wrong.
    """
    try:
        key_end = 2 + data[1]
        customer_end = key_end + 2 + data[key_end + 1]
        if data[0] != _KEY or data[key_end] != _CUSTOMER or customer_end - key_end >= _LONG or key_end >= _LONG:
            return None
        key, customer = data[2:key_end], data[key_end + 2 : customer_end]
        if not key or not customer or key.translate(None, ID_BYTES) or customer.translate(None, ID_BYTES):
            return None
        at, size, subject = customer_end, len(data), ""
        if data[at] == _SUBJECT:
            end = at + 2 + data[at + 1]
            subject = data[at + 2 : end].decode("ascii")
            if end - at >= _LONG or not is_id(subject):
                return None
            at = end
        lines = []
        while at < size and data[at] == _USAGE:
            begin, end = at + 2, at + 2 + data[at + 1]
            quantity_at = begin + 2 + data[begin + 1]
            if end - at >= _LONG or quantity_at >= end or data[begin] != _FEATURE or data[quantity_at] != _QUANTITY:
                return None
            quantity = part = data[quantity_at + 1]
            at, shift = quantity_at + 2, 0
            while part >= _LONG:
                shift += 7
                part = data[at]
                quantity += (part << shift) - (_LONG << shift - 7)
                at += 1
            shape = _shapes.get(data[begin:quantity_at] + data[at:end])
            if shape is None or not part or quantity > MAX_QUANTITY or at > end:
                return None
            lines.append(Line(shape[0], quantity, shape[1]))
            at = end
        mode = Mode.NORMAL
        if at + 2 == size and data[at] == _MODE:
            mode = _MODES[data[at + 1]]
            at = size if data[at + 1] else -1
    except (IndexError, KeyError, UnicodeDecodeError):
        return None
    if at != size or size > MAX_REQUEST_BYTES or not 1 <= len(lines) <= MAX_LINES:
        return None if trace else _read_traced(tenant, data)
    return Consume(tenant, customer.decode("ascii"), subject, key.decode("ascii"), mode, 0, tuple(lines), data, trace)


def _read_traced(tenant: str, data: bytes) -> Consume | None:
    """The same where a traceparent follows."""
    request, trace = split(data)
    found = _read(tenant, request, trace) if trace else None
    return found and msgspec.structs.replace(found, trace=field_of(text_of(trace)))


def parse_consume(tenant: str, request: pb.CheckAndConsumeRequest) -> Consume:
    """The checked value of a request that is decoded, whose traceparent is taken out. Raises InvalidArgument."""
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
    trace = taken(request)
    payload = request.SerializeToString(deterministic=True)
    if len(payload) > MAX_REQUEST_BYTES:
        raise InvalidArgument("request", f"has {len(payload)} bytes; expected at most {MAX_REQUEST_BYTES}")
    event_ms = event_ms_of(request.event_time) if request.HasField("event_time") else 0
    return Consume(tenant, customer, subject, key, mode, event_ms, parse_lines(request, mode), payload, trace)


def parse_lines(request: WithUsage, mode: Mode) -> tuple[Line, ...]:
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
        encoded = usage.SerializeToString(deterministic=True)
        feature, dimensions = _shapes.get(encoded) or _shape(encoded)
    except InvalidArgument as error:
        raise InvalidArgument(f"usage[{index}].{error.field}", error.problem) from None
    finally:
        usage.quantity = quantity
    return Line(feature, quantity, dimensions)


def _shape(encoded: bytes) -> Shape:
    """The feature and dimensions of a usage line, checked, and remembered: it is only the work that is."""
    usage = pb.Usage.FromString(encoded)
    check_name("feature", usage.feature)
    dimensions = tuple(sorted(usage.dimensions.items()))
    if len(dimensions) > MAX_DIMENSIONS:
        raise InvalidArgument("dimensions", f"has {len(dimensions)} dimensions; expected at most {MAX_DIMENSIONS}")
    for name, value in dimensions:
        check_name("dimensions key", name)
        check_value(f"dimensions[{name}]", value)
    if len(_shapes) >= MAX_REMEMBERED_SHAPES:
        _shapes.clear()
    shape = _shapes[encoded] = usage.feature, dimensions
    return shape


def event_ms_of(time: Timestamp) -> int:
    """Raises InvalidArgument."""
    seconds, nanos = time.seconds, time.nanos
    if not 0 < seconds <= MAX_SECONDS:
        raise InvalidArgument("event_time.seconds", f"{seconds} is outside 1..{MAX_SECONDS}")
    if not 0 <= nanos <= 999_999_999:
        raise InvalidArgument("event_time.nanos", f"{nanos} is outside 0..999999999")
    return seconds * 1000 + nanos // 1_000_000
