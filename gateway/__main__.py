"""`python -m gateway`: the gateway process, configured by ENTITLEMENT_GATEWAY_*."""

from __future__ import annotations

import asyncio
import signal
import sys

import structlog
import uvloop

from entitlement.errors import EntitlementError
from gateway import telemetry
from gateway.process import Process
from gateway.settings import Settings, load


async def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT, then drains."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    process = Process(settings)
    try:
        await process.start()
        sys.stdout.write(f"ready gateway={process.addresses[0]}\n")
        sys.stdout.flush()
        await stop.wait()
    finally:
        await process.stop()


def main() -> int:
    try:
        settings = load()
        telemetry.configure(settings.log_level)
        structlog.get_logger("gateway").info("starting", settings=repr(settings))
        uvloop.run(serve(settings))
    except EntitlementError as error:
        sys.stderr.write(f"gateway: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
