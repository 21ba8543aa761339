"""How long to wait before the same key is tried again."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec


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
