"""What is counted on the way of every call: plain numbers, written by one event loop, read by whoever scrapes.

Nothing here is a metric object: to count a decision is one addition in a list, and its time another two. No number ever
falls, and each is added to in one place, so that whoever reads in another thread never sees one go back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Final

from entitlement.decision import Decision, Reason, Verdict
from entitlement.errors import (
    CorruptRecord,
    EntitlementError,
    IdempotencyMismatch,
    InvalidArgument,
    Overloaded,
    Unavailable,
)

BOUNDS_S: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
OVERLOADED: Final = "OVERLOADED"
OTHER: Final = "OTHER"
REFUSALS: Final[dict[type[EntitlementError], str]] = {
    InvalidArgument: "INVALID_ARGUMENT",
    IdempotencyMismatch: "IDEMPOTENCY_MISMATCH",
    Overloaded: OVERLOADED,
    Unavailable: "UNAVAILABLE",
    CorruptRecord: "CORRUPT_RECORD",
}


class Times:
    """How long things took: how many within each of BOUNDS_S, and beyond the last."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.seconds = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += count
        self.seconds += seconds * count

    @contextmanager
    def one(self) -> Iterator[None]:
        """What is done inside counts when it has succeeded."""
        began = perf_counter()
        yield
        self.add(perf_counter() - began)


class Tally:
    """`outcomes`: decisions by the numbers of verdict and reason. `took`: every call that was tried."""

    def __init__(self) -> None:
        self.outcomes = [[0] * (max(Reason) + 1) for _ in range(max(Verdict) + 1)]
        self.took = Times()
        self.batches = 0
        self.batched = 0
        self.refused = dict.fromkeys((*REFUSALS.values(), OTHER), 0)

    def all(self, outcomes: list[Decision | EntitlementError]) -> list[Decision | EntitlementError]:
        """The answers of one batch, as they are."""
        self.batches += 1
        self.batched += len(outcomes)
        counts = self.outcomes
        for outcome in outcomes:
            if type(outcome) is Decision:
                counts[outcome.verdict][outcome.reason] += 1
            else:
                self.refuse(outcome)  # type: ignore[arg-type]
        return outcomes

    def refuse(self, error: EntitlementError, count: int = 1) -> None:
        self.refused[word(error)] += count


def word(error: EntitlementError) -> str:
    """What a figure calls an error: one of a few."""
    return next((name for kind, name in REFUSALS.items() if isinstance(error, kind)), OTHER)
