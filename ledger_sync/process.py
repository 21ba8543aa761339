"""ledger_sync as one long-lived part: wired, started and stopped in order."""

from __future__ import annotations

import asyncio
import gc
from random import Random
from time import monotonic
from typing import Final

import prometheus_client
import structlog

from entitlement.decision import Limits
from ledger_sync.admin import LedgerAdmin
from ledger_sync.admin_server import AdminServer
from ledger_sync.control import ControlPlane
from ledger_sync.drain import Drain
from ledger_sync.examine import Examiner
from ledger_sync.hot_store import HotStore
from ledger_sync.journal_reader import JournalReader
from ledger_sync.ledger import Ledger, LedgerUnavailable
from ledger_sync.outbox import Outbox
from ledger_sync.patrol import Patrol
from ledger_sync.publisher import open_publisher
from ledger_sync.settings import Settings, split_address
from ledger_sync.settlement import Outcome
from ledger_sync.telemetry import Figures
from ledger_sync.webhooks import Webhooks, declare, target_of
from ledger_sync.worker import Health, Loop, Worker

GC_THRESHOLD: Final = 50_000  # A batch makes many small values that live briefly together.
HEALTH_EVERY_S: Final = 0.25
RETRY_S: Final = 0.25

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
        self._publisher = open_publisher(
            settings.publisher or settings.redis_url, deadline_ms=settings.publisher_deadline_ms
        )
        self._readers = [
            JournalReader.connect(
                settings.redis_url, range(lane, settings.partitions, settings.lanes), settings.consumer
            )
            for lane in range(min(settings.lanes, settings.partitions))
        ]
        self._hot = HotStore.connect(settings.redis_url, settings.partitions)
        self._ledger: Ledger | None = None
        self._admin: AdminServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._admin.addresses if self._admin else ()

    async def start(self) -> None:
        """LedgerUnavailable: the database has not come in time. SchemaError: it is not this program's. InvalidArgument:
        an address cannot be bound.
        """
        settings = self._settings
        self._ledger = ledger = await self._open_ledger()
        await declare(ledger, self._target)
        drain = Drain(
            ledger,
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
        loops: dict[str, Loop] = {"drain": drain, "outbox": self._outbox, "control": self._control}
        if self._target:
            loops["webhooks"] = Webhooks(ledger, self._target, figures=self._figures, random=self._random)
        self._worker = Worker(loops, figures=self._figures, random=self._random)
        control.examiner = Examiner(
            *(ledger, self._hot, settings.tenant), lag=drain.lag, loops=self._worker.health, patrol=control.patrol
        )
        self._admin = AdminServer(LedgerAdmin(self._control), settings.addresses, reflected=settings.reflection)
        await self._admin.start()
        if settings.metrics:
            host, port = split_address("metrics", settings.metrics)
            prometheus_client.start_http_server(port, host.strip("[]"))
        self._tasks = [asyncio.create_task(self._worker.run()), asyncio.create_task(self._watch_health(self._admin))]
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    async def stop(self) -> None:
        """Calls in flight and batches in hand are finished, within bounds. May be called twice, and before a start."""
        if self._admin:
            await self._admin.stop(self._settings.stop_ms / 1000)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for reader in self._readers:
            await reader.close()
        await self._hot.close()
        if self._ledger:
            await self._ledger.close()

    async def _open_ledger(self) -> Ledger:
        """Waits for a database that is still starting."""
        deadline = monotonic() + self._settings.start_ms / 1000
        while True:
            try:
                return await Ledger.open(self._settings.database_url, connections=self._settings.connections)
            except LedgerUnavailable as error:
                if monotonic() >= deadline:
                    raise
                log.warning("waiting_for_database", error=str(error))
            await asyncio.sleep(RETRY_S)

    def _committed(self, outcome: Outcome) -> None:
        if outcome.events:
            self._outbox.wake()
        if outcome.changes:
            self._control.pusher.wake()

    async def _watch_health(self, admin: AdminServer) -> None:
        """SERVING while every loop runs and goes round."""
        told: dict[str, bool] = {}
        while True:
            now = {name: health.well for name, health in self._worker.health.items()}
            if now != told:
                await admin.tell(now)
                down = {name: _why(self._worker.health[name]) for name, well in now.items() if not well}
                if told:
                    log.warning("health", serving=not down, down=down)
                told = now
            await asyncio.sleep(HEALTH_EVERY_S)


def _why(health: Health) -> str:
    return f"{', '.join(health.hung)} hangs" if health.hung else health.error
