"""ledger_sync as one long-lived part: wired, started and stopped in order."""

from __future__ import annotations

import asyncio
import gc
from random import Random
from time import monotonic
from typing import Final

import structlog

from entitlement import logs
from entitlement.decision import Limits
from entitlement.probes import Component, Components, Pulse
from ledger_sync import rereading
from ledger_sync.admin import LedgerAdmin
from ledger_sync.admin_server import AdminServer
from ledger_sync.attempts import Attempts
from ledger_sync.certificates import Certificates
from ledger_sync.control import ControlPlane
from ledger_sync.drain import Drain
from ledger_sync.examine import Examiner
from ledger_sync.exposition import Exposition
from ledger_sync.hot_store import HotStore
from ledger_sync.identity import Guard
from ledger_sync.journal_reader import JournalReader
from ledger_sync.ledger import Ledger, LedgerUnavailable
from ledger_sync.outbox import Outbox
from ledger_sync.patrol import Patrol
from ledger_sync.publisher import open_publisher
from ledger_sync.reloading import Reloader
from ledger_sync.self_check import database_check, self_check
from ledger_sync.settings import Settings
from ledger_sync.settlement import Outcome
from ledger_sync.soundings import Soundings
from ledger_sync.telemetry import Figures
from ledger_sync.tracing import opened
from ledger_sync.webhooks import Webhooks, declare, target_of
from ledger_sync.worker import Health, Loop, Worker

GC_THRESHOLD: Final = 50_000  # A batch makes many small values that live briefly together.
HEALTH_EVERY_S: Final = 0.25
SOON_S: Final = 0.02  # while something is not well
RETRY_S: Final = 0.25
SAY_AGAIN_S: Final = 10.0  # that the database is still away, for the same reason

log = structlog.get_logger(__name__)


