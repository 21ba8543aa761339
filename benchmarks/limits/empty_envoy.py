"""Hosts the empty handler as the gateway is: `python -m benchmarks.limits.empty_envoy` prints `ready ADDRESS`."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

from gateway.settings import Settings
from gateway.transport.envoy import EnvoyTransport


async def serve() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    transport = EnvoyTransport(
        Settings(anonymous="all", listen="127.0.0.1:0", drain_ms=500), "benchmarks.limits.empty_asgi:app"
    )
    try:
        await transport.start()
        sys.stdout.write(f"ready {transport.addresses[0]}\n")
        sys.stdout.flush()
        await stop.wait()
    finally:
        await transport.stop()


if __name__ == "__main__":
    uvloop.run(serve())
