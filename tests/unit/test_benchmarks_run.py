"""Running scenarios: their order, what becomes of a run that breaks, and the end of the time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import pytest

from benchmarks.bed import Bed
from benchmarks.histogram import Histogram
from benchmarks.model import ArmResult, Measure, Trial
from benchmarks.run import Budget, failures, noise_notes, problems, run_scenario, void_notes
from benchmarks.session import Arm, Run, Session
from gateway.cli.child import ChildFailed


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Told:
    """A scenario of arms that only say that they were run."""

    name = "told"
    what = "?"

    def __init__(self, names: str, clock: Clock | None = None, broken: str = "") -> None:
        self.ran: list[str] = []
        self._names, self._clock, self._broken = names, clock, broken

    def arms(self, session: Session) -> list[Arm]:
        return [Arm(name, "", partial(self._run, name), "load") for name in self._names]

    def _run(self, name: str, session: Session) -> Run:
        self.ran.append(name)
        if self._clock:
            self._clock.now += 10
        if name == self._broken:
            raise ChildFailed("it ended\nat once")
        return Run([Measure("load", decisions=100, seconds=1.0)])


def session(trials: int) -> Session:
    """None of these arms looks at the bed."""
    return Session(cast("Bed", None), quick=False, trials=trials, trace=None, grpcio=())


def test_arms_run_forwards_and_backwards() -> None:
    told = Told("AB")
    result = run_scenario(told, session(3), Budget(60), lambda line: None)
    assert "".join(told.ran) == "ABBAAB"
    assert [len(arm.trials) for arm in result.arms] == [3, 3]
    assert result.notes == ()


def test_what_does_not_fit_into_the_time_is_left_out_and_said_so() -> None:
    clock = Clock()
    told = Told("AB", clock)
    result = run_scenario(told, session(2), Budget(25, clock), lambda line: None)
    assert "".join(told.ran) == "ABB"
    assert result.notes == ("1 runs were left out: the time was over",)


def test_a_run_that_breaks_is_a_problem_and_the_others_go_on() -> None:
    lines: list[str] = []
    result = run_scenario(Told("AB", broken="A"), session(1), Budget(60), lines.append)
    assert problems([result]) == ["told, A, trial 1: ChildFailed: it ended at once"]
    assert "VOID" in lines[0] and "ok" in lines[1]


def test_a_mistake_of_ours_is_not_taken_for_a_broken_run() -> None:
    class Mistaken(Told):
        def _run(self, name: str, session: Session) -> Run:
            raise KeyError(name)

    with pytest.raises(KeyError):
        run_scenario(Mistaken("A"), session(1), Budget(60), lambda line: None)


@pytest.mark.parametrize(
    ("name", "counts"), [("open 50", True), ("open 50 whole", True), ("open 130", False), ("capacity", True)]
)
def test_calls_may_fail_beyond_saturation_only(name: str, counts: bool) -> None:
    failed = Measure(name, failed={"UNAVAILABLE": 3}, offered_rate=100.0, example="gone")
    assert failures(failed) == ([f"{name}: {{'UNAVAILABLE': 3}} gone"] if counts else [])
    assert failures(Measure(name)) == []


def _arm(*measures: Measure) -> ArmResult:
    return ArmResult("A", "", tuple(Trial(n, (measure,)) for n, measure in enumerate(measures)), "load")


def test_sets_that_varied_and_machines_that_were_busy_are_mentioned() -> None:
    steady, other = (Measure("load", decisions=count, seconds=1.0) for count in (100, 120))
    assert void_notes([_arm(steady, steady)]) == []
    assert len(void_notes([_arm(steady, other)])) == 1
    assert noise_notes([_arm(steady)]) == []
    busy = Measure("load", others_cpu=0.5, lateness_ns=Histogram.of([5_000_000]))
    assert len(noise_notes([_arm(busy)])) == 2


def test_results_are_found_newest_first_and_whole_runs_before_quick_ones(tmp_path: Path) -> None:
    from benchmarks.__main__ import newest

    assert newest(tmp_path) is None
    for name in ("2030-01-01-000000", "2030-01-02-000000", "2030-01-03-000000-quick"):
        (tmp_path / f"{name}.json").touch()
    found = newest(tmp_path)
    assert found is not None and found.stem == "2030-01-02-000000"
