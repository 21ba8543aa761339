"""From the journal to the ledger: how fast a backlog is settled and at what cost, how late each record is under load,
and what COPY of the same rows alone would take.
"""

from __future__ import annotations

import os
import time

from benchmarks.gate import query
from benchmarks.histogram import Histogram
from benchmarks.limits import copy
from benchmarks.model import Measure
from benchmarks.session import Arm, Run, Session, batched, closed, opened, settled
from benchmarks.site import SETTLE_S, Site

SHARE = 4  # of one core, which others need too

# When each event's transaction was committed, less when the hot store decided it; both clocks are this machine's.
_LATE = """
SELECT (extract(epoch FROM pg_xact_commit_timestamp(xmin) - recorded_at) * 1e9)::bigint AS late_ns
FROM usage_events WHERE idempotency_key LIKE $1"""
_COMMITTED = """
SELECT extract(epoch FROM max(pg_xact_commit_timestamp(xmin)))::float8 AS last, count(*) AS events
FROM usage_events WHERE idempotency_key LIKE $1"""


class Drain:
    name = "drain"
    what = "ledger_sync settles a backlog, then keeps up with a steady load beside all others; COPY of the same rows"

    def arms(self, session: Session) -> list[Arm]:
        return [Arm("envoy", "ledger_sync with PostgreSQL", _drain, "drain")]


def _drain(session: Session) -> Run:
    run = Run()
    count = session.count(100_000, 12_000)
    with session.site() as site:
        site.catch_up()
        with site.paused():
            backlog = site.load("backlog", batched(session, 64, count))
            site.place("sync")
            before, resumed = site.probe().look(os.getpid()), time.time()
        _wait(site, "backlog-%", backlog.allowed)
        after = site.probe().look(os.getpid())
        row = query(site.stack.database_url, _COMMITTED, "backlog-%")[0]
        used = {role: after.cpu_s[role] - before.cpu_s[role] for role in ("ledger_sync", "postgres", "redis")}
        run.measures.append(
            Measure(
                name="drain",
                decisions=row["events"],
                allowed=row["events"],
                seconds=row["last"] - resumed,
                cpu_us={role: seconds * 1e6 / max(1, row["events"]) for role, seconds in used.items()},
            )
        )
        run.measures.append(copy.same_rows(site, "backlog-%"))
        site.place()
        run.measures += _lag(session, site, run.measures[0].rate)
        return settled(site, run)


def _lag(session: Session, site: Site, drained: float) -> list[Measure]:
    """How late records are in the ledger: while half of the gateway's capacity is asked for, and under a load that the
    second core can bear for long, a quarter of what ledger_sync and PostgreSQL settle with it to themselves: Redis and
    the generator share it. Half of the capacity may be more than that; then the lag grows for as long as it lasts.
    """
    with site.paused():
        capacity = site.load("capacity", closed(session, 2, 0.8))
    measures = [capacity]
    for name, rate in (("half", capacity.rate / 2), ("steady", min(capacity.rate / 2, drained / SHARE))):
        site.catch_up()
        answered = site.load(name, opened(session, rate, session.pick(6, 1.5)))
        _wait(site, f"{name}-%", answered.allowed)
        late = [max(0, row["late_ns"]) for row in query(site.stack.database_url, _LATE, f"{name}-%")]
        lag = Measure(name=f"{name} lag", decisions=len(late), allowed=len(late), latency_ns=Histogram.of(late))
        measures += [answered, lag]
    return measures


def _wait(site: Site, like: str, events: int) -> None:
    """Until the ledger has them. What is missing when the time is over, the gate will tell."""
    deadline = time.monotonic() + SETTLE_S
    while query(site.stack.database_url, _COMMITTED, like)[0]["events"] < events and time.monotonic() < deadline:
        time.sleep(0.1)
