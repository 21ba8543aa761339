"""`python -m ledger_sync`: the ledger_sync process, configured by ENTITLEMENT_SYNC_*.

`python -m ledger_sync migrate` brings the ledger's tables up to date, and ends.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence

import structlog
import uvloop

from entitlement.errors import EntitlementError
from entitlement.redaction import Redactor
from ledger_sync import migrations, telemetry
from ledger_sync.process import Process, open_ledger
from ledger_sync.publisher import BadPublisher
from ledger_sync.settings import Settings, check_access, load


async def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT, then finishes what is in hand. SIGHUP: the settings are read again."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    process = Process(settings)
    loop.add_signal_handler(signal.SIGHUP, process.reloader.wake)
    starting = asyncio.create_task(process.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            sys.stdout.write(f"ready admin={process.addresses[0]}\n")
            sys.stdout.flush()
        await stopping
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        await process.stop()


async def migrate(settings: Settings) -> None:
    """The database's tables are this program's when it returns. What is there already stays as it is."""
    ledger = await open_ledger(settings)
    await ledger.close()
    sys.stdout.write(f"migrated schema={migrations.available()[-1].number}\n")


def main(arguments: Sequence[str] = ()) -> int:
    if list(arguments) not in ([], ["migrate"]):
        sys.stderr.write("usage: python -m ledger_sync [migrate]\n")
        return 2
    try:
        settings = load()
        if not arguments:
            check_access(settings)
        telemetry.configure_logs(settings.log_level, settings.redactor)
        structlog.get_logger("ledger_sync").info("starting", settings=repr(settings))
        uvloop.run(migrate(settings) if arguments else serve(settings))
    except (EntitlementError, BadPublisher) as error:
        sys.stderr.write(f"ledger_sync: {Redactor().text(str(error))}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
