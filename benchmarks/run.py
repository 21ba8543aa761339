"""Runs scenarios: every arm of a trial next to the others, forwards and backwards in turn, within a budget of time."""

from __future__ import annotations

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

import grpc
import msgspec
from asyncpg import PostgresError
from redis.exceptions import RedisError

from benchmarks.generator import GeneratorFailed
from benchmarks.model import ArmResult, Measure, ScenarioResult, Trial
from benchmarks.session import Arm, Run, Scenario, Session
from benchmarks.spread import is_void, order
from entitlement.errors import EntitlementError
from gateway.cli.child import ChildFailed

Say = Callable[[str], None]

BELOW_SATURATION: Final = 70  # percent of the capacity, in an open loop
MAX_OTHERS: Final = 0.1  # cores that other programs may use without being mentioned
MAX_STOLEN: Final = 0.02  # cores
MAX_LATENESS_MS: Final = 1.0
TOO_MANY: Final = ", too many"  # ends the name of a load that was more than the gateway can do

# What may go wrong with a run without ending the others: its figures are void.
_BROKEN: Final = (
    *(GeneratorFailed, ChildFailed, grpc.RpcError, PostgresError, RedisError, EntitlementError),
    *(subprocess.SubprocessError, OSError, RuntimeError, AssertionError, TimeoutError, ValueError),
)


class Budget:
    """An end in time: what would begin after it is left out, and said so."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def spent(self) -> bool:
        return self._clock() >= self._end


def run_scenario(scenario: Scenario, session: Session, budget: Budget, say: Say) -> ScenarioResult:
    """All its trials. A run that breaks is a trial with a problem."""
    arms = scenario.arms(session)
    trials: dict[str, list[Trial]] = defaultdict(list)
    began, left_out = time.monotonic(), 0
    try:
        for number, arm in order(arms, session.trials):
            if budget.spent:
                left_out += 1
                continue
            at = time.monotonic()
            trial = _run(arm, number, session)
            trials[arm.name].append(trial)
            say(_line(scenario, arm, trial, time.monotonic() - at))
    finally:
        session.end_scenario()
    results = tuple(ArmResult(arm.name, arm.what, tuple(trials[arm.name]), arm.throughput) for arm in arms)
    notes = [f"{left_out} runs were left out: the time was over"] if left_out else []
    notes += void_notes(results) + noise_notes(results)
    return ScenarioResult(scenario.name, scenario.what, results, tuple(notes), round(time.monotonic() - began, 1))


def void_notes(arms: Sequence[ArmResult]) -> list[str]:
    """The trial sets that varied too much."""
    return [
        f"{arm.name}: void, the throughput of {arm.throughput!r} varied by more than a tenth between trials"
        for arm in arms
        if arm.throughput and is_void([measure.rate for measure in arm.measured(arm.throughput)])
    ]


def noise_notes(arms: Sequence[ArmResult]) -> list[str]:
    """What was in the way: other programs at work meanwhile, a generator that could not keep its own times."""
    measures = [(arm.name, measure) for arm in arms for trial in arm.trials for measure in trial.measures]
    notes = []
    busy = max(((m.others_cpu, f"{arm}, {m.name}") for arm, m in measures), default=(0.0, ""))
    if busy[0] > MAX_OTHERS:
        notes.append(f"noisy: other programs used up to {busy[0]:.2f} cores ({busy[1]})")
    stolen = max(((m.stolen_cpu, f"{arm}, {m.name}") for arm, m in measures), default=(0.0, ""))
    if stolen[0] > MAX_STOLEN:
        notes.append(f"noisy: the hypervisor kept up to {stolen[0]:.2f} cores for others ({stolen[1]})")
    late = max(((m.lateness_ns.percentile(99) / 1e6, f"{arm}, {m.name}") for arm, m in measures), default=(0.0, ""))
    if late[0] > MAX_LATENESS_MS:
        notes.append(f"the generator itself sent up to {late[0]:.1f} ms late at its p99 ({late[1]}); it is counted")
    return notes


def _run(arm: Arm, number: int, session: Session) -> Trial:
    run = Run()
    try:
        run = arm.run(session)
    except _BROKEN as error:
        session.end_scenario()  # Whatever broke, the next run starts on fresh processes.
        run.problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    run.problems += [problem for measure in run.measures for problem in failures(measure)]
    return Trial(number, tuple(run.measures), run.gate, tuple(run.problems))


def failures(measure: Measure) -> list[str]:
    """What must not happen below saturation: a call that fails. Beyond it, it is what is measured."""
    percent = measure.name.removeprefix("open ")
    beyond = measure.name.endswith(TOO_MANY) or (percent.isdigit() and int(percent) > BELOW_SATURATION)
    if not measure.failed or beyond:
        return []
    return [f"{measure.name}: {measure.failed} {measure.example}".rstrip()]


def _line(scenario: Scenario, arm: Arm, trial: Trial, seconds: float) -> str:
    head = f"{scenario.name:8} {arm.name:14} trial {trial.number + 1}  {seconds:5.1f} s"
    if trial.problems:
        return f"{head}  VOID: {'; '.join(trial.problems)}"
    figures = [f"{m.name} {m.rate:,.0f}/s" for m in trial.measures if m.rate and m.name == arm.throughput]
    return f"{head}  ok  {' '.join(figures)}".rstrip()


def problems(scenarios: Sequence[ScenarioResult]) -> list[str]:
    """Everything that makes a number void and the run a failure."""
    return [
        f"{scenario.name}, {arm.name}, trial {trial.number + 1}: {problem}"
        for scenario in scenarios
        for arm in scenario.arms
        for trial in arm.trials
        for problem in trial.problems
    ]


class Plan(msgspec.Struct, frozen=True):
    """What a run of the benchmarks is asked to do."""

    scenarios: tuple[str, ...] = ()  # none: all
    quick: bool = False
    trials: int = 5
    budget_s: float = 3 * 3600.0
