"""The book of a meter: what was told is reported once, in order, and forgotten when it is acknowledged."""

from __future__ import annotations

import pytest

from entitlement.quantity import MAX_LINES
from entitlement.v1 import gateway_pb2 as pb
from gateway.client import InvalidArgument, Usage
from gateway.client.meter_book import Book


def book(*due: Usage) -> Book:
    return Book(pb.ReserveRequest(hold_id="h", customer="c"), due)


def test_what_is_gathered_is_one_report_by_feature_and_dimensions() -> None:
    found = book()
    for quantity, model in ((1, "a"), (2, "b"), (3, "a"), (0, "c")):
        found.use("t", quantity, {"model": model})
    assert (found.open_units, found.unheard) == (6, 6) and not found.reports
    found.number(ending=False)
    found.number(ending=False)  # Nothing new: no report.
    ((number, message),) = found.unsent(0)
    assert (number, message.report.idempotency_key, message.report.final) == (1, "h/1", False)
    assert [(line.quantity, line.dimensions["model"]) for line in message.report.usage] == [(4, "a"), (2, "b")]
    assert found.unacknowledged == (Usage("t", 4, {"model": "a"}), Usage("t", 2, {"model": "b"}))
    assert found.acknowledge(1) and not found.acknowledge(1)
    assert (found.open_units, found.unacknowledged) == (0, ())


def test_more_lines_than_a_report_takes_are_several_and_only_the_last_is_final() -> None:
    found = book()
    for number in range(MAX_LINES + 1):
        found.use(f"f{number}", 1, None)
    found.number(ending=True)
    found.use("late", 1, None)
    found.number(ending=True)  # After the final one there is none.
    assert [(number, message.report.final, len(message.report.usage)) for number, message in found.unsent(0)] == [
        (1, False, MAX_LINES),
        (2, True, 1),
    ]
    assert [number for number, _ in found.unsent(1)] == [2]  # On another connection the rest of them.


def test_an_end_without_usage_is_an_empty_final_report() -> None:
    found = book()
    found.number(ending=True)
    ((_, message),) = found.unsent(0)
    assert message.report.final and not message.report.usage and found.final


def test_what_is_due_counts_until_an_answer_to_it_is_heard() -> None:
    found = book(Usage("t", 10))
    assert found.unheard == 0 and found.opening().due[0].quantity == 10  # The first answer takes it into account.
    found.expect((Usage("t", 25),))
    assert found.unheard == 15
    found.use("t", 1, None)
    found.number(ending=False)
    ((_, message),) = found.unsent(0)
    assert message.due[0].quantity == 25 and found.unheard == 16
    assert found.acknowledge(1) and found.unheard == 0


@pytest.mark.parametrize("quantity", [-1, 2**63, 1.5, "1"])
def test_what_is_no_quantity_is_refused_and_not_kept(quantity: int) -> None:
    found = book()
    with pytest.raises(InvalidArgument, match="is not a whole number in 0"):
        found.use("t", quantity, None)
    with pytest.raises(InvalidArgument):
        found.expect((Usage("t", quantity),))
    assert found.open_units == found.unheard == 0
