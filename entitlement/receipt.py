"""A receipt: what a gateway keeps of a consumption before it acknowledges it, and how a hot store that does not know of
the consumption is told. Pure.

A receipt's bytes, little-endian: B kind, Q when it was decided (ms on the hot store's clock), H size of the prices,
I size of the request; then the prices ('plan NUL version', and 'NUL meter' for each usage line; what a later version
appends after a newline is passed over), the CheckAndConsumeRequest in protobuf, and what consume.lua has answered.
Kind 2, granted while the hot store was away, has no answer: it is priced when it is settled. Of holds: kinds 3
(ReserveRequest), 4 (ExtendRequest) and 5 (SettleRequest), with what reserve.lua and settle.lua have answered.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError

import msgspec
from google.protobuf.message import DecodeError

from entitlement import keys
from entitlement.decision import Charge, Consume, Decision, Limits, Mode, Price, parse_answer
from entitlement.errors import CorruptRecord, InvalidArgument
from entitlement.hold_requests import parse_extend, parse_reserve, parse_settle
from entitlement.holding import (
    Closing,
    Kept,
    Reserve,
    Settle,
    close_arguments,
    close_keys,
    parse_reserved,
    parse_settled,
    reserve_arguments,
    reserve_keys,
    settle_arguments,
    settle_keys,
)
from entitlement.identity import fingerprint, key_digest
from entitlement.request import read_consume
from entitlement.v1 import gateway_pb2

GRANTED, DEGRADED, HELD, EXTENDED, SETTLED = 1, 2, 3, 4, 5  # kinds of receipts

LATER = b"\n"  # in no name: before what a later version appends to the prices

_HEAD = Struct("<BQHI")
_SIGNS = (b"=", b"~")  # decided now, decided before
_VERDICTS = b"\1\2"  # ALLOW, ALLOW_WITH_CAPS


class Granted(msgspec.Struct, frozen=True):
    """What was granted without the hot store. Its request is what settles it there."""

    plan: str
    request: Consume


class Receipt(msgspec.Struct, frozen=True):
    """A consumption that was granted, as it was answered."""

    at_ms: int
    plan: str
    version: str
    meters: tuple[str, ...]  # of the usage lines
    request: Consume
    answer: bytes  # as the hot store keeps it with the idempotency key
    decision: Decision


class HoldReceipt(msgspec.Struct, frozen=True):
    """What was set aside, or used of it, as it was answered."""

    at_ms: int
    plan: str
    version: str
    meters: tuple[str, ...]
    call: Reserve | Settle | Closing
    decision: Decision
    expires_ms: int = 0


def prices(charge: Charge) -> bytes:
    """What a receipt keeps of its prices: which ones they were, and what the lines are counted on."""
    return "\0".join((charge.plan, str(charge.version), *[price.meter for price in charge.prices])).encode()


def draft(request: Consume, price: bytes, at_ms: int, kind: int = GRANTED) -> bytes:
    """The receipt, but for the answer that is to be appended."""
    payload = request.payload + request.trace
    return b"%b%b%b" % (_HEAD.pack(kind, at_ms, len(price), len(payload)), price, payload)


def is_due(reply: object) -> bool:
    """Whether what consume.lua has answered says that something was granted, now or before."""
    return type(reply) is bytes and reply[:1] in _SIGNS and reply[reply.index(0, 1) + 1] in _VERDICTS


def parse(data: bytes, tenant: str) -> Receipt | Granted | HoldReceipt:
    """The receipt in bytes that a checksum has proven whole. Raises CorruptRecord, which says what is wrong."""
    try:
        kind, at_ms, price_size, request_size = _HEAD.unpack_from(data)
        if kind not in (GRANTED, DEGRADED, HELD, EXTENDED, SETTLED):
            raise CorruptRecord(f"receipt of kind {kind} is unknown")
        start = _HEAD.size + price_size
        plan, version, *meters = data[_HEAD.size : start].partition(LATER)[0].decode().split("\0")
        if kind in (HELD, EXTENDED, SETTLED):
            end = start + request_size
            return _of_hold(
                kind, at_ms, (plan, version, tuple(meters)), _call(kind, tenant, data[start:end]), data[end:]
            )
        request = read_consume(tenant, data[start : start + request_size])
        if kind == DEGRADED:
            settling = msgspec.structs.replace(request, mode=Mode.SETTLE, event_ms=request.event_ms or at_ms)
            return Granted(plan, settling)
        reply = data[start + request_size :]
        end = reply.index(0, 1)
        decision = parse_answer(reply, end + 1, reply[1:end].decode(), request, replayed=False)
        if not len(meters) == len(request.lines) == len(decision.charged):
            raise CorruptRecord(f"receipt has {len(request.lines)} lines, answered {len(decision.charged)} of them")
    except (ValueError, IndexError, KeyError, StructError, InvalidArgument, DecodeError) as error:
        raise CorruptRecord(f"receipt does not decode: {type(error).__name__}: {error}") from None
    return Receipt(at_ms, plan, decision.rate_version or version, tuple(meters), request, reply[end + 1 :], decision)


def _call(kind: int, tenant: str, payload: bytes) -> Reserve | Settle | Closing:
    call: Reserve | Settle | Closing
    if kind == HELD:
        call = parse_reserve(tenant, gateway_pb2.ReserveRequest.FromString(payload))
    elif kind == EXTENDED:
        call = parse_extend(tenant, gateway_pb2.ExtendRequest.FromString(payload))
    else:
        call = parse_settle(tenant, gateway_pb2.SettleRequest.FromString(payload))
    if isinstance(call, Closing) and call.what != "T":
        raise CorruptRecord("receipt of a call that grants nothing")
    return call


def _of_hold(
    kind: int, at_ms: int, price: tuple[str, str, tuple[str, ...]], call: Reserve | Settle | Closing, reply: bytes
) -> HoldReceipt:
    plan, version, meters = price
    if isinstance(call, Closing):
        meters = ()
    kept = (parse_settled if kind == SETTLED else parse_reserved)(reply, call.asked)
    if not isinstance(kept, Kept) or not len(meters) == len(call.asked.lines) == len(kept.decision.charged):
        raise CorruptRecord(f"receipt has {len(call.asked.lines)} lines, and its answer is {str(kept)[:80]}")
    decision = kept.decision
    return HoldReceipt(at_ms, plan, decision.rate_version or version, meters, call, decision, kept.expires_ms)


def hold_replay(
    receipt: HoldReceipt, limits: Limits, partition: int
) -> tuple[str, tuple[str | bytes, ...], list[str | bytes | int]]:
    """The script, its KEYS and its ARGV that do once more what was answered, if this hot store does not know of it:
    nothing is priced or refused.
    """
    left_ms = max(1, receipt.expires_ms - receipt.at_ms)
    if isinstance(receipt.call, Closing):
        longer = msgspec.structs.replace(receipt.call, ttl_ms=left_ms)
        return "close", close_keys(longer, partition), close_arguments(longer, limits)
    lines = zip(receipt.meters, receipt.decision.charged, strict=True)
    rates = tuple(Price(meter, f"F {charged.amount}") for meter, charged in lines)
    charge = Charge(receipt.plan, int(receipt.version or 0), 0, 0, rates)
    units = zip(receipt.call.asked.lines, receipt.decision.charged, strict=True)
    asked = msgspec.structs.replace(
        receipt.call.asked,
        mode=Mode.ADJUST_ONLY,
        event_ms=receipt.call.asked.event_ms or receipt.at_ms,
        lines=tuple(msgspec.structs.replace(line, quantity=charged.quantity) for line, charged in units),
    )
    call = msgspec.structs.replace(receipt.call, asked=asked)
    if isinstance(call, Settle):
        return "settle", settle_keys(call, partition), settle_arguments(call, charge, limits, replay=True)
    call = msgspec.structs.replace(call, ttl_ms=left_ms if not call.extension else call.ttl_ms)
    return "reserve", reserve_keys(call, partition), reserve_arguments(call, charge, limits, replay=True)


def replay_keys(receipt: Receipt, partition: int) -> tuple[str, bytes, str]:
    """KEYS of replay.lua."""
    request = receipt.request
    return (
        keys.account(partition, request.tenant, request.customer),
        keys.idempotency(partition, key_digest(request.tenant, request.customer, request.key)),
        keys.journal(partition),
    )


def replay_arguments(receipt: Receipt, limits: Limits) -> list[str | bytes | int]:
    """ARGV of replay.lua."""
    request, decision = receipt.request, receipt.decision
    arguments: list[str | bytes | int] = [
        *(fingerprint(request.payload), request.payload + request.trace, receipt.answer, receipt.at_ms),
        request.event_ms,
        *(f"{request.tenant} {request.customer}", limits.remember_ms, receipt.plan, receipt.version),
        *(int(decision.verdict), int(decision.shadow), request.subject, len(decision.charged)),
    ]
    for line, meter, charged in zip(request.lines, receipt.meters, decision.charged, strict=True):
        arguments += (line.feature, meter, charged.quantity, charged.amount)
    return arguments
