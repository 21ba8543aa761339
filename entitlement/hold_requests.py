"""Calls about holds from the wire, checked: the one place that says what they may contain."""

from __future__ import annotations

from entitlement.decision import Consume, Line, Mode
from entitlement.errors import InvalidArgument
from entitlement.holding import Closing, Reserve, Settle
from entitlement.identity import check_id
from entitlement.periods import DAY, SECOND
from entitlement.quantity import MAX_QUANTITY
from entitlement.request import MAX_REQUEST_BYTES, Usages, event_ms_of, parse_lines
from entitlement.traceparent import taken
from entitlement.v1 import gateway_pb2 as pb

DEFAULT_TTL_MS = 60 * SECOND
SHORTEST_TTL_MS, LONGEST_TTL_MS = SECOND, DAY
Message = pb.ReserveRequest | pb.ExtendRequest | pb.SettleRequest
_MODES = {0: Mode.NORMAL, 1: Mode.NORMAL, 2: Mode.BEST_EFFORT}


def parse_reserve(tenant: str, message: pb.ReserveRequest) -> Reserve:
    """Raises InvalidArgument, which names field, problem and bound; so do the others."""
    hold = check_id("hold_id", message.hold_id)
    mode = _MODES.get(message.mode)
    if mode is None:
        raise InvalidArgument("mode", f"{message.mode} is not for holds; expected 0..2 (NORMAL, BEST_EFFORT)")
    subject = check_id("subject", message.subject) if message.subject else ""
    trace = taken(message)
    event_ms = event_ms_of(message.event_time) if message.HasField("event_time") else 0
    lines = parse_lines(message, mode)
    asked = _asked(tenant, message, hold, lines, trace, mode=mode, subject=subject, event_ms=event_ms)
    return Reserve(asked, hold, _ttl_ms(message) if message.HasField("ttl") else DEFAULT_TTL_MS)


def parse_extend(tenant: str, message: pb.ExtendRequest) -> Reserve | Closing:
    """More units, with or without more time; or more time alone."""
    hold = check_id("hold_id", message.hold_id)
    trace = taken(message)
    ttl_ms = _ttl_ms(message) if message.HasField("ttl") else 0
    if not message.more:
        if not ttl_ms:
            raise InvalidArgument("ttl", "neither ttl nor more is set: there is nothing to extend")
        payload = message.SerializeToString(deterministic=True)
        return Closing(tenant, check_id("customer", message.customer), hold, "T", ttl_ms=ttl_ms, payload=payload)
    key = check_id("idempotency_key", message.idempotency_key)
    asked = _asked(tenant, message, key, parse_lines(_More(message), Mode.NORMAL), trace)
    return Reserve(asked, hold, ttl_ms, extension=True)


def parse_settle(tenant: str, message: pb.SettleRequest) -> Settle | Closing:
    """What was used; or, with `final`, that nothing was."""
    hold, key = check_id("hold_id", message.hold_id), check_id("idempotency_key", message.idempotency_key)
    event_ms = event_ms_of(message.event_time) if message.HasField("event_time") else 0
    trace = taken(message)
    lines = parse_lines(message, Mode.CHECK_ONLY) if message.usage else ()
    if not any(line.quantity for line in lines):
        if not message.final:
            raise InvalidArgument(
                "usage", f"reports nothing and is not final; expected a quantity in 1..{MAX_QUANTITY}"
            )
        payload = message.SerializeToString(deterministic=True)
        return Closing(tenant, check_id("customer", message.customer), hold, "S", key, payload=payload)
    asked = _asked(tenant, message, key, lines, trace, mode=Mode.ADJUST_ONLY, event_ms=event_ms)
    return Settle(asked, hold, message.final, message.number, message.number)


def parse_release(tenant: str, message: pb.ReleaseRequest) -> Closing:
    hold = check_id("hold_id", message.hold_id)
    return Closing(tenant, check_id("customer", message.customer), hold, "R")


class _More:
    """An extension's lines, where parse_lines looks for them."""

    def __init__(self, message: pb.ExtendRequest) -> None:
        self.usage: Usages = message.more


def _asked(
    tenant: str,
    message: Message,
    key: str,
    lines: tuple[Line, ...],
    trace: bytes,
    *,
    mode: Mode = Mode.NORMAL,
    subject: str = "",
    event_ms: int = 0,
) -> Consume:
    payload = message.SerializeToString(deterministic=True)
    if len(payload) > MAX_REQUEST_BYTES:
        raise InvalidArgument("request", f"has {len(payload)} bytes; expected at most {MAX_REQUEST_BYTES}")
    customer = check_id("customer", message.customer)
    return Consume(tenant, customer, subject, key, mode, event_ms, lines, payload, trace)


def _ttl_ms(message: pb.ReserveRequest | pb.ExtendRequest) -> int:
    ttl_ms = message.ttl.seconds * 1000 + message.ttl.nanos // 1_000_000
    if not SHORTEST_TTL_MS <= ttl_ms <= LONGEST_TTL_MS:
        bounds = f"{SHORTEST_TTL_MS // 1000} s..{LONGEST_TTL_MS // 3_600_000} h"
        raise InvalidArgument("ttl", f"{ttl_ms} ms is outside {bounds}")
    return ttl_ms
