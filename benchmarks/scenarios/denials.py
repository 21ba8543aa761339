"""What a denial costs: none, one in twenty, every other call asks for a customer without credit."""

from __future__ import annotations

from functools import partial

import msgspec

from benchmarks.generator import Load
from benchmarks.session import CLOSED, Arm, Run, Session, batched, closed, settled

ROUNDS = 3  # of the calls that the poor can pay, before it is measured; two or three more follow meanwhile


class Denials:
    name = "denials"
    what = "A share of the calls asks for customers whose credit has run out; none may be overspent"

    def arms(self, session: Session) -> list[Arm]:
        return [
            Arm(f"{percent} %", f"{percent} % of the calls", partial(_load, percent / 100), "capacity")
            for percent in (0, 5, 50)
        ]


def _load(share: float, session: Session) -> Run:
    run = Run()
    poor = session.bed.poor
    with session.site() as site:
        for _ in range(ROUNDS):
            every = msgspec.structs.replace(poor, order=True)
            site.warm_up(20, Load(customers=every, count=poor.count, in_flight=CLOSED))
        with site.paused():
            loads = {
                "capacity": closed(session, 2, 0.8),
                "batch 64": batched(session, 64, session.count(80_000, 15_000)),
            }
            for name, load in loads.items():
                run.measures.append(site.load(name, msgspec.structs.replace(load, poor=poor, poor_share=share)))
        return settled(site, run)
