"""Figures: what is counted on the way of a call, how it is shown, and that the manual names all of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import pytest

from entitlement.decision import Charge, Consume, Decision, Line, Mismatch, Mode, Outcome, Reason, Verdict
from entitlement.errors import EntitlementError, IdempotencyMismatch, Overloaded, Unavailable
from entitlement.probes import Component, Pulse
from gateway.admission import Admission
from gateway.catalog import Catalog
from gateway.figures import Figures, Parts
from gateway.tally import BOUNDS_S, Times
from tests.figures import declared
from tests.pages import ROOT

Samples = dict[tuple[str, tuple[str, ...]], float]


def decision(verdict: Verdict = Verdict.ALLOW, reason: Reason = Reason.NONE) -> Decision:
    return Decision(verdict, reason, -1, False, 1, 1, "USD", 0, 0, 0, 0, 0, "1", (), (), False)


def call(key: str) -> Consume:
    return Consume("acme", "bob", "", key, Mode.NORMAL, 0, (Line("tokens", 1),), b"")


class Store:
    """Answers in order; an error is raised. It has no receipts, no streams and no probe."""

    comings, round_trips, opening, reached, why = 2, 7, 1, True, ""

    def __init__(self, *answers: Outcome | EntitlementError) -> None:
        self.answers = list(answers)
        self.probe = Times()

    async def consume(self, request: Consume, charge: Charge) -> Outcome:
        answer = self.answers.pop(0)
        if isinstance(answer, EntitlementError):
            raise answer
        return answer

    async def consume_many(self, calls: Sequence[tuple[Consume, Charge]]) -> list[Outcome]:
        return [await self.consume(*each) for each in calls]


class Degraded:
    granted, denied = 3, 4

    async def decide(self, request: Consume, away: Unavailable) -> Decision:
        raise away


class Anything:
    """Receipts and holds that count nothing."""

    size = pending = replayed = damaged = refused = 0
    max_bytes = 100
    calls: dict[tuple[str, str], int] = {("reserve", "ALLOW"): 5}  # noqa: RUF012
    written = type("Written", (), {"receipts": 0, "syncs": 0, "sync_s": 0.0})()


def admission(*answers: Outcome | EntitlementError, most: int = 100) -> Admission:
    return Admission(cast(Any, Store(*answers)), Catalog(), cast(Any, None), Degraded(), most)


def samples(*deciding: Admission, ready: bool = True) -> Samples:
    figures = Figures()
    for each in deciding:
        store: Any = each._store
        figures.parts += (
            Parts(
                *(each, cast(Any, Anything()), store, cast(Any, Anything()), cast(Any, each._degraded), Catalog()),
                *(Pulse(lambda: 0.0), lambda: 1, lambda: 0, lambda: {"redis": Component(ready)}),
                *(lambda: {"UNAUTHENTICATED": 2}, lambda: True, lambda: False),
            ),
        )
    return {
        (sample.name.removeprefix("entitlement_gateway_"), tuple(sample.labels.values())): sample.value
        for family in figures.collect()
        for sample in family.samples
    }


async def test_every_decision_is_counted_once_by_verdict_and_reason() -> None:
    poor = decision(Verdict.DENY, Reason.INSUFFICIENT_CREDITS)
    deciding = admission(decision(), poor, decision(), poor, decision())
    for key in ("k1", "k2"):
        await deciding.admit(call(key))
    await deciding.admit_many([call("k3"), call("k4"), call("k5")])
    found = samples(deciding)
    assert found["decisions_total", ("ALLOW", "NONE")] == 3
    assert found["decisions_total", ("DENY", "INSUFFICIENT_CREDITS")] == 2
    assert (found["batches_total", ()], found["batched_decisions_total", ()]) == (1, 3)
    assert found["decision_seconds_count", ()] == 5
    assert found["in_flight", ()] == 0


async def test_what_is_not_decided_is_counted_by_why() -> None:
    deciding = admission(Mismatch(), Unavailable("away"), Mismatch(), decision(), Unavailable("away"), most=2)
    with pytest.raises(IdempotencyMismatch):
        await deciding.admit(call("k1"))
    with pytest.raises(Unavailable):
        await deciding.admit(call("k2"))
    assert [type(each) for each in await deciding.admit_many([call("k3"), call("k4")])] == [
        IdempotencyMismatch,
        Decision,
    ]
    with pytest.raises(Unavailable):
        await deciding.admit_many([call("k5"), call("k6")])
    with pytest.raises(Overloaded):
        await deciding.admit_many([call(f"k{number}") for number in range(3)])
    found = samples(deciding)
    refused = {labels[0]: value for (name, labels), value in found.items() if name == "refused_total" and value}
    assert refused == {"IDEMPOTENCY_MISMATCH": 2, "UNAVAILABLE": 3, "OVERLOADED": 3}
    assert found["decisions_total", ("ALLOW", "NONE")] == 1


def test_a_histogram_is_cumulative_and_its_bounds_belong_to_the_bucket_below() -> None:
    deciding = admission()
    deciding.tally.took.add(0.001)
    deciding.tally.took.add(0.0011, 10)
    deciding.tally.took.add(60.0)
    found = samples(deciding)
    buckets = [found["decision_seconds_bucket", (str(bound),)] for bound in (0.0005, 0.001, 0.002, 5.0, "+Inf")]
    assert buckets == [0, 1, 11, 11, 12]
    assert found["decision_seconds_sum", ()] == pytest.approx(0.001 + 0.011 + 60)
    assert list(BOUNDS_S) == sorted(BOUNDS_S)


async def test_event_loops_of_one_process_are_added_and_the_worst_of_them_is_told() -> None:
    one, other = admission(decision()), admission(decision())
    await one.admit(call("k1"))
    await other.admit(call("k2"))
    found = samples(one, other, ready=False)
    assert found["decisions_total", ("ALLOW", "NONE")] == 2
    assert found["redis_round_trips_total", ()] == 14
    assert found["degraded_decisions_total", ("ALLOW",)] == 6
    assert found["hold_calls_total", ("reserve", "ALLOW")] == 10
    assert found["ready", ("redis",)] == 0
    assert found["catalogue_generation", ()] == -1


def test_figures_can_be_read_before_anything_runs() -> None:
    found = samples()
    assert found["decision_seconds_bucket", ("+Inf",)] == 0
    assert found["opening", ()] == 0


def test_no_label_grows_with_the_traffic() -> None:
    labels = {label for figure in declared() for label in figure.labels}
    assert labels == {"verdict", "reason", "error", "kind", "outcome", "component", "loop", "version"}


def test_the_manual_has_every_figure() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    told = re.findall(r"^\| `(entitlement_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    wanted = [(each.name, each.kind, ", ".join(f"`{name}`" for name in each.labels), each.text) for each in declared()]
    assert told == wanted
