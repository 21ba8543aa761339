"""Many decisions a call, and on a stream; beside it Redis alone with the same script and the same arguments."""

from __future__ import annotations

from functools import partial

from benchmarks.generator import Load
from benchmarks.limits import evalsha
from benchmarks.session import CLOSED_STREAM, REPLAYS, Arm, Run, Session, batched, settled

SIZES = (1, 16, 64)


class Batch:
    name = "batch"
    what = "CheckAndConsumeBatch of 1, 16 and 64 and CheckAndConsumeStream, saturated; Redis alone"

    def arms(self, session: Session) -> list[Arm]:
        arms = [
            Arm("envoy", "the gateway hosted by Envoy", partial(_gateway, "envoy"), "batch 64"),
            Arm("redis", "EVALSHA of the same script, pipelined, no gateway", _redis, "evalsha"),
        ]
        if not session.quick:
            arms.insert(1, Arm("grpcio", "the gateway on grpc.aio", partial(_gateway, "grpcio"), "batch 64"))
        return arms


def _gateway(transport: str, session: Session) -> Run:
    run = Run()
    with session.site(transport) as site:
        with site.paused():
            for size in SIZES:
                count = session.count(150_000, 20_000) if size > 1 else session.count(40_000, 8_000)
                run.measures.append(site.load(f"batch {size}", batched(session, size, count)))
            stream = Load(
                mode="stream",
                customers=session.bed.rich,
                in_flight=CLOSED_STREAM,
                count=session.count(100_000, 15_000),
                seconds=session.pick(20, 2),
                replays=REPLAYS,
            )
            run.measures.append(site.load("stream", stream))
        return settled(site, run)


def _redis(session: Session) -> Run:
    run = Run()
    count = session.count(150_000, 25_000)
    with session.site() as site:
        with site.paused(), site.paused("gateway"):
            run.measures.append(evalsha.alone(session.bed, site, session.count(5_000, 1_000)))
            run.measures.append(evalsha.pipelined(session.bed, site, count))
            if other := evalsha.redis_benchmark(session.bed, site, count):
                run.measures.append(other)
        return settled(site, run)
