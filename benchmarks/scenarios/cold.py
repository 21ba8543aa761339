"""Customers that the hot store does not have: each first call waits until its account has come from the ledger."""

from __future__ import annotations

from benchmarks.generator import Choice, Load
from benchmarks.session import CLOSED, OPEN_DEADLINE_MS, Arm, Run, Session, settled

ARRIVALS = 200.0  # first calls a second, open loop


class Cold:
    name = "cold"
    what = "First calls of customers that are only in the ledger: open loop at 200/s, then all that are left at once"

    def arms(self, session: Session) -> list[Arm]:
        return [Arm("envoy", "the gateway hosted by Envoy", _cold, "all at once")]


def _cold(session: Session) -> Run:
    run = Run()
    singly = session.count(1_000, 150)
    with session.site() as site:
        site.catch_up()
        arrivals = Load(
            customers=Choice("cold-", singly, order=True),
            open=True,
            poisson=True,
            rate=ARRIVALS,
            in_flight=1_000,
            count=singly,
            seconds=60,
            deadline_ms=OPEN_DEADLINE_MS,
            replays=20,
        )
        run.measures.append(site.load("install", arrivals))
        rest = session.bed.sizes.cold - singly
        everybody = Choice("cold-", rest, order=True, first=singly)
        storm = Load(customers=everybody, in_flight=CLOSED, count=rest, seconds=60, replays=20)
        run.measures.append(site.load("all at once", storm))
        return settled(site, run)
