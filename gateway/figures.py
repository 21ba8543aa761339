"""Every figure of the gateway for Prometheus, read from what its parts count when somebody asks. No figure is labelled
by tenant, customer, key or feature: the number of series does not grow with the traffic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from entitlement import build
from entitlement.decision import Reason, Verdict
from entitlement.probes import Component, Pulse
from gateway.admission import Admission
from gateway.catalog import Catalog
from gateway.degraded import Degraded
from gateway.holds import Holds
from gateway.receipts import Receipts
from gateway.store.redis_store import RedisStore
from gateway.tally import BOUNDS_S, Times

_NAME: Final = "entitlement_gateway_"
_NOT_LET_IN: Final = ("PERMISSION_DENIED", "UNAUTHENTICATED")
_VERDICTS: Final = {int(verdict): verdict.name for verdict in Verdict}
_REASONS: Final = {int(reason): reason.name for reason in Reason}

Values = Mapping[tuple[str, ...], float]


class Parts(msgspec.Struct, frozen=True):
    """What one event loop has that decides."""

    admission: Admission
    holds: Holds
    store: RedisStore
    receipts: Receipts
    degraded: Degraded
    catalog: Catalog
    pulse: Pulse
    streams: Callable[[], int]
    failures: Callable[[], int]
    components: Callable[[], Mapping[str, Component]]
    not_let_in: Callable[[], Mapping[str, int]]
    stale: Callable[[], bool]
    reload_failed: Callable[[], bool]


class Figures(Collector):
    """Of all event loops of this process together."""

    def __init__(self) -> None:
        self.parts: tuple[Parts, ...] = ()

    def collect(self) -> Iterator[Metric]:
        parts = self.parts
        yield from _decisions(parts)
        yield from _holds(parts)
        yield from _redis(parts)
        yield from _receipts(parts)
        yield from _state(parts)


def _decisions(parts: Sequence[Parts]) -> Iterator[Metric]:
    tallies = [part.admission.tally for part in parts]
    decided = _sum([_outcomes(tally.outcomes) for tally in tallies])
    yield _counter("decisions", "Decisions of CheckAndConsume, repeats too.", decided, "verdict", "reason")
    refused = _sum([{(name,): count for name, count in tally.refused.items()} for tally in tallies])
    yield _counter("refused", "Calls without a decision, by why.", refused, "error")
    took = [tally.took for tally in tallies]
    yield _histogram("decision_seconds", "From a call that is read to its answer, receipt included.", took)
    batches, batched = sum(tally.batches for tally in tallies), sum(tally.batched for tally in tallies)
    yield _counter("batches", "Batches, and groups of a stream's requests.", {(): batches})
    yield _counter("batched_decisions", "Decisions in them.", {(): batched})
    yield _gauge("in_flight", "Calls on their way.", {(): sum(part.admission.in_flight for part in parts)})
    granted = sum(part.degraded.granted for part in parts)
    denied = sum(part.degraded.denied for part in parts)
    by_policy: Values = {("ALLOW",): granted, ("DENY",): denied}
    yield _counter("degraded_decisions", "Decisions by failure policy: Redis was away.", by_policy, "verdict")
    away: Values = {(name,): sum(part.not_let_in().get(name, 0) for part in parts) for name in _NOT_LET_IN}
    yield _counter("not_let_in", "Calls of whom nobody knows, or who may not make them.", away, "error")
    yield _counter("failures", "Calls that ended in an error nobody foresaw.", {(): sum(p.failures() for p in parts)})


def _outcomes(counts: Sequence[Sequence[int]]) -> Values:
    """Those that have happened, and the plain grant."""
    return {
        (_VERDICTS[verdict], _REASONS[reason]): count
        for verdict, row in enumerate(counts)
        for reason, count in enumerate(row)
        if count or (verdict, reason) == (Verdict.ALLOW, Reason.NONE)
    }


def _holds(parts: Sequence[Parts]) -> Iterator[Metric]:
    calls = _sum(
        [{(kind, outcome): count for (kind, outcome), count in part.holds.calls.copy().items()} for part in parts]
    )
    yield _counter("hold_calls", "Calls about holds, those of streams too.", calls, "kind", "outcome")
    yield _gauge("meter_streams", "Meter streams that are open.", {(): sum(part.streams() for part in parts)})


def _redis(parts: Sequence[Parts]) -> Iterator[Metric]:
    stores = [part.store for part in parts]
    trips = sum(store.round_trips for store in stores)
    yield _counter("redis_round_trips", "Writes to Redis: a loop turn's commands leave in one.", {(): trips})
    comings = sum(store.comings for store in stores)
    yield _counter("redis_connections", "Times that decisions became possible.", {(): comings})
    text = "A look at Redis, four a second, on the connection that decides."
    yield _histogram("redis_probe_seconds", text, [store.probe for store in stores])


def _receipts(parts: Sequence[Parts]) -> Iterator[Metric]:
    receipts = [part.receipts for part in parts]
    size, pending = sum(each.size for each in receipts), sum(each.pending for each in receipts)
    yield _gauge("receipts_pending_bytes", "Receipts on disk that are not known to be settled.", {(): size})
    text = "How many, of those that this process has written."
    yield _gauge("receipts_pending_records", text, {(): pending})
    limit = sum(each.max_bytes for each in receipts)
    yield _gauge("receipts_limit_bytes", "Beyond it nothing is granted.", {(): limit})
    written = [each.written for each in receipts]
    yield _counter("receipts_written", "Receipts made durable.", {(): sum(each.receipts for each in written)})
    yield _counter("receipt_syncs", "Writes of receipts to disk.", {(): sum(each.syncs for each in written)})
    yield _counter("receipt_sync_seconds", "How long they took.", {(): sum(each.sync_s for each in written)})
    replays = {
        "debited": sum(each.replayed for each in receipts),
        "damaged": sum(each.damaged for each in receipts),
        "refused": sum(each.refused for each in receipts),
    }
    text = "Receipts replayed on another hot store, by what became of them."
    yield _counter("receipts_replayed", text, {(name,): count for name, count in replays.items()}, "outcome")


def _state(parts: Sequence[Parts]) -> Iterator[Metric]:
    ready: dict[tuple[str, ...], float] = {}
    for part in parts:
        for name, component in part.components().items():
            ready[name,] = min(ready.get((name,), 1), component.ok)
    yield _gauge("ready", "1: this part is well, in every event loop.", ready, "component")
    opening = min([part.store.opening for part in parts], default=0)
    yield _gauge("opening", "The fence: under which opening of Redis is decided; 0: none.", {(): opening})
    stale = max([part.stale() for part in parts], default=False)
    yield _gauge("identities_stale", "1: the files that say who may call could not be read again.", {(): stale})
    generation = min([part.catalog.generation for part in parts], default=-1)
    yield _gauge("catalogue_generation", "The catalogue that prices; -1: none was read.", {(): generation})
    failed = any(part.reload_failed() for part in parts)
    text = "1: the settings were read again and are not sound; the ones before them hold."
    yield _gauge("config_reload_failed", text, {(): failed})
    silent = max([part.pulse.silent_s for part in parts], default=0.0)
    yield _gauge("loop_silent_seconds", "Since the event loop last turned.", {(): silent})
    running = GaugeMetricFamily(build.FIGURE, build.FIGURE_TEXT, labels=("version",))
    running.add_metric((build.own_version(),), 1)
    yield running


def _counter(name: str, text: str, values: Values, *labels: str) -> Metric:
    family = CounterMetricFamily(_NAME + name, text, labels=labels)
    for label, value in sorted(values.items()):
        family.add_metric(label, value)
    return family


def _gauge(name: str, text: str, values: Values, *labels: str) -> Metric:
    family = GaugeMetricFamily(_NAME + name, text, labels=labels)
    for label, value in sorted(values.items()):
        family.add_metric(label, value)
    return family


def _histogram(name: str, text: str, times: Sequence[Times]) -> Metric:
    family = HistogramMetricFamily(_NAME + name, text)
    counts = [sum(column) for column in zip(*[list(each.counts) for each in times], strict=True)]
    counts = counts or [0] * (len(BOUNDS_S) + 1)
    names = (*map(str, BOUNDS_S), "+Inf")
    buckets = [(bound, float(sum(counts[: place + 1]))) for place, bound in enumerate(names)]
    family.add_metric((), buckets, sum(each.seconds for each in times))
    return family


def _sum(values: Sequence[Values]) -> Values:
    total: Counter[tuple[str, ...]] = Counter()
    for each in values:
        for label, value in each.items():
            total[label] += int(value)
    return total
