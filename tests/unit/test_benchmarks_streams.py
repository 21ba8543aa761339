"""The search for the most LLM streams, the cost of one, the slices of a proxy's load, and the middleware's measure."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks import front, middleware
from benchmarks.generator import METER, PAGE, Load
from benchmarks.histogram import Histogram
from benchmarks.model import Measure
from benchmarks.run import TOO_MANY, failures
from benchmarks.scenarios import streams
from benchmarks.scenarios.ext_authz import together


def measure(p99_ms: int, *, failed: int = 0, name: str = "load") -> Measure:
    return Measure(
        name,
        decisions=1_000,
        allowed=400,
        failed={"UNAVAILABLE": failed} if failed else {},
        seconds=10.0,
        latency_ns=Histogram.of([p99_ms * 10**6] * 1_000),
        cpu_us={"gateway": 50.0, "redis": 10.0, "loadgen": 5.0},
        extra={"stream seconds": 250.0, "units": 50_000.0, "sent units": 50_000.0},
    )


@pytest.mark.parametrize(
    ("found", "held"), [(measure(990), True), (measure(1_010), False), (measure(5, failed=1), False)]
)
def test_streams_hold_while_reports_are_acknowledged_in_time_and_none_fails(found: Measure, held: bool) -> None:
    assert streams.holds(found) is held
    assert not streams.holds(Measure("nothing came"))


def test_a_stream_costs_what_was_used_by_the_seconds_that_streams_were_open() -> None:
    found = streams.costs(measure(5))
    assert found["gateway µs a stream second"] == pytest.approx(200.0)
    assert found["redis µs a stream second"] == pytest.approx(40.0)
    assert found["streams at a time"] == pytest.approx(25.0)


class Stages:
    """Stands for the measurement: so many streams hold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.asked: list[int] = []
        self._most = most
        monkeypatch.setattr(streams, "_step", self._step)

    def _step(self, session: object, site: object, count: int, *, first: bool) -> Measure:
        self.asked.append(count)
        return measure(100 if count <= self._most else 2_000, name=f"{count}")

    def search(self, *, quick: bool = False) -> tuple[float, float]:
        found = streams._search(Session(quick), None)  # type: ignore[arg-type]
        assert found[-1].name == streams.HIGHEST and len(found) == len(self.asked) + 1
        return found[-1].extra["streams"], found[-1].extra["bounded"]


class Session(msgspec.Struct):
    quick: bool


def test_the_search_doubles_and_looks_half_way_between(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch, 650)
    assert stages.search() == (600, 0)
    assert stages.asked == [100, 200, 400, 800, 600]


def test_the_search_has_an_end_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Stages(monkeypatch, 10**6).search() == (3_200, 1)


def test_where_no_step_holds_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch, 99)
    assert stages.search() == (0, 0)
    assert stages.asked == [100]


@pytest.mark.parametrize(
    ("booked", "held", "failed", "problems"),
    [
        (50_000, 0, 0, 0),
        (49_999, 0, 0, 1),
        (50_001, 0, 0, 1),
        (50_000, 1, 0, 1),
        (50_050, 0, 1, 0),  # A report that was not acknowledged may be booked
        (50_101, 0, 1, 1),  # and none that was not sent.
    ],
)
def test_tokens_are_booked_to_the_unit_and_no_hold_is_left(
    monkeypatch: pytest.MonkeyPatch, booked: int, held: int, failed: int, problems: int
) -> None:
    monkeypatch.setattr(streams, "ENDED_S", 0.0)
    monkeypatch.setattr(streams, "query", lambda *_: [{"holds": held, "nanos": held * 10}])
    found = measure(5, failed=failed)
    found.extra["sent units"] += 100.0 * failed
    again = streams.highest((100, found), bounded=False)  # The same once more: it does not count twice.
    assert len(streams._judge(Site(), [found, again], booked)) == problems  # type: ignore[arg-type]


class Site:
    class stack:
        database_url = ""


def test_streams_may_fail_where_they_are_too_many() -> None:
    failed = measure(5, failed=2, name="800 streams")
    assert failures(failed)
    assert failures(msgspec.structs.replace(failed, name=failed.name + TOO_MANY)) == []


def test_slices_are_one_measure_whose_cpu_is_by_decision() -> None:
    one = Measure("a", decisions=100, allowed=100, seconds=1.0, latency_ns=Histogram.of([5]), cpu_us={"gateway": 10.0})
    other = Measure("b", decisions=300, allowed=299, failed={"http 503": 1}, seconds=1.0, cpu_us={"gateway": 30.0})
    found = together("with", [one, other])
    assert (found.decisions, found.allowed, found.failed, found.rate) == (400, 399, {"http 503": 1}, 200.0)
    assert found.cpu_us == {"gateway": 25.0} and found.latency_ns == Histogram.of([5])


def test_only_one_of_the_two_doors_asks() -> None:
    configuration = front.configuration(1, 2, "127.0.0.1:3")
    listeners = msgspec.json.decode(msgspec.json.encode(configuration))["static_resources"]["listeners"]
    filters = [
        [each["name"] for each in listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]]
        for listener in listeners
    ]
    router = "envoy.filters.http.router"
    assert filters == [[router], ["envoy.filters.http.ext_authz", router]]


def test_each_load_goes_to_its_own_path() -> None:
    assert (Load("http").path, Load("meter").path) == (PAGE, METER)


async def test_the_middleware_is_measured_on_a_stream_that_it_has_metered() -> None:
    found = await middleware.measure(3, chunks=20)
    assert found.told == middleware.PROMPT + 20  # The usage, not the bytes.
    assert len(found.without) == len(found.with_it) == 3
    assert min(found.with_it) > max(1, min(found.without)) and found.added_us > 0
