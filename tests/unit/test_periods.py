"""Anchored periods against Python's own calendar."""

from __future__ import annotations

import calendar
import itertools
import random
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.periods import DAY, HOUR, Recurrence, civil_from_days, days_from_civil, days_in_month, period

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
STEPS = {Recurrence.MONTH: 1, Recurrence.YEAR: 12}
moments = st.integers(-20 * 365 * DAY, 200 * 365 * DAY)  # 1950..2169
recurrences = st.sampled_from([r for r in Recurrence if r is not Recurrence.NEVER])


def ms(*parts: int) -> int:
    return (datetime(*parts, tzinfo=UTC) - EPOCH) // timedelta(milliseconds=1)  # type: ignore[misc, arg-type]


def moved(anchor_ms: int, months: int) -> int:
    """The anchor some months later, on the month's last day where it lacks the anchor's day. By datetime."""
    anchor = EPOCH + timedelta(milliseconds=anchor_ms)
    year, month = divmod(anchor.year * 12 + anchor.month - 1 + months, 12)
    day = min(anchor.day, calendar.monthrange(year, month + 1)[1])
    return (anchor.replace(year=year, month=month + 1, day=day) - EPOCH) // timedelta(milliseconds=1)


def expected(recurrence: Recurrence, anchor_ms: int, at_ms: int) -> tuple[int, int]:
    """By search: the one period between two neighbouring boundaries."""
    step = STEPS[recurrence]
    count = (at_ms - anchor_ms) // ((31 if at_ms > anchor_ms else 28) * DAY * step) - 2
    while moved(anchor_ms, (count + 1) * step) <= at_ms:
        count += 1
    return moved(anchor_ms, count * step), moved(anchor_ms, (count + 1) * step)


@given(st.sampled_from(sorted(STEPS)), moments, moments)
def test_months_and_years_agree_with_the_calendar(recurrence: Recurrence, anchor: int, at: int) -> None:
    assert period(recurrence, anchor, at) == expected(recurrence, anchor, at)


def test_months_and_years_agree_with_the_calendar_around_every_kind_of_month_end(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(5_000):
        year, month = rng.choice([1999, 2000, 2023, 2024, 2100, rng.randint(1971, 2199)]), rng.choice([1, 2, 2, 3, 12])
        last = calendar.monthrange(year, month)[1]
        anchor = ms(year, month, rng.randint(27, last) if last > 27 else last, rng.choice([0, 12, 23]), 59)
        recurrence = rng.choice(list(STEPS))
        boundary = moved(anchor, rng.randint(-40, 300) * STEPS[recurrence])
        for at in (boundary - 1, boundary, boundary + 1):
            assert period(recurrence, anchor, at) == expected(recurrence, anchor, at), (recurrence, anchor, at)


@given(recurrences, moments, moments)
def test_a_period_holds_its_moment_and_its_neighbours_touch_it(recurrence: Recurrence, anchor: int, at: int) -> None:
    start, end = period(recurrence, anchor, at)
    assert start <= at < end
    assert period(recurrence, anchor, start) == (start, end)
    assert period(recurrence, anchor, end - 1) == (start, end)
    assert period(recurrence, anchor, end)[0] == end
    assert period(recurrence, anchor, start - 1)[1] == start


@given(recurrences, moments)
def test_a_period_starts_at_its_anchor(recurrence: Recurrence, anchor: int) -> None:
    assert period(recurrence, anchor, anchor)[0] == anchor


@pytest.mark.parametrize(
    ("recurrence", "length"), [(Recurrence.HOUR, HOUR), (Recurrence.DAY, DAY), (Recurrence.WEEK, 7 * DAY)]
)
def test_hours_days_and_weeks_have_their_length(recurrence: Recurrence, length: int) -> None:
    anchor = ms(2024, 2, 28, 7, 30)
    start, end = period(recurrence, anchor, anchor + 10 * length + 5)
    assert (start - anchor, end - start) == (10 * length, length)
    assert period(recurrence, anchor, anchor - 1) == (anchor - length, anchor)


def test_never_is_one_period_without_an_end() -> None:
    assert period(Recurrence.NEVER, 5, 10**15) == (5, 0)


def test_a_month_anchored_on_the_31st_starts_on_the_last_day_of_shorter_months() -> None:
    anchor = ms(2024, 1, 31, 6)
    starts = [ms(2024, 1, 31, 6), ms(2024, 2, 29, 6), ms(2024, 3, 31, 6), ms(2024, 4, 30, 6), ms(2024, 5, 31, 6)]
    for start, end in itertools.pairwise(starts):
        assert period(Recurrence.MONTH, anchor, start) == (start, end)
        assert period(Recurrence.MONTH, anchor, end - 1) == (start, end)


def test_a_year_anchored_on_a_leap_day_starts_on_the_28th_in_common_years() -> None:
    anchor = ms(2024, 2, 29)
    assert period(Recurrence.YEAR, anchor, ms(2025, 6, 1)) == (ms(2025, 2, 28), ms(2026, 2, 28))
    assert period(Recurrence.YEAR, anchor, ms(2028, 2, 28)) == (ms(2027, 2, 28), ms(2028, 2, 29))


@given(st.dates(date(1600, 1, 1), date(3000, 12, 31)))
def test_civil_days_agree_with_date(day: date) -> None:
    number = day.toordinal() - date(1970, 1, 1).toordinal()
    assert days_from_civil(day.year, day.month, day.day) == number
    assert civil_from_days(number) == (day.year, day.month, day.day)


def test_the_length_of_every_month_agrees_with_the_calendar() -> None:
    for year in range(1896, 2105):
        for month in range(1, 13):
            assert days_in_month(year, month) == calendar.monthrange(year, month)[1]
