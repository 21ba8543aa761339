"""How many LLM streams one gateway core meters: so many at a time, opened and ended all the while, until reports wait
for their acknowledgement for longer than they may.
"""

from __future__ import annotations

import time

import msgspec

from benchmarks.gate import query
from benchmarks.generator import Load
from benchmarks.model import Measure
from benchmarks.run import TOO_MANY
from benchmarks.session import Arm, Run, Session, settled
from benchmarks.site import Site
from gateway.cli.trace import FEATURE, MODELS

STEPS = (100, 200, 400, 800, 1_600, 3_200)
QUICK_STEPS = (50, 100)
LIMIT_MS = 1_000.0  # from a report to its acknowledgement, p99
PER_CONNECTION = 400  # streams
REPORT_MS = 100  # as gateway.client.meter gathers
REPORT_TOKENS = 50  # a token every 2 ms
HOLD_TOKENS = 1_024
STREAM_MS = 4_000
TOKEN_NANOS = 10_000  # of output, as benchmarks.bed prices it
HIGHEST = "highest"  # the measure of the most streams that hold
ENDED_S = 30.0  # a hold whose stream broke off is left for 10 s

_BOOKED = "SELECT COALESCE(sum(quantity), 0)::bigint AS tokens FROM meters WHERE meter = $1 OR meter LIKE $1 || ',%'"
_HELD = """
SELECT (SELECT count(*) FROM holds WHERE state = 1) AS holds,
       (SELECT COALESCE(sum(held), 0)::bigint FROM accounts) AS nanos"""


class Streams:
    name = "streams"
    what = (
        "Meter streams that report 50 tokens every 100 ms, on holds of 1,024, for 4 s each: the most of them at a time"
        " whose reports are acknowledged within 1 s (p99)"
    )

    def arms(self, session: Session) -> list[Arm]:
        return [Arm("envoy", "the gateway hosted by Envoy", _streams)]


def _streams(session: Session) -> Run:
    run = Run()
    with session.site() as site:
        site.catch_up()
        before = _booked(site)
        with site.paused():
            run.measures += _search(session, site)
        run = settled(site, run)
        run.problems += _judge(site, run.measures, _booked(site) - before)
    return run


def _search(session: Session, site: Site) -> list[Measure]:
    """Twice as many until it is too many, and once half-way between; last, the most that were not."""
    found: list[Measure] = []
    best: tuple[int, Measure] | None = None
    for count in QUICK_STEPS if session.quick else STEPS:
        measure = _step(session, site, count, first=not found)
        found.append(measure)
        if not holds(measure):
            break
        best = (count, measure)
    else:
        return [*found, highest(best, bounded=True)]
    if best and not session.quick:
        between = best[0] * 3 // 2
        measure = _step(session, site, between, first=False)
        found.append(measure)
        if holds(measure):
            best = (between, measure)
    return [*found, highest(best, bounded=False)]


def _step(session: Session, site: Site, count: int, *, first: bool) -> Measure:
    load = Load(
        "meter",
        customers=session.bed.rich,
        in_flight=count,
        connections=-(-count // PER_CONNECTION),
        seconds=session.pick(8, 2),
        stream_ms=session.count(STREAM_MS, STREAM_MS // 4),
        report_ms=REPORT_MS,
        report_units=REPORT_TOKENS,
        hold_units=HOLD_TOKENS,
        unit_nanos=TOKEN_NANOS,
        feature=FEATURE,
        dimensions={"model": MODELS[0], "token_type": "output"},
    )
    measure = site.load(f"{count:,} streams", load)
    # A first step that does not hold is no search that has come to its end, and what fails in it counts.
    named = measure.name if first or holds(measure) else measure.name + TOO_MANY
    return msgspec.structs.replace(measure, name=named, extra=measure.extra | costs(measure))


def holds(measure: Measure) -> bool:
    """Whether it was not too many."""
    return measure.decisions > 0 and not measure.failed and measure.percentile_us(99) / 1e3 < LIMIT_MS


def costs(measure: Measure) -> dict[str, float]:
    """CPU of one stream, as µs a second: gateway and Redis; and how many there were at a time."""
    seconds = measure.extra.get("stream seconds", 0.0)
    found = {
        f"{role} µs a stream second": measure.cpu_us.get(role, 0.0) * measure.decisions / seconds
        for role in ("gateway", "redis", "loadgen")
        if seconds
    }
    return found | {"streams at a time": seconds / measure.seconds if measure.seconds else 0.0}


def highest(best: tuple[int, Measure] | None, *, bounded: bool) -> Measure:
    """Under its own name, with how many there were. `bounded`: more were not tried."""
    count, measure = best or (0, Measure(HIGHEST))
    extra = measure.extra | {"streams": count, "bounded": float(bounded)}
    return msgspec.structs.replace(measure, name=HIGHEST, extra=extra)


def _booked(site: Site) -> int:
    tokens: int = query(site.stack.database_url, _BOOKED, FEATURE)[0]["tokens"]
    return tokens


def _judge(site: Site, measures: list[Measure], booked: int) -> list[str]:
    """Every token that was acknowledged is booked, none that was not reported, and no hold is left."""
    loads = [measure for measure in measures if measure.name != HIGHEST]
    acknowledged, sent = (int(sum(m.extra.get(name, 0) for m in loads)) for name in ("units", "sent units"))
    problems = []
    if not acknowledged <= booked <= sent or (acknowledged != sent and not any(m.failed for m in loads)):
        problems.append(f"{sent} tokens were reported, {acknowledged} acknowledged, {booked} are in the ledger")
    deadline = time.monotonic() + ENDED_S
    while (left := query(site.stack.database_url, _HELD)[0])["holds"] and time.monotonic() < deadline:
        time.sleep(0.1)
    if left["holds"] or left["nanos"]:
        problems.append(f"{left['holds']} holds are left, {left['nanos']} nanos held")
    return problems
