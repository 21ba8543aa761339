"""A call's place in a trace, in a request's bytes: W3C Trace Context (https://www.w3.org/TR/trace-context/). Pure.

It stands behind the request in receipts and in the journal, as the request's field 15, and is no part of its
fingerprint: a retry under another trace is the same request.
"""

from __future__ import annotations

import re
from typing import Final

from entitlement.identity import fingerprint
from entitlement.v1 import gateway_pb2 as pb

SIZE: Final = 57  # of the field: tag, length and text
_HEAD: Final = b"\x7a\x37"
_W3C: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)

Traced = pb.CheckAndConsumeRequest | pb.ReserveRequest | pb.ExtendRequest | pb.SettleRequest


def is_traceparent(text: str) -> bool:
    """Of version 00, with a trace and a span."""
    return _W3C.fullmatch(text) is not None


def field_of(text: str) -> bytes:
    """The field on the wire. Empty for what is no traceparent, and for a trace that is not sampled."""
    return _HEAD + text.encode() if is_traceparent(text) and int(text[-1], 16) & 1 else b""


def text_of(field: bytes) -> str:
    """What stands in a field that `field_of` has made; the empty one holds nothing."""
    return field[len(_HEAD) :].decode()


def taken(message: Traced) -> bytes:
    """Takes the field out of a request: what is journaled behind it."""
    text = message.traceparent
    if text:
        message.ClearField("traceparent")
    return field_of(text)


def split(data: bytes) -> tuple[bytes, bytes]:
    """A request whose last field is this one, and the field; the field is empty where it is not. Only a caller who
    reads the rest to its end can tell the field from bytes that look like it.
    """
    field = data[-SIZE:]
    if not field.startswith(_HEAD) or not (text := field[len(_HEAD) :]).isascii() or not is_traceparent(text.decode()):
        return data, b""
    return data[:-SIZE], field


def in_request(data: bytes) -> str:
    """The traceparent that a request of our own ends with, sampled or not."""
    return text_of(split(data)[1])


def mark(request: bytes, traceparent: str) -> bytes:
    """The fingerprint of a journaled request that has this traceparent."""
    return fingerprint(request.removesuffix(field_of(traceparent)) if traceparent else request)
