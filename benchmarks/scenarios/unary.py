"""One call, one decision: alone, at shares of the own capacity, beyond it; and beside it the same call to nothing."""

from __future__ import annotations

from functools import partial

from benchmarks.generator import Choice, Load
from benchmarks.limits import server, venv
from benchmarks.model import Measure
from benchmarks.session import CLOSED, REPLAYS, Arm, Run, Session, closed, opened, settled
from benchmarks.site import Site, measure_load

STEPS = (30, 50, 70, 90, 100, 110, 130)  # percent of what the same processes did in a closed loop just before
QUICK_STEPS = (30, 50, 70, 130)


class Unary:
    name = "unary"
    what = "One CheckAndConsume a call: one in flight, saturated, and open loop (Poisson) at shares of that capacity"

    def arms(self, session: Session) -> list[Arm]:
        arms = [
            Arm("envoy", "the gateway hosted by Envoy", partial(_gateway, "envoy"), "capacity"),
            Arm("grpcio", "the gateway on grpc.aio", partial(_gateway, "grpcio"), "capacity"),
            Arm("empty envoy", "an empty handler, hosted alike", partial(_empty, server.envoy_argv()), "capacity"),
            Arm("empty grpcio", "an empty handler on grpc.aio", partial(_empty, server.grpcio_argv()), "capacity"),
        ]
        for version in session.grpcio:
            arms.append(
                Arm(f"empty grpcio {version}", f"the same on grpcio {version}", partial(_version, version), "capacity")
            )
        return arms


def _gateway(transport: str, session: Session) -> Run:
    run = Run()
    whole = transport == "envoy" or not session.quick
    with session.site(transport) as site:
        with site.paused():
            run.measures.append(site.load("alone", _alone(session)))
            capacity = site.load("capacity", closed(session, 4, 1.5))
            run.measures.append(capacity)
            if not session.quick:
                run.measures.append(site.load("40,000 calls", _hundred(session)))
            for percent in _steps(session) if whole else (50,):
                run.measures.append(_open(site, session, f"open {percent}", capacity.rate * percent / 100))
        site.catch_up()
        run.measures.append(_open(site, session, "open 50 whole", capacity.rate / 2))
        return settled(site, run)


def _steps(session: Session) -> tuple[int, ...]:
    return QUICK_STEPS if session.quick else STEPS


def _open(site: Site, session: Session, name: str, rate: float) -> Measure:
    seconds = session.pick(4 if name.startswith("open 50") else 3, 1)
    return site.load(name, opened(session, rate, seconds))


def _alone(session: Session) -> Load:
    """One call in flight."""
    return Load(customers=session.bed.rich, in_flight=1, seconds=session.pick(3, 0.8), replays=20)


def _hundred(session: Session) -> Load:
    """Not one of them may fail."""
    return Load(customers=session.bed.rich, in_flight=100, count=40_000, seconds=60, replays=REPLAYS)


def _empty(argv: list[str], session: Session) -> Run:
    cores, generator = session.bed.cores, session.bed.generator
    run = Run()
    with server.serving(argv, cores) as empty:

        def load(name: str, in_flight: int, seconds: float) -> Measure:
            calls = Load(customers=Choice(), in_flight=in_flight, seconds=seconds, opaque=True)
            return measure_load(generator, empty.probe, empty.address, name, calls, "empty")

        load("warm-up", CLOSED, session.pick(1, 0.3))
        run.measures.append(load("alone", 1, session.pick(3, 0.8)))
        run.measures.append(load("capacity", CLOSED, session.pick(4, 1)))
        if other := server.h2load(empty, cores, session.count(40_000, 6_000)):
            run.measures.append(other)
    return run


def _version(version: str, session: Session) -> Run:
    return _empty(server.grpcio_argv(venv.python(session.bed.folder, version)), session)
