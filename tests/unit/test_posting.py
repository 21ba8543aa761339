"""One record: what it means in double entry, or why it cannot be booked."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement import journal
from entitlement.identity import fingerprint
from entitlement.journal import Adjusted, Burn, Consumed, Rolled
from ledger_sync.posting import Entry, Posted, Reason, Rejected, changes, consume_entries, read, timestamp
from tests.journal_records import NOW_MS, PERIOD_MS, adjusted, arrival, consumed, posted, request, rolled

GRANTS = {1: "ada-1", 2: "ada-2"}


def entries(record: Consumed) -> list[Entry]:
    return consume_entries(posted(record), record, GRANTS)


def rejection(data: journal.Record | bytes) -> Rejected:
    found = read(arrival(data))
    assert isinstance(found, Rejected), found
    return found


def test_a_consumption_takes_from_its_grant_and_gives_to_the_feature() -> None:
    record = consumed("k", 1, ("input.tokens", 10, 100, {1: 100}))
    assert entries(record) == [("grant:ada-1", 1, -100), ("revenue:input.tokens", None, 100)]


def test_each_grant_touched_is_one_entry_and_so_is_each_feature() -> None:
    record = consumed(
        "k",
        1,
        ("input.tokens", 10, 100, {1: 60, 2: 40}),
        ("input.tokens", 1, 10, {2: 10}),
        ("output.tokens", 5, 50, {2: 20, 0: 30}),
    )
    assert entries(record) == [
        ("grant:ada-1", 1, -60),
        ("grant:ada-2", 2, -70),
        ("overage:ada", None, -30),
        ("revenue:input.tokens", None, 110),
        ("revenue:output.tokens", None, 50),
    ]


def test_what_costs_nothing_has_no_entries() -> None:
    assert entries(consumed("k", 1, ("input.tokens", 10, 0, {}))) == []


def test_a_grant_that_is_not_known_is_not_guessed_at() -> None:
    record = consumed("k", 1, ("input.tokens", 10, 100, {9: 100}))
    with pytest.raises(KeyError):
        entries(record)


amounts = st.integers(1, 2**62)
burned = st.dictionaries(st.integers(0, 2), amounts, min_size=1, max_size=3)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), burned), min_size=1, max_size=16))
def test_entries_of_any_consumption_sum_to_zero(lines: list[tuple[str, dict[int, int]]]) -> None:
    record = consumed("k", 1, *[(feature, 1, sum(burns.values()), burns) for feature, burns in lines])
    made = consume_entries(Posted(arrival(b""), record, timestamp(0), lines=posted_lines(lines)), record, GRANTS)
    assert sum(amount for _, _, amount in made) == 0
    assert all(amount for _, _, amount in made)
    assert len({account for account, _, _ in made}) == len(made)


def posted_lines(lines: list[tuple[str, dict[int, int]]]) -> tuple[object, ...]:
    return posted(consumed("k", 1, *[(feature, 1, 1, {1: 1}) for feature, _ in lines])).lines


def test_a_roll_without_overage_books_nothing() -> None:
    assert list(changes(rolled(4, start=PERIOD_MS), GRANTS)) == []


def test_a_roll_moves_closed_overage_to_the_invoice() -> None:
    (booking,) = changes(rolled(4, start=PERIOD_MS, closed=70), GRANTS)
    assert (booking.kind, booking.key) == ("close", "roll:ada:1:4")
    assert booking.entries == [("overage:ada", None, 70), ("receivable:ada", None, -70)]


def test_a_change_books_what_it_removed_moved_and_repaid() -> None:
    record = adjusted(5, 3, removed={1: 10}, reclassed={2: 20}, repaid={1: 5, 2: 6})
    made = {booking.kind: booking.entries for booking in changes(record, GRANTS)}
    assert made == {
        "void": [("grant:ada-1", 1, -10), ("breakage", None, 10)],
        "reclass": [("grant:ada-2", 2, 20), ("overage:ada", None, -20)],
        "repay": [("grant:ada-1", 1, -5), ("grant:ada-2", 2, -6), ("overage:ada", None, 11)],
    }
    assert {booking.key for booking in changes(record, GRANTS)} == {"delta:ada:3"}


def test_a_change_that_moves_nothing_books_nothing() -> None:
    assert list(changes(adjusted(5, 3, removed={1: 0}), GRANTS)) == []


def test_reading_gives_all_that_the_booking_needs() -> None:
    record = consumed("key-1", 1, ("input.tokens", 10, 100, {1: 100}), subject="user-9")
    found = posted(record)
    assert (found.key, found.subject, found.record) == ("key-1", "user-9", record)
    assert found.fingerprint == fingerprint(record.request)
    assert found.recorded_at == timestamp(record.recorded_ms)
    assert [(line.feature, line.dimensions) for line in found.lines] == [("input.tokens", (("model", "m1"),))]


def test_times_are_exact_to_the_millisecond() -> None:
    assert timestamp(NOW_MS).isoformat() == "2026-01-02T03:04:05.678000+00:00"
    assert timestamp(2**47 + 1).timestamp() * 1000 == 2**47 + 1


@pytest.mark.parametrize("cut", [0, 1, 10, 33, 60, 120])
def test_a_truncated_record_is_undecodable(cut: int) -> None:
    assert rejection(journal.encode(consumed("k", 1))[:cut]).reason is Reason.UNDECODABLE


def test_an_unknown_codec_is_undecodable() -> None:
    data = b"\xfe" + journal.encode(consumed("k", 1))[1:]
    assert rejection(data).reason is Reason.UNDECODABLE


BAD_REQUESTS = {
    "no request": b"\xff\xff",
    "another customer": request("k", "eve", (("input.tokens", 10, 100, {}),)),
    "no key": request("", "ada", (("input.tokens", 10, 100, {}),)),
    "a key that is no id": request('k","x":"', "ada", (("input.tokens", 10, 100, {}),)),
    "a subject that is no id": request("k", "ada", (("input.tokens", 10, 100, {}),), 'a"b'),
    "a feature that is no name": request("k", "ada", (("Input", 10, 100, {}),)),
    "a dimension that is no value": request("k", "ada", (("input.tokens", 10, 100, {}),), model='"'),
    "other lines": request("k", "ada", (("input.tokens", 10, 100, {}), ("output.tokens", 1, 1, {}))),
}


@pytest.mark.parametrize("payload", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_request_that_no_gateway_decides_is_rejected(payload: bytes) -> None:
    assert rejection(consumed("k", 1, payload=payload)).reason is Reason.BAD_REQUEST


def test_a_time_beyond_the_calendar_is_rejected() -> None:
    assert rejection(consumed("k", 1, event_ms=2**52)).reason is Reason.BAD_REQUEST


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_rejected(data: bytes) -> None:
    assert isinstance(read(arrival(data)), Posted | Rejected)


@given(
    st.integers(0, 500), st.integers(0, 255), st.sampled_from([consumed("k", 1), rolled(1, start=0), adjusted(1, 1)])
)
def test_a_flipped_byte_is_read_or_rejected(place: int, value: int, record: Consumed | Rolled | Adjusted) -> None:
    data = bytearray(journal.encode(record))
    data[place % len(data)] = value
    assert isinstance(read(arrival(bytes(data))), Posted | Rejected)


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        posted(consumed("k", 1)).key = "other"  # type: ignore[misc]
    assert msgspec.structs.replace(Burn(1, 2), amount=3) == Burn(1, 3)
