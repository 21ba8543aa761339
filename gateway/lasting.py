"""Calls that last until their caller ends them. A gateway that stops ends them, so that they go on elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from entitlement.errors import Unavailable

STOPPING = "the gateway is being stopped: go on elsewhere"


class Lasting:
    """Who is to be told. Nothing lasts any more once it is `over`."""

    def __init__(self) -> None:
        self.over = False
        self._ends: list[Callable[[], None]] = []

    @contextmanager
    def told(self, end: Callable[[], None]) -> Iterator[None]:
        """`end` is called, once, when it is over; at once if it is already."""
        self._ends.append(end)
        try:
            if self.over:
                end()
            yield
        finally:
            self._ends.remove(end)

    def end(self) -> None:
        """May be called twice."""
        if not self.over:
            self.over = True
            for end in tuple(self._ends):
                end()

    def check(self) -> None:
        """Raises Unavailable when it is over."""
        if self.over:
            raise Unavailable(STOPPING)
