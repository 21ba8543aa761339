"""How often, and how long after one another, the same call is tried."""

from __future__ import annotations

import random
from collections.abc import Callable

import grpc
import msgspec

from gateway.client.errors import RETRIED, EntitlementCallError


class Backoff(msgspec.Struct, frozen=True):
    """Exponential from `first_ms` to `most_ms`; the upper half of each pause is random, so that callers spread out."""

    first_ms: int = 10
    most_ms: int = 250
    jitter: Callable[[], float] = random.random  # in [0, 1)

    def pause_s(self, failures: int) -> float:
        """The pause after the n-th failure in a row, n >= 1."""
        assert failures >= 1
        whole_ms = min(self.first_ms << min(failures - 1, 30), self.most_ms)
        return whole_ms * (0.5 + 0.5 * self.jitter()) / 1000


class Attempts:
    """The attempts of one call, which end by its deadline on `clock` (seconds)."""

    def __init__(self, backoff: Backoff, timeout_s: float, clock: Callable[[], float]) -> None:
        self._backoff = backoff
        self._timeout = timeout_s
        self._clock = clock
        self._failures = 0
        self._away: EntitlementCallError | None = None  # the attempt before has failed with it
        self._deadline: float | None = clock() + timeout_s

    def left_s(self) -> float:
        assert self._deadline is not None
        return self._deadline - self._clock()

    def answered(self) -> None:
        """A stream that has answered has no deadline until it fails."""
        self._failures, self._away, self._deadline = 0, None, None

    def pause_s(self, problem: EntitlementCallError) -> float:
        """How long to wait before the next attempt. Raises `problem` when there may be none; or, when the deadline has
        cut this attempt short, that the gateway was away before.
        """
        if problem.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise self._away or problem
        self._away = problem if problem.code is grpc.StatusCode.UNAVAILABLE else None
        if self._deadline is None:
            self._deadline = self._clock() + self._timeout
        self._failures += 1
        pause_s = self._backoff.pause_s(self._failures)
        if problem.code not in RETRIED or pause_s >= self.left_s():
            raise problem
        return pause_s
