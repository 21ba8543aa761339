"""`python -m tests.integration.interop.serve grpcio|envoy ADDRESSES DRAIN_MS`: the probe, until SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

from gateway import telemetry
from gateway.settings import Settings
from gateway.transport.envoy import EnvoyTransport
from gateway.transport.grpcio import GrpcioTransport
from tests.integration.interop.service import Probe


async def serve(kind: str, settings: Settings) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    if kind == "envoy":
        hosted = EnvoyTransport(settings, "tests.integration.interop.hosted:app")
        try:
            await hosted.start()
            print(f"ready probe={hosted.addresses[0]}", flush=True)
            await stop.wait()
        finally:
            await hosted.stop()
        return
    server = GrpcioTransport(lambda server: server.add_generic_rpc_handlers([Probe().handler()]), settings)
    await server.start()
    print(f"ready probe={server.addresses[0]}", flush=True)
    await stop.wait()
    await server.stop(settings.drain_ms / 1000)


if __name__ == "__main__":
    telemetry.configure("error")
    uvloop.run(serve(sys.argv[1], Settings(anonymous="all", listen=sys.argv[2], drain_ms=int(sys.argv[3]))))
