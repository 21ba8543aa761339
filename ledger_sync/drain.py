"""Carries the journal into the ledger: reads a batch, books it in one transaction, acknowledges it after the commit.

Whatever ends a drain (database or hot store away, a kill) loses nothing: what was not acknowledged is read again at the
next start, and what had been committed is recognised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import monotonic, time
from typing import TYPE_CHECKING, Final

import structlog

from entitlement import keys
from ledger_sync.beat import Beat
from ledger_sync.fence import Stale
from ledger_sync.journal_reader import Entries, JournalReader, Lag, arrivals, parse_id
from ledger_sync.ledger import LedgerRefused
from ledger_sync.posting import Posted, Reason, Rejected, read
from ledger_sync.settlement import Outcome
from ledger_sync.telemetry import Figures
from ledger_sync.worker import uninterrupted

if TYPE_CHECKING:
    from entitlement.opening import Opening
    from ledger_sync.ledger import Lease, Ledger, Presence

LEASE: Final = "journal"
SHARE_EVERY_S: Final = 0.5  # how often the lanes are shared out: those of a process that died wait no longer
BLOCK_MS: Final = 250  # a read waits no longer, and neither does a stop for it
POLL_S: Final = 0.25  # how long a settled position may go unnoticed
LAG_EVERY_S: Final = 5.0
STRAY_S: Final = 5.0  # how long an entry that was delivered to nobody may go unnoticed

log = structlog.get_logger(__name__)


class Batch:
    """What was read and is to be settled together."""

    def __init__(self) -> None:
        self.posted: list[Posted] = []
        self.rejected: list[Rejected] = []
        self.ids: dict[str, list[bytes]] = {}  # by stream, everything read
        self.size = 0

    def add(self, entries: Entries) -> None:
        for stream, found in entries.items():
            self.ids.setdefault(stream, []).extend([entry_id for entry_id, _ in found])
            self.size += len(found)
        for arrival in arrivals(entries):
            record = read(arrival)
            if isinstance(record, Posted):
                self.posted.append(record)
            else:
                self.rejected.append(record)


class Lane:
    """One reader and its batches, one after the other."""

    def __init__(
        self,
        ledger: Ledger,
        reader: JournalReader,
        size: int,
        linger_ms: int,
        figures: Figures,
        on_commit: Callable[[Outcome], None],
    ) -> None:
        self.reader = reader
        self.beat = Beat()
        self._ledger = ledger
        self.tune(size, linger_ms)
        self._figures = figures
        self._on_commit = on_commit
        self.opening: int | None = None  # of the hot store that is read
        self._in_hand = False
        self._stray = False  # someone waits, and nothing is in hand
        self._asked = asyncio.Event()  # someone waits: do not linger
        self._done = asyncio.Event()  # of the batch in hand

    def tune(self, size: int, linger_ms: int) -> None:
        """From the next batch on."""
        self._size = size
        self._linger_s = linger_ms / 1000

    async def run(self, lease: Lease) -> None:
        """Until it is cancelled: then the batch in hand is finished, and what was read beyond it is left to others."""
        try:
            with self.beat:
                await self._run(lease)
        finally:
            self.opening = None
            self._in_hand = False
            self._done.set()

    async def _run(self, lease: Lease) -> None:
        opening = await self._ledger.opening()
        self.opening = opening.number
        await self.reader.join(opening)
        await self._settle_pending()
        await self.reader.tell_settled(opening.number)
        looked_s = monotonic()
        while True:
            self.beat()
            lease.check()
            await uninterrupted(self._turn(lease))
            if self._stray or monotonic() > looked_s + STRAY_S:
                self._stray, looked_s = False, monotonic()
                await self._settle_strays(opening)

    async def _settle_pending(self) -> None:
        async for entries in self.reader.pending():
            self.beat()
            batch = Batch()
            batch.add(entries)
            await uninterrupted(self._settle(batch))

    async def _settle_strays(self, opening: Opening) -> None:
        """Between two turns nothing is pending, but for what was delivered to nobody: a read whose answer was lost has
        run late, here or in another process. No record that comes later would show it where none comes.
        """
        if await self.reader.has_pending():
            log.warning("entries were delivered to nobody", lane=self.reader.partitions[0])
            await self.reader.join(opening)
            await self._settle_pending()

    async def _turn(self, lease: Lease) -> None:
        if (batch := await self._collect(lease)).size:
            await self._settle(batch, all_read=True)
        self._in_hand = False
        self._done.set()

    async def _collect(self, lease: Lease) -> Batch:
        """The next batch: full, or all there is after a short wait in which more of it gathers. What was read is
        settled even if the lease is lost meanwhile; nothing is read after it.
        """
        batch = Batch()
        entries, more = await self.reader.new(BLOCK_MS)
        self._in_hand = bool(entries)
        batch.add(entries)
        if batch.size and not more:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._linger_s):
                    await self._asked.wait()
            more = True
        self._asked.clear()
        while more and batch.size < self._size and lease.held:
            entries, more = await self.reader.new(0)
            batch.add(entries)
        return batch

    async def _settle(self, batch: Batch, *, all_read: bool = False) -> None:
        started = monotonic()
        if batch.rejected:
            self._rejected(await self._ledger.quarantine(batch.rejected))
        if batch.posted:
            await self._book(batch.posted)
            oldest_ms = min([posted.record.recorded_ms for posted in batch.posted])
            self._figures.age.observe(max(0.0, time() - oldest_ms / 1000))
        self._figures.batch.observe(monotonic() - started)
        await self.reader.acknowledge(batch.ids, self.opening or 0, all_read=all_read)

    async def _book(self, records: Sequence[Posted]) -> None:
        """Books what the database takes, by halves if need be; what it refuses is passed over, with its reason."""
        self.beat()
        try:
            outcome = await self._ledger.post(records, opening=self.opening)
        except LedgerRefused as refused:
            if len(records) > 1:
                middle = len(records) // 2
                await self._book(records[:middle])
                await self._book(records[middle:])
            else:
                await self._pass_over(records[0], str(refused))
            return
        self._report(outcome)

    async def _pass_over(self, record: Posted, why: str) -> None:
        try:
            outcome = await self._ledger.post([record], refused=why, opening=self.opening)
        except LedgerRefused:  # Not even its account's position can move: the next record will show the gap.
            rejected = [Rejected(record.arrival, Reason.REFUSED, why)]
            self._rejected(await self._ledger.quarantine(rejected))
            return
        self._report(outcome)

    def _report(self, outcome: Outcome) -> None:
        for name, count in (
            ("booked", outcome.booked),
            ("repeated", outcome.repeated),
            ("duplicate", outcome.duplicates),
            (
                "changed",
                outcome.records - outcome.booked - outcome.repeated - outcome.duplicates - len(outcome.rejected),
            ),
        ):
            if count:
                self._figures.records.labels(name).inc(count)
        self._figures.crossings.inc(outcome.crossings)
        self._figures.expired.inc(outcome.expired)
        self._rejected(outcome.rejected)
        for gap in outcome.gaps:
            self._figures.gaps.inc()
            log.error("sequence_gap", tenant=gap.tenant, customer=gap.customer, settled=gap.settled, found=gap.found)
        self._on_commit(outcome)

    def _rejected(self, rejected: Sequence[Rejected]) -> None:
        for item in rejected:
            self._figures.rejected.labels(item.reason).inc()
            log.error(
                "quarantined",
                stream=item.arrival.stream,
                entry=item.arrival.entry_id.decode(),
                reason=item.reason,
                detail=item.detail,
            )

    async def settled(self, stream: str, stream_id: str) -> None:
        wanted = parse_id(stream_id)
        while True:
            self._done.clear()
            # What is in hand counts, even when the hot store has forgotten it meanwhile.
            if not self._in_hand and await self.reader.is_settled(stream, wanted):
                return
            self._stray = not self._in_hand
            self._asked.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._done.wait()


class Drain:
    """One of a deployment's drains. Each reader is a lane of partitions; whoever has a lane's lease is at work on it,
    and the drains that are there share the lanes evenly. All are given the same number of lanes.
    """

    def __init__(
        self,
        ledger: Ledger,
        readers: Sequence[JournalReader],
        *,
        figures: Figures,
        on_commit: Callable[[Outcome], None],
        batch: int = 2_000,
        linger_ms: int = 20,
    ) -> None:
        self._ledger = ledger
        self._figures = figures
        self._lanes = [Lane(ledger, reader, batch, linger_ms, figures, on_commit) for reader in readers]
        self._lane_of = {partition: lane for lane in self._lanes for partition in lane.reader.partitions}
        self._serving: dict[int, asyncio.Task[None]] = {}
        self._beat = Beat()
        self._lag_beat = Beat()

    def tune(self, batch: int, linger_ms: int) -> None:
        """From the next batches on."""
        for lane in self._lanes:
            lane.tune(batch, linger_ms)

    @property
    def beats(self) -> Mapping[str, Beat]:
        lanes = {f"lane{number}": lane.beat for number, lane in enumerate(self._lanes)}
        return {"": self._beat, "lag": self._lag_beat, **lanes}

    @property
    def serving(self) -> tuple[int, ...]:
        """The lanes that this one is at work on."""
        return tuple(sorted(self._serving))

    async def run(self) -> None:
        """Until it is cancelled: then the batch in hand is finished and acknowledged. Raises when a store is away."""
        try:
            with self._beat:
                await self._run()
        finally:
            self._serving = {}
            self._figures.lanes.set(0)

    async def _run(self) -> None:
        async with self._ledger.presence(LEASE) as presence, asyncio.TaskGroup() as group:
            group.create_task(self._watch_lag())
            while True:
                self._beat()
                await self._share(presence, group)
                if ended := await presence.end_silent():
                    log.warning("silent_transactions_ended", count=ended)
                self._figures.lanes.set(len(self._serving))
                await asyncio.sleep(SHARE_EVERY_S)

    async def _share(self, presence: Presence, group: asyncio.TaskGroup) -> None:
        """Gives up the lanes beyond a fair share, takes free ones up to it."""
        opening = (await self._ledger.opening()).number
        share = -(-len(self._lanes) // max(1, await presence.count()))
        over = [number for number in self.serving if self._lanes[number].opening not in (None, opening)]
        for number in dict.fromkeys((*over, *self.serving[share:])):
            if task := self._serving.pop(number, None):
                task.cancel()
                await asyncio.wait([task])
        for number in range(len(self._lanes)):
            if len(self._serving) >= share:
                return
            if number not in self._serving:
                await self._take(number, group)

    async def _take(self, number: int, group: asyncio.TaskGroup) -> None:
        taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        task = group.create_task(self._serve(number, taken))
        if await taken:
            self._serving[number] = task

    async def _serve(self, number: int, taken: asyncio.Future[bool]) -> None:
        async with self._ledger.try_lease(f"{LEASE}/{number}/{len(self._lanes)}") as lease:
            taken.set_result(lease is not None)
            while lease is not None:
                try:
                    await self._lanes[number].run(lease)
                except Stale as over:
                    log.warning("a lane begins anew", lane=number, why=str(over))

    async def settled(self, partition: int, stream_id: str) -> None:
        """Returns when the ledger has every record of the partition's journal up to that id. Bound it by a deadline.

        Unavailable: the hot store is away.
        """
        await self._lane_of[partition].settled(keys.journal(partition), stream_id)

    async def lag(self) -> Lag:
        """What the journal holds and the ledger does not. Unavailable: the hot store is away."""
        lags = [await lane.reader.lag() for lane in self._lanes]
        return Lag(sum(lag.records for lag in lags), min([lag.oldest_ms for lag in lags if lag.records], default=0))

    async def _watch_lag(self) -> None:
        with self._lag_beat:
            while True:
                self._lag_beat()
                lag = await self.lag()
                self._figures.lag.set(lag.records)
                self._figures.oldest.set(max(0.0, time() - lag.oldest_ms / 1000) if lag.oldest_ms else 0)
                await asyncio.sleep(LAG_EVERY_S)
