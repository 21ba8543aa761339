"""The correctness gate: a run whose books do not balance has no figures."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.gate import Books, Tally, judge
from benchmarks.model import Measure

CLEAN = Books(
    events=100,
    total_nanos=500,
    drifted=0,
    drift_nanos=0,
    unbalanced=0,
    lag=0,
    quarantined=0,
    gaps=0,
    customers=7,
    unequal=0,
    overspent=0,
)
TOLD = Tally(allowed=100, amount_nanos=500, replays_checked=10)


def test_books_that_say_what_the_callers_were_told_pass() -> None:
    assert judge(TOLD, CLEAN) == []


@pytest.mark.parametrize(
    "fault", ["drifted", "drift_nanos", "unbalanced", "lag", "quarantined", "gaps", "unequal", "overspent"]
)
def test_any_fault_in_the_books_is_a_problem(fault: str) -> None:
    assert judge(TOLD, msgspec.structs.replace(CLEAN, **{fault: 1})) == [f"{fault} 1"]


@pytest.mark.parametrize("events", [99, 101])
def test_a_lost_or_doubled_decision_is_a_problem(events: int) -> None:
    (problem,) = judge(TOLD, msgspec.structs.replace(CLEAN, events=events))
    assert problem == f"100 decisions were allowed, {events} are in the ledger"


def test_a_nano_that_nobody_was_told_of_is_a_problem() -> None:
    assert judge(TOLD, msgspec.structs.replace(CLEAN, total_nanos=501)) == [
        "500 nanos were charged, 501 are in the ledger"
    ]


def test_a_call_whose_outcome_is_unknown_may_be_booked_or_not() -> None:
    told = msgspec.structs.replace(TOLD, unknown=2)
    for events, problems in ((99, 1), (100, 0), (102, 0), (103, 1)):
        found = judge(told, msgspec.structs.replace(CLEAN, events=events, total_nanos=500 + events))
        assert len(found) == problems, events


def test_a_replay_that_differs_is_a_problem() -> None:
    told = msgspec.structs.replace(TOLD, replays_unequal=1)
    assert judge(told, CLEAN) == ["1 of 10 replays were not equal"]


def test_a_tally_adds_up_over_all_loads() -> None:
    tally = Tally()
    for _ in range(2):
        tally.add(Measure("load", allowed=3, amount_nanos=6, unknown=1, replays_checked=2, replays_unequal=1))
    assert tally == Tally(allowed=6, amount_nanos=12, unknown=2, replays_checked=4, replays_unequal=2)
