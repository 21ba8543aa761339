"""What scenarios are made of, and how long they take in a whole and in a quick run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Protocol

import msgspec

from benchmarks.bed import Bed
from benchmarks.generator import Choice, Load
from benchmarks.model import Measure
from benchmarks.site import Site

CLOSED: Final = 64  # calls in flight that saturate a gateway
CLOSED_BATCHES: Final = 4
CLOSED_STREAM: Final = 512
OPEN_IN_FLIGHT: Final = 2_000  # below what a connection may have: what would be more is a failure
OPEN_DEADLINE_MS: Final = 1_000
REPLAYS: Final = 100


class Run(msgspec.Struct):
    """What one run of an arm found."""

    measures: list[Measure] = []
    gate: dict[str, int] = {}
    problems: list[str] = []


class Session:
    """One run of the benchmarks. A whole run gives every arm fresh processes; a quick one shares them in a scenario."""

    def __init__(self, bed: Bed, *, quick: bool, trials: int, trace: Path | None, grpcio: Sequence[str]) -> None:
        self.bed = bed
        self.quick = quick
        self.trials = trials
        self.trace = trace
        self.grpcio = tuple(grpcio)
        self._shared: dict[tuple[str, str, str], Site] = {}
        self._exits = ExitStack()

    def pick(self, whole: float, quick: float) -> float:
        return quick if self.quick else whole

    def count(self, whole: int, quick: int) -> int:
        return quick if self.quick else whole

    @contextmanager
    def site(self, transport: str = "envoy", durability: str = "receipt", mapping: str = "") -> Iterator[Site]:
        """A stack that is warm."""
        if not self.quick:
            with self.bed.site(transport, durability, mapping) as site:
                self._warm(site)
                yield site
            return
        kind = (transport, durability, mapping)
        if kind not in self._shared:
            self._shared[kind] = self._exits.enter_context(self.bed.site(*kind))
            self._warm(self._shared[kind])
        yield self._shared[kind]

    def _warm(self, site: Site) -> None:
        seconds = self.pick(1.0, 0.3)
        with site.paused():
            site.warm_up(seconds, Load(customers=self.bed.rich, in_flight=CLOSED))
            site.warm_up(seconds / 2, Load(mode="batch", batch=64, customers=self.bed.rich, in_flight=CLOSED_BATCHES))

    def end_scenario(self) -> None:
        self._shared.clear()
        self._exits.close()


class Arm(msgspec.Struct, frozen=True):
    """One of the things that a scenario compares."""

    name: str
    what: str
    run: Callable[[Session], Run]
    throughput: str = ""  # the measure whose rate tells whether the set of trials is void


class Scenario(Protocol):
    """A question to measure."""

    name: str
    what: str

    def arms(self, session: Session) -> list[Arm]: ...


def closed(session: Session, whole_s: float, quick_s: float, customers: Choice | None = None) -> Load:
    """Unary calls, always so many in flight."""
    who = customers or session.bed.rich
    return Load(customers=who, in_flight=CLOSED, seconds=session.pick(whole_s, quick_s), replays=REPLAYS)


def batched(session: Session, size: int, count: int, customers: Choice | None = None) -> Load:
    """Batches of a size, enough of them in flight."""
    in_flight = CLOSED_BATCHES if size > 1 else CLOSED
    who = customers or session.bed.rich
    return Load(
        "batch",
        batch=size,
        customers=who,
        in_flight=in_flight,
        count=count,
        seconds=session.pick(20, 2),
        replays=REPLAYS,
    )


def opened(session: Session, rate: float, seconds: float) -> Load:
    """Unary calls that come when they come."""
    return Load(
        customers=session.bed.rich,
        open=True,
        poisson=True,
        rate=max(1.0, rate),
        in_flight=OPEN_IN_FLIGHT,
        deadline_ms=OPEN_DEADLINE_MS,
        seconds=seconds,
        replays=REPLAYS,
    )


def settled(site: Site, run: Run) -> Run:
    """The run with its gate."""
    run.gate, problems = site.settle()
    run.problems += problems
    return run


def stopwatch() -> Callable[[], float]:
    began = time.monotonic()
    return lambda: time.monotonic() - began
