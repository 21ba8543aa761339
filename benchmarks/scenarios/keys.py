"""Who asks: everybody alike, one customer alone, and Zipf's law in between."""

from __future__ import annotations

from functools import partial

from benchmarks.generator import Choice
from benchmarks.session import Arm, Run, Session, batched, closed, settled


class Keys:
    name = "keys"
    what = "Load on one customer, by Zipf's law, and uniform; calls and batches of 64, saturated"

    def arms(self, session: Session) -> list[Arm]:
        everybody = session.bed.sizes.rich
        kinds = {
            "uniform": Choice("c-", everybody),
            "zipf 0.99": Choice("c-", everybody, zipf=0.99),
            "zipf 1.2": Choice("c-", everybody, zipf=1.2),
            "one": Choice("c-", 1),
        }
        return [
            Arm(name, f"{customers.count} customers", partial(_load, customers), "capacity")
            for name, customers in kinds.items()
        ]


def _load(customers: Choice, session: Session) -> Run:
    run = Run()
    with session.site() as site:
        with site.paused():
            run.measures.append(site.load("capacity", closed(session, 2, 0.8, customers)))
            count = session.count(80_000, 15_000)
            run.measures.append(site.load("batch 64", batched(session, 64, count, customers)))
        return settled(site, run)