class Process:
    """Everything that one ledger_sync process owns. `start` returns when calls are answered; `stop` lets the batches in
    hand finish.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._figures = Figures()
        self._random = Random()  # noqa: S311  Spreads retries.
        self._target = target_of(settings)
        self.traces = opened(on=settings.tracing)
        self._publisher = self.traces.publisher(
            open_publisher(settings.publisher, deadline_ms=settings.publisher_deadline_ms, hot_store=settings.redis)
        )
        self._readers = [
            JournalReader.connect(settings.redis, range(lane, settings.partitions, settings.lanes), settings.consumer)
            for lane in range(min(settings.lanes, settings.partitions))
        ]
        self._keeper = rereading.doorkeeper(settings.access_files)
        self._certificates = Certificates(settings) if settings.tls_cert else None
        self._hot = HotStore.connect(settings.redis, settings.partitions)
        self._ledger: Ledger | None = None
        self._admin: AdminServer | None = None
        self._attempts: Attempts | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._pulse = Pulse(monotonic)
        self._control: ControlPlane | None = None
        self._drain: Drain | None = None
        self._worker: Worker | None = None
        self._soundings: Soundings | None = None
        self._exposition = Exposition(settings, lambda: {"loop": self._pulse.component}, self.components)
        self._ending = False
        self.reloader = Reloader(settings, self._apply)
        self._figures.reload_failed.set_function(lambda: self.reloader.failed)

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._admin.addresses if self._admin else ()

    async def start(self) -> None:
        """LedgerUnavailable: the database has not come in time. SchemaError: it is not this program's. InvalidArgument:
        an address cannot be bound.
        """
        settings = self._settings
        self._exposition.start()
        self._tasks.append(asyncio.create_task(self._beat()))
        self._tasks.append(asyncio.create_task(self.reloader.run()))
        await self_check(self._hot, settings.redis, settings.redis_checks)
        self._ledger = ledger = await open_ledger(settings)
        await database_check(ledger, settings.database_checks)
        await declare(ledger, self._target)
        self._drain = drain = Drain(
            self.traces.ledger(ledger),
            self._readers,
            figures=self._figures,
            on_commit=self._committed,
            batch=settings.batch,
            linger_ms=settings.linger_ms,
        )
        self._control = control = ControlPlane(ledger, self._hot, drain.settled, settings.tenant, Limits())
        if settings.patrol_s:
            control.patrol = Patrol(
                ledger, control.reconciler, settings.tenant, figures=self._figures, round_s=settings.patrol_s
            )
        self._outbox = Outbox(
            ledger,
            self._publisher,
            figures=self._figures,
            random=self._random,
            publish_s=settings.publisher_deadline_ms / 1000,
        )
        loops: dict[str, Loop] = {"drain": drain, "outbox": self._outbox, "control": control}
        if self._target:
            loops["webhooks"] = Webhooks(ledger, self._target, figures=self._figures, random=self._random)
        self._worker = worker = Worker(loops, figures=self._figures, random=self._random)
        control.examiner = Examiner(
            *(ledger, self._hot, settings.tenant), lag=drain.lag, loops=worker.health, patrol=control.patrol
        )
        self._attempts = Attempts(ledger, settings.tenant)
        guard = Guard(self._keeper, settings.tenant, anonymous=settings.anonymous, attempts=self._attempts)
        self._admin = AdminServer(
            *(LedgerAdmin(control), settings.addresses),
            guard=guard,
            reflected=settings.reflection,
            certificates=self._certificates,
        )
        await self._admin.start()
        self._soundings = Soundings(ledger, self._hot, self._figures)
        work = (
            *(worker.run(), self._watch_health(self._admin, worker), self._soundings.run(), self._attempts.run()),
            rereading.follow({"access": self._keeper} | ({"tls": self._certificates} if self._certificates else {})),
        )
        self._tasks += [asyncio.create_task(each) for each in work]
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    async def stop(self) -> None:
        """Calls in flight and batches in hand are finished, within bounds. May be called twice, and before a start."""
        self._ending = True
        if self._admin:
            await self._admin.stop(self.reloader.settings.stop_ms / 1000)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._attempts:
            await self._attempts.stop()
        for reader in self._readers:
            await reader.close()
        await self._hot.close()
        if self._ledger:
            await self._ledger.close()
        self._exposition.stop()
        await self.traces.stop()

    def components(self) -> Components:
        """What has to be well for the ledger to be kept up to date and asked."""
        if self._ending or self._worker is None or self._soundings is None:
            return {"serving": Component(False, "it is being stopped" if self._ending else "it is starting")}
        loops = {f"loop/{name}": Component(one.well, _why(one)) for name, one in self._worker.health.items()}
        return {"serving": Component(True), **self._soundings.components, **loops}

    def _apply(self, settings: Settings) -> None:
        patrol = self._control.patrol if self._control else None
        logs.set_level(settings.log_level)
        if self._drain:
            self._drain.tune(settings.batch, settings.linger_ms)
        if patrol:
            patrol.round_s = settings.patrol_s

    async def _beat(self) -> None:
        while True:
            self._pulse.beat()
            await asyncio.sleep(HEALTH_EVERY_S)

    def _committed(self, outcome: Outcome) -> None:
        if outcome.events:
            self._outbox.wake()
        if outcome.changes and self._control:
            self._control.pusher.wake()

    async def _watch_health(self, admin: AdminServer, worker: Worker) -> None:
        """SERVING while every loop runs and goes round; of the stores it is told beside that."""
        told: dict[str, bool] = {}
        was_well = False  # That the loops come to run is no news.
        while True:
            if self._soundings:
                await admin.tell_of({name: part.ok for name, part in self._soundings.components.items()})
            now = {name: health.well for name, health in worker.health.items()}
            if now != told:
                await admin.tell(now)
                down = {name: _why(worker.health[name]) for name, well in now.items() if not well}
                if told and (down or was_well):
                    log.warning("health", serving=not down, down=down)
                was_well = was_well or not down
                told = now
            await asyncio.sleep(HEALTH_EVERY_S if all(now.values()) else SOON_S)


async def open_ledger(settings: Settings) -> Ledger:
    """The ledger, its tables up to date. Waits for a database that is still starting.

    LedgerUnavailable: it has not come in time. SchemaError: it is not this program's.
    """
    deadline = monotonic() + settings.start_ms / 1000
    told, again_s = "", 0.0
    while True:
        try:
            return await Ledger.open(settings.database_url, connections=settings.connections)
        except LedgerUnavailable as error:
            if monotonic() >= deadline:
                raise
            if str(error) != told or monotonic() >= again_s:
                told, again_s = str(error), monotonic() + SAY_AGAIN_S
                log.warning("waiting_for_database", error=told)
        await asyncio.sleep(RETRY_S)


def _why(health: Health) -> str:
    if health.well:
        return ""
    return f"{', '.join(health.hung)} hangs" if health.hung else health.error
