"""What a proxy's request waits for the gateway's word: Envoy answers by itself, without asking and after asking."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks import front
from benchmarks.generator import Load
from benchmarks.histogram import merged
from benchmarks.model import Measure
from benchmarks.session import Arm, Run, Session, settled
from benchmarks.site import Site

ROUNDS = 10  # of a slice without and one with
MAPPING = """
requests:
  rules:
    - {name: bench, match: {path_prefix: /v1}, customer: {header: x-customer}, feature: calls}
"""
Visit = Callable[[], Measure]


class ExtAuthz:
    name = "ext_authz"
    what = "One request in flight through a stock Envoy that answers by itself: without ext_authz, and with it"

    def arms(self, session: Session) -> list[Arm]:
        return [Arm("envoy", "a stock Envoy in front of the gateway in Envoy", _front)]


def _front(session: Session) -> Run:
    run = Run()
    with session.site(mapping=MAPPING) as site, front.serving(site.stack.gateway, session.bed.cores) as proxy:
        with site.paused():
            plain, asking = _visits(session, site, proxy)
            plain()
            asking()  # Not measured, but accounted for.
            slices: dict[str, list[Measure]] = {"without": [], "with": []}
            for number in range(session.count(ROUNDS, 4)):
                pair = [("without", plain), ("with", asking)]
                for name, visit in pair if number % 2 == 0 else reversed(pair):
                    slices[name].append(visit())
            run.measures += [together(name, measures) for name, measures in slices.items()]
        return settled(site, run)


def _visits(session: Session, site: Site, proxy: front.Front) -> tuple[Visit, Visit]:
    load = Load("http", customers=session.bed.rich, in_flight=1, seconds=session.pick(0.6, 0.25))

    def plain() -> Measure:
        return site.visit("without", load, proxy.plain, site.probe(proxy=proxy.pid))

    def asking() -> Measure:
        return site.load("with", load, proxy.asking, site.probe(proxy=proxy.pid))

    return plain, asking


def together(name: str, slices: Sequence[Measure]) -> Measure:
    """Slices of one load as one."""
    decisions = sum(each.decisions for each in slices)
    seconds = sum(each.seconds for each in slices)
    roles = {role for each in slices for role in each.cpu_us}
    failed: dict[str, int] = {}
    for each in slices:
        for why, count in each.failed.items():
            failed[why] = failed.get(why, 0) + count
    return Measure(
        name=name,
        decisions=decisions,
        allowed=sum(each.allowed for each in slices),
        failed=failed,
        unknown=sum(each.unknown for each in slices),
        amount_nanos=sum(each.amount_nanos for each in slices),
        seconds=seconds,
        latency_ns=merged(each.latency_ns for each in slices),
        cpu_us={
            role: sum(each.cpu_us.get(role, 0.0) * each.decisions for each in slices) / max(1, decisions)
            for role in sorted(roles)
        },
        others_cpu=max((each.others_cpu for each in slices), default=0.0),
        stolen_cpu=max((each.stolen_cpu for each in slices), default=0.0),
        example=next((each.example for each in slices if each.example), ""),
    )
