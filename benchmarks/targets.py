"""The targets, and whether a run has met them. A target that was not measured, or whose trials are void, is neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from benchmarks.model import Measure, Results, Target
from benchmarks.spread import is_void, ratios, spread

Judge = Callable[[Results], Target]
Where = tuple[str, str]  # scenario and arm

UNARY: Final[Where] = ("unary", "envoy")
BATCH: Final[Where] = ("batch", "envoy")
REDIS: Final[Where] = ("batch", "redis")
RECEIPT: Final[Where] = ("receipts", "receipt")
NO_RECEIPT: Final[Where] = ("receipts", "redis")
DRAIN: Final[Where] = ("drain", "envoy")
COLD: Final[Where] = ("cold", "envoy")
FRONT: Final[Where] = ("ext_authz", "envoy")
STREAMS: Final[Where] = ("streams", "envoy")
CHUNKS: Final[Where] = ("middleware", "asgi")
MILLION: Final = 1_000_000


class Line:
    """A line of the table in the making. `sets`: the trials that it stands on; one that is void makes it void."""

    def __init__(self, results: Results, what: str, *sets: Where) -> None:
        self._results = results
        self._what = what
        self._sets = sets
        self.notes: list[str] = []

    def at_most(self, limit: float, unit: str, values: Sequence[float]) -> Target:
        return self._judged(f"≤ {number(limit)}{unit}", unit, values, lambda value: value <= limit)

    def at_least(self, limit: float, unit: str, values: Sequence[float]) -> Target:
        return self._judged(f"≥ {number(limit)}{unit}", unit, values, lambda value: value >= limit)

    def told(self, unit: str, values: Sequence[float]) -> Target:
        """What nobody has set a bound to."""
        target = self._judged("–", unit, values, lambda value: True)
        return msgspec.structs.replace(target, met=None)

    def _judged(self, wanted: str, unit: str, values: Sequence[float], holds: Callable[[float], bool]) -> Target:
        found = spread(values)
        if found is None:
            return Target(self._what, wanted, "not measured", None, "; ".join(self.notes))
        text = f"{number(found.median)}{unit}"
        if found.count > 1:
            text += f" ({number(found.low)}–{number(found.high)})"
        void = [" ".join(where) for where in self._sets if _is_void(self._results, *where)]
        if void:
            self.notes.append(f"void: throughput of {' and '.join(void)} varied by more than a tenth")
        return Target(self._what, wanted, text, None if void else holds(found.median), "; ".join(self.notes))


def table(results: Results) -> tuple[Target, ...]:
    """Every target, in the order of the table, and a line for each other grpcio that was tried."""
    scenario = results.scenario("unary")
    names = [arm.name.removeprefix("empty grpcio ") for arm in scenario.arms] if scenario else []
    others = [_against_empty(name) for name in names if name[:1].isdigit()]
    return tuple(judge(results) for judge in (*_JUDGES[:2], *others, *_JUDGES[2:]))


def number(value: float) -> str:
    """A figure with three digits that mean something."""
    if value == float("inf"):
        return "∞"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cpu(measures: Sequence[Measure], *roles: str) -> list[float]:
    return [sum(measure.cpu_us.get(role, 0.0) for role in roles) for measure in measures]


def rates(measures: Sequence[Measure]) -> list[float]:
    return [measure.rate for measure in measures]


def percentiles_ms(measures: Sequence[Measure], percent: float) -> list[float]:
    return [measure.percentile_us(percent) / 1e3 for measure in measures]


def _split(pairs: Sequence[tuple[Measure, Measure]]) -> tuple[list[Measure], list[Measure]]:
    return [one for one, _ in pairs], [other for _, other in pairs]


def _is_void(results: Results, scenario: str, arm: str) -> bool:
    found = results.scenario(scenario)
    of = found.arm(arm) if found else None
    return of is not None and bool(of.throughput) and is_void(rates(of.measured(of.throughput)))


def _unary_cpu(results: Results) -> Target:
    line = Line(results, "gateway CPU a unary decision, Envoy transport", UNARY)
    return line.at_most(60, " µs", cpu(results.measured(*UNARY, "capacity"), "gateway"))


def _against_empty(version: str = "") -> Judge:
    arm = f"empty grpcio {version}".rstrip()

    def judge(results: Results) -> Target:
        which = version or f"{results.versions.get('grpcio', '?')}, pinned"
        line = Line(results, f"the same, as a share of an empty grpc.aio handler's ({which})", UNARY, ("unary", arm))
        ours, empty = _split(results.pairs((*UNARY, "capacity"), ("unary", arm, "capacity")))
        if found := spread(cpu(empty, "gateway")):
            line.notes.append(f"an empty handler takes {number(found.median)} µs")
        return line.at_most(0.5, "", ratios(cpu(ours, "gateway"), cpu(empty, "gateway")))

    return judge


def _batch_cpu(measure: str, what: str) -> Judge:
    def judge(results: Results) -> Target:
        line = Line(results, f"gateway CPU a decision, {what}", BATCH)
        return line.at_most(8, " µs", cpu(results.measured(*BATCH, measure), "gateway"))

    return judge


def _against_redis(measure: str, what: str) -> Judge:
    def judge(results: Results) -> Target:
        line = Line(results, f"decisions/s, {what}, as a share of Redis alone with the same script", BATCH, REDIS)
        by = "redis-benchmark" if results.measured(*REDIS, "redis-benchmark") else "evalsha"
        ours, limit = _split(results.pairs((*BATCH, measure), (*REDIS, by)))
        if found := spread(rates(limit)):
            line.notes.append(f"{by}: {number(found.median)}/s")
        return line.at_least(0.8, "", ratios(rates(ours), rates(limit)))

    return judge


def _round_trips(where: Where, measure: str, limit: float, what: str) -> Judge:
    def judge(results: Results) -> Target:
        values = [m.redis["reads"] for m in results.measured(*where, measure) if "reads" in m.redis]
        return Line(results, f"Redis round trips a decision, {what}").at_most(limit, "", values)

    return judge


def _added_latency(results: Results) -> Target:
    what = "added p50, one in flight, over the same call to nothing"
    line = Line(results, what, UNARY)
    pairs = results.pairs((*UNARY, "alone"), ("unary", "empty envoy", "alone"))
    trip = spread([m.percentile_us(50) for m in results.measured(*REDIS, "evalsha alone")])
    if trip is None:
        return Target(what, "≤ a round trip + 200 µs", "not measured", None)
    line.notes.append(f"a round trip of the script is {number(trip.median)} µs")
    sync = _sync_us(results)
    if sync is not None:
        line.notes.append(f"a bare fdatasync, allowed for the receipt, {number(sync)} µs")
    added = [ours.percentile_us(50) - empty.percentile_us(50) for ours, empty in pairs]
    return line.at_most(trip.median + 200 + (sync or 0), " µs", added)


def _receipts(measure: str, what: str) -> Judge:
    def judge(results: Results) -> Target:
        kept, none = _split(results.pairs((*RECEIPT, measure), (*NO_RECEIPT, measure)))
        line = Line(results, f"decisions/s with receipts, {what}, as a share of without", RECEIPT, NO_RECEIPT)
        return line.at_least(0.9, "", ratios(rates(kept), rates(none)))

    return judge


def _receipt_latency(results: Results) -> Target:
    what = "p50 that a receipt adds, one in flight"
    line = Line(results, what, RECEIPT, NO_RECEIPT)
    sync = _sync_us(results)
    if sync is None:
        return Target(what, "≤ one fdatasync + 200 µs", "not measured", None)
    line.notes.append(f"a bare fdatasync is {number(sync)} µs")
    pairs = results.pairs((*RECEIPT, "alone"), (*NO_RECEIPT, "alone"))
    return line.at_most(sync + 200, " µs", [kept.percentile_us(50) - none.percentile_us(50) for kept, none in pairs])


def _sync_us(results: Results) -> float | None:
    found = spread([m.percentile_us(50) for m in results.measured("receipts", "disk", "fdatasync")])
    return found.median if found else None


def _open(measure: str, percent: float, limit_ms: float, note: str = "") -> Judge:
    def judge(results: Results) -> Target:
        line = Line(results, f"open loop at 50 % of own capacity: p{percent:g}{note}", UNARY)
        return line.at_most(limit_ms, " ms", percentiles_ms(results.measured(*UNARY, measure), percent))

    return judge


def _hot_key(measure: str, what: str) -> Judge:
    def judge(results: Results) -> Target:
        one, all_ = _split(results.pairs(("keys", "one", measure), ("keys", "uniform", measure)))
        line = Line(results, f"{what} on one customer, as a share of uniform", ("keys", "one"), ("keys", "uniform"))
        return line.at_least(0.8, "", ratios(rates(one), rates(all_)))

    return judge


def _sizes(results: Results) -> list[str]:
    scenario = results.scenario("growth")
    return sorted((arm.name for arm in scenario.arms if arm.trials), key=int) if scenario else []


def _growth(measure: str, what: str) -> Judge:
    def judge(results: Results) -> Target:
        few, many = (_sizes(results) or ["", ""])[0], (_sizes(results) or ["", ""])[-1]
        line = Line(results, f"cost of {what} with 1,000,000 customers over 1,000", ("growth", few), ("growth", many))
        line.notes.append("CPU of gateway and Redis")
        if few == many:
            return line.at_most(1.1, "", [])
        if int(many) < MILLION:
            line.notes.append(f"with {int(many):,} only")
        small, large = _split(results.pairs(("growth", few, measure), ("growth", many, measure)))
        return line.at_most(1.1, "", ratios(cpu(large, "gateway", "redis"), cpu(small, "gateway", "redis")))

    return judge


def _memory(results: Results) -> Target:
    measures = results.measured("growth", (_sizes(results) or [""])[-1], "installed")
    values = [measure.extra["bytes a customer"] for measure in measures]
    return Line(results, "Redis memory a customer without history").at_most(1_000, " bytes", values)


def _drain_rate(results: Results) -> Target:
    drained, capacity = _split(results.pairs((*DRAIN, "drain"), (*DRAIN, "capacity")))
    line = Line(results, "ledger drain, as a share of the unary rate of one gateway core", DRAIN)
    if found := spread(rates(drained)):
        line.notes.append(f"{number(found.median)} records/s")
    return line.at_least(1.0, "", ratios(rates(drained), rates(capacity)))


def _lag(results: Results) -> Target:
    values = percentiles_ms(results.measured(*DRAIN, "half lag"), 99)
    return Line(results, "journal to ledger under half of that rate: p99", DRAIN).at_most(1_000, " ms", values)


def _steady_lag(results: Results) -> Target:
    values = percentiles_ms(results.measured(*DRAIN, "steady lag"), 99)
    what = "journal to ledger under what the second core bears: p99"
    return Line(results, what, DRAIN).at_most(1_000, " ms", values)


def _cold_one(results: Results) -> Target:
    values = percentiles_ms(results.measured(*COLD, "install"), 99)
    return Line(results, "first call of a cold account: p99", COLD).at_most(25, " ms", values)


def _cold_all(results: Results) -> Target:
    measures = results.measured(*COLD, "all at once")
    line = Line(results, "10,000 cold accounts", COLD)
    if measures and measures[0].decisions < 10_000:
        line.notes.append(f"from {measures[0].decisions:,}")
    return line.at_most(10, " s", [10_000 / measure.rate for measure in measures if measure.rate])


def _ext_authz(results: Results) -> Target:
    pairs = results.pairs((*FRONT, "with"), (*FRONT, "without"))
    line = Line(results, "ext_authz added latency, p50, one request in flight")
    if found := spread([plain.percentile_us(50) for _, plain in pairs]):
        line.notes.append(f"without it a request takes {number(found.median)} µs")
    return line.told(" µs", [asked.percentile_us(50) - plain.percentile_us(50) for asked, plain in pairs])


def _stream_count(results: Results) -> Target:
    """The most that held, of each trial."""
    highest = results.measured(*STREAMS, "highest")
    line = Line(results, "LLM streams a gateway core, reports acknowledged within 1 s (p99)")
    line.notes += [f"{name} used {number(share)} cores" for name, share in _shares(highest, "gateway", "loadgen")]
    if any(measure.extra["bounded"] for measure in highest):
        line.notes.append("more were not tried")
    return line.told("", [measure.extra["streams"] for measure in highest])


def _shares(measures: Sequence[Measure], *roles: str) -> list[tuple[str, float]]:
    found = [(role, spread([m.cpu_share[role] for m in measures if role in m.cpu_share])) for role in roles]
    return [(role, share.median) for role, share in found if share]


def _stream_cpu(results: Results) -> Target:
    highest = [measure for measure in results.measured(*STREAMS, "highest") if measure.extra["streams"]]
    line = Line(results, "gateway CPU a second of an LLM stream, at so many")
    return line.told(" µs", [measure.extra["gateway µs a stream second"] for measure in highest])


def _chunk(results: Results) -> Target:
    values = [measure.extra["added us"] for measure in results.measured(*CHUNKS, "with")]
    return Line(results, "latency that the ASGI middleware adds to a chunk, no I/O").at_most(200, " µs", values)


_JUDGES: Final[tuple[Judge, ...]] = (
    _unary_cpu,
    _against_empty(),
    _batch_cpu("batch 64", "batches of 64"),
    _batch_cpu("stream", "on a stream"),
    _against_redis("batch 64", "batches of 64"),
    _against_redis("stream", "on a stream"),
    _round_trips(UNARY, "alone", 1.05, "alone"),
    _round_trips(BATCH, "batch 64", 1 / 32, "in batches of 64"),
    _added_latency,
    _receipts("capacity", "unary and saturated"),
    _receipts("batch 64", "batches of 64"),
    _receipts("stream", "on a stream"),
    _receipt_latency,
    _open("open 50", 99, 5),
    _open("open 50", 99.9, 20),
    _open("open 50 whole", 99, 5, ", ledger_sync and PostgreSQL at work on the same cores"),
    _open("open 50 whole", 99.9, 20, ", the same"),
    _hot_key("capacity", "calls/s"),
    _hot_key("batch 64", "decisions/s in batches of 64"),
    _growth("capacity", "a call"),
    _growth("batch 64", "a decision in a batch of 64"),
    _memory,
    _drain_rate,
    _lag,
    _steady_lag,
    _cold_one,
    _cold_all,
    _ext_authz,
    _stream_count,
    _stream_cpu,
    _chunk,
)
