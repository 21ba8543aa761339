"""Quantities and amounts are integers: what is read is exact, what is not an integer is refused with its bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.errors import InvalidArgument
from entitlement.quantity import MAX_NANOS, MAX_QUANTITY, NANOS, format_amount, parse_amount, parse_integer, within

NOT_INTEGERS = [
    *("", " ", " 7", "7 ", " 7 ", "7\n", "\n7", "7\0", "+1", "007", "00", "-", "--1", "1-", "1.0", "1.", ".5", "1,000"),
    *("0x10", "-0x1", "0b1", "1e3", "1E3", "1_000", "nan", "NaN", "inf", "-inf", "Infinity", "12345678901234567890"),
    *("\u0667", "\uff17", "\u00b2", "\u0967\u0968"),  # digits, to other eyes
]
NOT_AMOUNTS = [
    *("", ".", "1.", ".5", "+1", "-", "--1", "1.2.3", "1,5", "1_0", "1e3", "0x10", "nan", "inf", " 7 ", "7 ", "1.5\n"),
    *("1.5\0", "1.0000000001", "12345678901", "\u0667.5", "1.\u0665"),
]


@pytest.mark.parametrize("text", NOT_INTEGERS, ids=repr)
def test_what_is_not_a_plain_decimal_integer_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^per: .*plain decimal integer$") as refusal:
        parse_integer("per", text, -MAX_NANOS, MAX_NANOS)
    assert refusal.value.field == "per"


@given(st.integers(-MAX_NANOS, MAX_NANOS))
def test_every_integer_of_64_bits_is_read_back_as_itself(value: int) -> None:
    assert parse_integer("n", str(value), -MAX_NANOS, MAX_NANOS) == value


def test_minus_zero_is_zero() -> None:
    assert parse_integer("n", "-0", 0, 1) == 0
    assert parse_amount("n", "-0.0") == 0


@pytest.mark.parametrize("value", [0, 1, MAX_QUANTITY])
def test_a_bound_is_inside_its_range(value: int) -> None:
    assert within("quantity", value, 0, MAX_QUANTITY) == value
    assert parse_integer("quantity", str(value), 0, MAX_QUANTITY) == value


@pytest.mark.parametrize("value", [-1, MAX_QUANTITY + 1, 2**53, 2**53 + 1, 2**63 - 1, -(2**63)])
def test_a_value_outside_its_range_is_refused_with_field_value_and_both_bounds(value: int) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        within("usage[0].quantity", value, 0, MAX_QUANTITY)
    assert str(refusal.value) == f"usage[0].quantity: {value} is outside 0..{MAX_QUANTITY}"


def test_a_long_text_does_not_flood_the_message() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_integer("n", "x" * 10_000, 0, 1)
    assert len(str(refusal.value)) < 120


@pytest.mark.parametrize("text", NOT_AMOUNTS, ids=repr)
def test_what_is_not_a_decimal_amount_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^amount: .*at most 9 decimals$"):
        parse_amount("amount", text)


@pytest.mark.parametrize(
    ("text", "nanos"),
    [
        ("0", 0),
        ("1", NANOS),
        ("12.5", 12_500_000_000),
        ("-12.5", -12_500_000_000),
        ("0.000000001", 1),
        ("-0.000000001", -1),
        ("9223372036.854775807", MAX_NANOS),
        ("-9223372036.854775807", -MAX_NANOS),
        ("0009", 9 * NANOS),
    ],
)
def test_an_amount_is_read_to_the_nano(text: str, nanos: int) -> None:
    assert parse_amount("amount", text) == nanos


@pytest.mark.parametrize("text", ["9223372036.854775808", "-9223372036.854775808", "9999999999"])
def test_an_amount_beyond_64_bits_is_refused_with_its_bound(text: str) -> None:
    with pytest.raises(InvalidArgument, match=str(MAX_NANOS)):
        parse_amount("amount", text)


@given(st.integers(-MAX_NANOS, MAX_NANOS))
def test_an_amount_survives_its_text(nanos: int) -> None:
    assert parse_amount("amount", format_amount(nanos)) == nanos


@pytest.mark.parametrize(
    ("nanos", "text"), [(1_500_000_000, "1.5"), (-1, "-0.000000001"), (10 * NANOS, "10"), (0, "0"), (100, "0.0000001")]
)
def test_an_amount_is_shown_without_trailing_zeros(nanos: int, text: str) -> None:
    assert format_amount(nanos) == text
