"""Anchored periods, in UTC, as integer arithmetic on milliseconds since 1970. entitlement/lua/periods.lua is the twin.

Calendar arithmetic on the proleptic Gregorian calendar after Howard Hinnant, "chrono-Compatible Low-Level Date
Algorithms" (days_from_civil, civil_from_days).
"""

from __future__ import annotations

from enum import IntEnum

SECOND = 1_000
HOUR = 3_600 * SECOND
DAY = 24 * HOUR


class Recurrence(IntEnum):
    """How often something starts again. Numbers as in ledger.proto."""

    NEVER = 1
    HOUR = 2
    DAY = 3
    WEEK = 4
    MONTH = 5
    YEAR = 6


_LENGTH = {Recurrence.HOUR: HOUR, Recurrence.DAY: DAY, Recurrence.WEEK: 7 * DAY}
_MONTHS = {Recurrence.MONTH: 1, Recurrence.YEAR: 12}


def period(recurrence: Recurrence, anchor_ms: int, at_ms: int) -> tuple[int, int]:
    """The period [start, end) in milliseconds that holds `at_ms`; end 0 means it never ends.

    Months anchored on a day that a month lacks start on that month's last day.
    """
    if recurrence is Recurrence.NEVER:
        return anchor_ms, 0
    if recurrence in _LENGTH:
        length = _LENGTH[recurrence]
        start = anchor_ms + (at_ms - anchor_ms) // length * length
        return start, start + length
    step = _MONTHS[recurrence]
    anchor_days, anchor_time = divmod(anchor_ms, DAY)
    year, month, day = civil_from_days(anchor_days)
    at_year, at_month, _ = civil_from_days(at_ms // DAY)
    anchor_index = year * 12 + month - 1
    count = (at_year * 12 + at_month - 1 - anchor_index) // step
    if _boundary(anchor_index + count * step, day, anchor_time) > at_ms:
        count -= 1
    start = _boundary(anchor_index + count * step, day, anchor_time)
    end = _boundary(anchor_index + (count + 1) * step, day, anchor_time)
    return (start, end) if at_ms < end else (end, _boundary(anchor_index + (count + 2) * step, day, anchor_time))


def _boundary(month_index: int, day: int, time_of_day_ms: int) -> int:
    year, month0 = divmod(month_index, 12)
    return days_from_civil(year, month0 + 1, min(day, days_in_month(year, month0 + 1))) * DAY + time_of_day_ms


def days_in_month(year: int, month: int) -> int:
    if month == 2:
        return 29 if year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) else 28
    return 30 if month in (4, 6, 9, 11) else 31


def days_from_civil(year: int, month: int, day: int) -> int:
    """Days since 1970-01-01."""
    year -= month <= 2
    era, year_of_era = divmod(year, 400)
    day_of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    day_of_era = year_of_era * 365 + year_of_era // 4 - year_of_era // 100 + day_of_year
    return era * 146_097 + day_of_era - 719_468


def civil_from_days(days: int) -> tuple[int, int, int]:
    """(year, month, day) of a number of days since 1970-01-01."""
    era, day_of_era = divmod(days + 719_468, 146_097)
    year_of_era = (day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted = (5 * day_of_year + 2) // 153
    month = shifted + (3 if shifted < 10 else -9)
    return year_of_era + era * 400 + (month <= 2), month, day_of_year - (153 * shifted + 2) // 5 + 1
