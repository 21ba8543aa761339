"""Integer quantities (units of a meter) and amounts (nanos, 1e-9 of a credit type). Never a float, anywhere."""

from __future__ import annotations

import re

from entitlement.errors import InvalidArgument

NANOS = 1_000_000_000
MAX_QUANTITY = 10**15  # units in one usage line
MAX_CUMULATIVE = 2**53 - 1  # units of one meter in one period: Lua numbers are exact below 2^53
MAX_PRICE = 10**12  # nanos: the price of `per` units
MAX_PER = 10**9  # units a price is for
MAX_FLAT = 10**15  # nanos: the fee for reaching a tier
MAX_NANOS = 2**63 - 1  # any amount or balance
MAX_LINES = 16  # usage lines in one request

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,18})", re.ASCII)
_DECIMAL = re.compile(r"(-?)([0-9]{1,10})(?:\.([0-9]{1,9}))?", re.ASCII)


def parse_integer(field: str, text: str, low: int, high: int) -> int:
    """A plain decimal integer within [low, high]; refuses '1e3', '0x10', ' 7 ', 'nan', '+1', '007' and other digits."""
    if not _INTEGER.fullmatch(text):
        raise InvalidArgument(field, f"{text[:40]!r} is not a plain decimal integer")
    return within(field, int(text), low, high)


def within(field: str, value: int, low: int, high: int) -> int:
    """The value itself, or an error that names the bound it breaks."""
    if not low <= value <= high:
        raise InvalidArgument(field, f"{value} is outside {low}..{high}")
    return value


def parse_amount(field: str, text: str) -> int:
    """Nanos from a decimal text such as '12.5' (at most 9 decimals), exactly."""
    match = _DECIMAL.fullmatch(text)
    if not match:
        raise InvalidArgument(field, f"{text[:40]!r} is not a decimal amount with at most 9 decimals")
    sign, whole, fraction = match.groups()
    nanos = int(whole) * NANOS + int((fraction or "").ljust(9, "0"))
    return within(field, -nanos if sign else nanos, -MAX_NANOS, MAX_NANOS)


def format_amount(nanos: int) -> str:
    """The decimal text of an amount, without trailing zeros: 1_500_000_000 -> '1.5'."""
    sign = "-" if nanos < 0 else ""
    whole, fraction = divmod(abs(nanos), NANOS)
    return f"{sign}{whole}.{fraction:09d}".rstrip("0").rstrip(".") if fraction else f"{sign}{whole}"
