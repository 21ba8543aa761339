"""What a run of the benchmarks writes down: results/<date>.json, whole. Rates are a second, CPU is µs a decision."""

from __future__ import annotations

from typing import Final

import msgspec

from benchmarks.histogram import Histogram

SCHEMA: Final = 1
PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)


class Measure(msgspec.Struct, frozen=True):
    """One load and what it cost. Every intended decision is in `decisions`, `failed` or `skipped`."""

    name: str
    decisions: int = 0  # that were answered, in time or late
    allowed: int = 0
    denied: dict[str, int] = {}  # by reason
    failed: dict[str, int] = {}  # by gRPC status, or by what broke
    unknown: int = 0  # of the failed: they may have been decided all the same
    skipped: int = 0  # open loop: not sent, because too many were in flight
    late: int = 0  # answered after their deadline
    amount_nanos: int = 0
    seconds: float = 0.0
    offered_rate: float = 0.0  # open loop: calls a second that were intended; closed: 0
    batch: int = 1  # decisions in a call
    latency_ns: Histogram = Histogram()  # of calls, from the intended send
    lateness_ns: Histogram = Histogram()  # open loop: how late the generator itself was
    cpu_us: dict[str, float] = {}  # per decision: gateway, redis, ledger_sync, postgres, loadgen
    cpu_share: dict[str, float] = {}  # cores used meanwhile
    others_cpu: float = 0.0  # cores used by anything that is not ours
    stolen_cpu: float = 0.0  # cores that the hypervisor kept for others
    redis: dict[str, float] = {}  # per decision: calls of scripts, reads (round trips), bytes
    extra: dict[str, float] = {}
    example: str = ""  # of a failure
    replays_checked: int = 0
    replays_unequal: int = 0

    @property
    def failures(self) -> int:
        """Everything that was intended and not answered in time."""
        return sum(self.failed.values()) + self.skipped + self.late

    @property
    def rate(self) -> float:
        """Decisions a second."""
        return self.decisions / self.seconds if self.seconds > 0 else 0.0

    def percentile_us(self, percent: float) -> float:
        """Of calls; what failed, was skipped or late counts as longer than any."""
        return self.latency_ns.percentile(percent, self.failures // max(1, self.batch)) / 1e3


class Trial(msgspec.Struct, frozen=True):
    """One arm, run once on fresh processes. `problems`: what the correctness gate found; then its figures are void."""

    number: int
    measures: tuple[Measure, ...] = ()
    gate: dict[str, int] = {}
    problems: tuple[str, ...] = ()

    def measure(self, name: str) -> Measure | None:
        return next((measure for measure in self.measures if measure.name == name), None)


class ArmResult(msgspec.Struct, frozen=True):
    """Every trial of one arm."""

    name: str
    what: str
    trials: tuple[Trial, ...] = ()
    throughput: str = ""  # the measure whose rate must not vary by more than a tenth; empty: none is looked at

    def measured(self, name: str) -> list[Measure]:
        """A measure of each clean trial."""
        found = [trial.measure(name) for trial in self.trials if not trial.problems]
        return [measure for measure in found if measure is not None]


class ScenarioResult(msgspec.Struct, frozen=True):
    name: str
    what: str
    arms: tuple[ArmResult, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def arm(self, name: str) -> ArmResult | None:
        return next((arm for arm in self.arms if arm.name == name), None)


class Target(msgspec.Struct, frozen=True):
    """One line of the targets table. `met` None: not measured, or void."""

    what: str
    wanted: str
    found: str
    met: bool | None
    note: str = ""


class Results(msgspec.Struct, frozen=True):
    started: str
    seconds: float
    quick: bool
    trials: int
    command: str
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str]
    scenarios: tuple[ScenarioResult, ...]
    targets: tuple[Target, ...] = ()
    problems: tuple[str, ...] = ()  # each makes a number void, and the exit code 1
    schema: int = SCHEMA

    def scenario(self, name: str) -> ScenarioResult | None:
        return next((scenario for scenario in self.scenarios if scenario.name == name), None)

    def measured(self, scenario: str, arm: str, measure: str) -> list[Measure]:
        """A measure of each clean trial of an arm; empty when it was not run."""
        found = self.scenario(scenario)
        of = found.arm(arm) if found else None
        return of.measured(measure) if of else []

    def pairs(self, one: tuple[str, str, str], other: tuple[str, str, str]) -> list[tuple[Measure, Measure]]:
        """Two measures (scenario, arm, name) of each trial in which both are clean: runs next to each other in time."""
        ones, others = self._by_trial(*one), self._by_trial(*other)
        return [(ones[number], others[number]) for number in sorted(ones.keys() & others.keys())]

    def _by_trial(self, scenario: str, arm: str, name: str) -> dict[int, Measure]:
        found = self.scenario(scenario)
        of = found.arm(arm) if found else None
        trials = [(trial.number, trial.measure(name)) for trial in of.trials if not trial.problems] if of else []
        return {number: measure for number, measure in trials if measure is not None}


def encode(results: Results) -> bytes:
    return msgspec.json.encode(results) + b"\n"


def decode(data: bytes) -> Results:
    """ValueError: it is not a results file of this schema."""
    results = msgspec.json.decode(data, type=Results)
    if results.schema != SCHEMA:
        raise ValueError(f"results of schema {results.schema}; this program reads {SCHEMA}")
    return results
