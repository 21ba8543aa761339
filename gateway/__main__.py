"""`python -m gateway`: the gateway process, configured by ENTITLEMENT_GATEWAY_*."""

from __future__ import annotations

import asyncio
import signal
import sys

import structlog
import uvloop

from entitlement.errors import EntitlementError, InvalidArgument, Unavailable
from entitlement.redaction import Redactor
from gateway import telemetry
from gateway.process import Process
from gateway.settings import Settings, load
from gateway.transport import envoy


async def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT, then drains. SIGHUP: the settings are read again."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    process = envoy.EnvoyTransport(settings) if _by_envoy(settings) else Process(settings)
    loop.add_signal_handler(signal.SIGHUP, process.reload)
    ended = loop.create_task(_ended(process))
    try:
        await process.start()
        sys.stdout.write(f"ready gateway={process.addresses[0]}\n")
        sys.stdout.flush()
        stopped = loop.create_task(stop.wait())
        await asyncio.wait((stopped, ended), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise Unavailable(f"Envoy ended by itself with code {ended.result()}")
    finally:
        ended.cancel()
        await process.stop()


async def _ended(process: Process | envoy.EnvoyTransport) -> int:
    """Waits for what should not happen: an Envoy that ends by itself."""
    if isinstance(process, envoy.EnvoyTransport):
        return await process.ended()
    never: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    return await never


def _by_envoy(settings: Settings) -> bool:
    if settings.transport == "grpcio":
        return False
    missing = envoy.available()
    if missing and settings.transport == "envoy":
        raise InvalidArgument("transport", f"envoy cannot serve here: {missing}; use grpcio")
    structlog.get_logger("gateway").info("transport", kind="grpcio" if missing else "envoy", why=missing)
    return not missing


def main() -> int:
    try:
        settings = load()
        telemetry.configure(settings.log_level, settings.redactor)
        structlog.get_logger("gateway").info("starting", settings=repr(settings))
        uvloop.run(serve(settings))
    except EntitlementError as error:
        sys.stderr.write(f"gateway: {Redactor().text(str(error))}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
