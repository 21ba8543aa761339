"""Publishes what the ledger has committed, in commit order, at least once, until the publisher has it.

Rows commit out of the order of their ids: a reader that goes by `id > last` misses those of a transaction that commits
late. Here a row is read only when no transaction that may still write before it is running: its transaction id lies
below the oldest running one (https://event-driven.io/en/ordering_in_postgres_outbox/).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from ledger_sync.beat import DEADLINE_S, Beat, cancelled
from ledger_sync.publisher import Outgoing, Publisher, PublishFailed
from ledger_sync.telemetry import Figures
from ledger_sync.worker import uninterrupted

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Lease, Ledger

LEASE: Final = "outbox"
CURSOR: Final = "default"  # one stream of events, one cursor; whichever target it goes to
PUBLISH_S: Final = 10.0
POLL_S: Final = 1.0  # what others commit is seen no later
FIRST_PAUSE_S: Final = 0.1  # after a publish that failed; doubles
LONGEST_PAUSE_S: Final = 10.0

_PLAN: Final = "SET LOCAL enable_seqscan = off"  # The table is small when a plan is made, and may be large later.

_CURSOR: Final = "SELECT txid::text, id FROM outbox_cursor WHERE publisher = $1"

# By the columns, not by the texts that are selected: as a text '1000' comes before '999'.
_NEXT: Final = """
SELECT txid::text, id, event_id, tenant, type, customer, body FROM outbox
WHERE (txid, id) > ($1::text::xid8, $2::bigint) AND txid < pg_snapshot_xmin(pg_current_snapshot())
ORDER BY outbox.txid, outbox.id LIMIT $3"""

_DELETE: Final = """
DELETE FROM outbox
WHERE (txid, id) > ($1::text::xid8, $2::bigint) AND (txid, id) <= ($3::text::xid8, $4::bigint)"""

_MOVE: Final = """
INSERT INTO outbox_cursor AS c (publisher, txid, id, published) VALUES ($1, $2::text::xid8, $3, $4)
ON CONFLICT (publisher)
DO UPDATE SET txid = excluded.txid, id = excluded.id, published = c.published + excluded.published
    WHERE (c.txid, c.id) = ($5::text::xid8, $6::bigint)
RETURNING 1"""

log = structlog.get_logger(__name__)


class Cursor(msgspec.Struct, frozen=True):
    """The last row that was published."""

    txid: str = "0"
    id: int = 0


class Outbox:
    """The one active publisher of a deployment, by lease: a second one waits. `wake` it after a commit."""

    def __init__(
        self,
        ledger: Ledger,
        publisher: Publisher,
        *,
        figures: Figures,
        random: Random,
        batch: int = 1_000,
        poll_s: float = POLL_S,
        publish_s: float = PUBLISH_S,
    ) -> None:
        """`publish_s`: how long the publisher may take for one batch."""
        self._ledger = ledger
        self._publisher = publisher
        self._figures = figures
        self._random = random
        self._batch = batch
        self._poll_s = poll_s
        self._committed = asyncio.Event()
        self._lease: Lease | None = None  # while it runs
        self._beat = Beat(DEADLINE_S + publish_s)

    @property
    def beats(self) -> Mapping[str, Beat]:
        return {"": self._beat}

    def wake(self) -> None:
        self._committed.set()

    async def run(self) -> None:
        """Until it is cancelled. Raises when the database is away; a publisher that is away is waited for."""
        with self._beat:
            async with self._ledger.lease(LEASE, self._beat) as self._lease:
                await self._run(self._lease)

    async def _run(self, lease: Lease) -> None:
        await self._publisher.start()
        try:
            while not cancelled():
                self._beat()
                lease.check()
                self._committed.clear()
                if await self.publish() < self._batch and not cancelled():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._poll_s):
                            await self._committed.wait()
        finally:
            await self._publisher.stop()

    async def publish(self) -> int:
        """Publishes the next committed events, in order, and forgets them. Returns how many there were.

        Cancelled or failed halfway they are published again, with the same ids and bodies.
        """
        async with self._ledger.transaction() as connection:
            last = await _cursor(connection)
            await connection.execute(_PLAN)
            rows = await connection.fetch(_NEXT, last.txid, last.id, self._batch)
        if not rows:
            return 0
        await self._deliver(
            [Outgoing(id=row[2], tenant=row[3], type=row[4], customer=row[5], body=row[6]) for row in rows]
        )
        await uninterrupted(self._forget(last, Cursor(rows[-1][0], rows[-1][1]), len(rows)))
        return len(rows)

    async def _forget(self, last: Cursor, now: Cursor, published: int) -> None:
        async with self._ledger.transaction() as connection:
            await connection.execute(_PLAN)
            if not await connection.fetchval(_MOVE, CURSOR, now.txid, now.id, published, last.txid, last.id):
                return  # Another has published them meanwhile, and more: it took this one for dead.
            await connection.execute(_DELETE, last.txid, last.id, now.txid, now.id)
        self._figures.published.inc(published)

    async def _deliver(self, events: Sequence[Outgoing]) -> None:
        """Tries until the publisher has accepted every event: nothing later overtakes them."""
        pause_s = FIRST_PAUSE_S
        while True:
            self._beat()
            if self._lease:
                self._lease.check()  # Another may have published these, and later ones.
            try:
                await self._publisher.publish(events)
                return
            except PublishFailed as failed:
                if cancelled():
                    raise
                self._figures.publish_failures.inc()
                log.warning("publish_failed", target=failed.target, reason=failed.reason, retry_s=round(pause_s, 1))
            await self._beat.sleep(pause_s * (0.5 + self._random.random()))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


async def _cursor(connection: Connection) -> Cursor:
    row = await connection.fetchrow(_CURSOR, CURSOR)
    return Cursor(*row) if row else Cursor()
