"""Fields of the control plane's messages ↔ values, each checked: an error names field, problem and bound."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Final

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.errors import InvalidArgument
from entitlement.identity import MAX_DIMENSIONS, check_id, check_name, check_value
from entitlement.periods import Recurrence
from entitlement.v1 import ledger_pb2 as pb

MAX_SECONDS: Final = 253_402_300_799  # 9999-12-31T23:59:59Z, protobuf's own bound
MAX_TEXT_BYTES: Final = 256
PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1_000

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def to_ms(field: str, time: Timestamp) -> int:
    """Milliseconds since 1970 of a time from 1970 to 9999; finer digits are cut."""
    if not 0 <= time.seconds <= MAX_SECONDS:
        raise InvalidArgument(f"{field}.seconds", f"{time.seconds} is outside 0..{MAX_SECONDS}")
    if not 0 <= time.nanos <= 999_999_999:
        raise InvalidArgument(f"{field}.nanos", f"{time.nanos} is outside 0..999999999")
    return time.seconds * 1000 + time.nanos // 1_000_000


def to_timestamp(ms: int) -> Timestamp:
    seconds, rest = divmod(ms, 1000)
    return Timestamp(seconds=seconds, nanos=rest * 1_000_000)


def check_text(field: str, text: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Free text: at most `limit` bytes, no control characters and nothing that turns the writing direction."""
    size = len(text.encode())
    if size > limit:
        raise InvalidArgument(field, f"has {size} bytes; expected at most {limit}")
    if _CONTROL.search(text):
        raise InvalidArgument(field, f"{text[:40]!a} has a control character")
    return text


def recurrence(field: str, number: int, default: Recurrence) -> Recurrence:
    """The recurrence of its number in ledger.proto; 0 is the default."""
    if number == 0:
        return default
    try:
        return Recurrence(number)
    except ValueError:
        raise InvalidArgument(field, f"{number} is unknown; expected 0..{max(Recurrence)}") from None


def unsupported(field: str, what: str) -> InvalidArgument:
    """What this version would have to accept and ignore, it refuses."""
    return InvalidArgument(field, f"{what} is not supported yet; leave the field out")


def check_known(field: str, number: int, names: Sequence[int]) -> int:
    """An enum's number, one of `names`."""
    if number not in names:
        raise InvalidArgument(field, f"{number} is unknown; expected one of {', '.join(map(str, names))}")
    return number


def check_features(field: str, features: Sequence[str], limit: int) -> tuple[str, ...]:
    """Names of features, sorted, each once."""
    if len(features) > limit:
        raise InvalidArgument(field, f"has {len(features)} features; expected at most {limit}")
    for index, feature in enumerate(features):
        check_name(f"{field}[{index}]", feature)
    if len(set(features)) != len(features):
        raise InvalidArgument(field, "names a feature twice")
    return tuple(sorted(features))


def check_dimensions(field: str, dimensions: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Dimensions sorted by name."""
    if len(dimensions) > MAX_DIMENSIONS:
        raise InvalidArgument(field, f"has {len(dimensions)} dimensions; expected at most {MAX_DIMENSIONS}")
    for name, value in dimensions.items():
        check_name(f"{field} key", name)
        check_value(f"{field}[{name}]", value)
    return tuple(sorted(dimensions.items()))


class Page(msgspec.Struct, frozen=True):
    """Which part of a listing: at most `size` items after the one that `after` names (empty: from the start)."""

    size: int
    after: tuple[str | int, ...] = ()
    customer: str = ""
    from_ms: int = 0
    until_ms: int = 0  # 0: no end


def page_of(request: pb.ListRequest, *, after: Sequence[type], customer: bool = False, times: bool = False) -> Page:
    """The page a request asks for. `after` are the types of the listing's sort key; what the listing cannot filter by
    is refused, not ignored.
    """
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        raise InvalidArgument("page_size", f"{request.page_size} is outside 0..{MAX_PAGE_SIZE} (0: {PAGE_SIZE})")
    if request.customer:
        if not customer:
            raise InvalidArgument("customer", "does not filter this listing; leave the field out")
        check_id("customer", request.customer)
    times_ms = {}
    for field in ("from", "to"):
        if request.HasField(field):
            if not times:
                raise InvalidArgument(field, "does not filter this listing; leave the field out")
            times_ms[field] = to_ms(field, getattr(request, field))
    if times_ms.get("to", 2**63) <= times_ms.get("from", 0):
        raise InvalidArgument("to", "is not later than from")
    return Page(
        request.page_size or PAGE_SIZE,
        _parse_token(request.page_token, after),
        request.customer,
        times_ms.get("from", 0),
        times_ms.get("to", 0),
    )


def page_token(*after: str | int) -> str:
    """An opaque token that continues after the item with this sort key."""
    return base64.urlsafe_b64encode(msgspec.json.encode(after)).decode()


def _parse_token(token: str, types: Sequence[type]) -> tuple[str | int, ...]:
    if not token:
        return ()
    try:
        key = msgspec.json.decode(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
        if isinstance(key, list) and tuple(map(type, key)) == tuple(types):
            return tuple(key)
    except (ValueError, msgspec.DecodeError):
        pass
    raise InvalidArgument("page_token", f"{token[:40]!r} is not one that this listing gave")
