"""Usage that did not pass the gateway: late and offline events, and those of a backfill that is closed.

They go through the hot store's own script, in ADJUST_ONLY mode: what has happened is recorded, whatever the balance,
and is atomic with live traffic. What was recorded is in the ledger when the call returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.decision import (
    Consume,
    Decision,
    Limits,
    Mismatch,
    Mode,
    NotLoaded,
    OutOfRange,
    OutOfTime,
    Stale,
    Verdict,
    parse_outcome,
)
from entitlement.errors import InvalidArgument, Unavailable
from entitlement.identity import fingerprint
from entitlement.periods import DAY
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS, within
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes
from ledger_sync.archive import fill_archive, fill_periods
from ledger_sync.catalogs import CatalogStore
from ledger_sync.hot_store import HotStore, Name
from ledger_sync.install import Settled, ensure
from ledger_sync.pricing import NO_PLAN, PriceList

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

MAX_EVENTS: Final = 1_000  # in one call
ATTEMPTS: Final = 5  # an install, a plan learned and a price change may each need another
LOAD_S: Final = 10.0
SETTLED_S: Final = 10.0
BACKFILL_MS: Final = 3_653 * DAY  # ten years


class Open(msgspec.Struct):
    """An event that has no answer yet."""

    index: int
    request: Consume
    plan: str = NO_PLAN
    at_ms: int = 0

    @property
    def name(self) -> Name:
        return self.request.tenant, self.request.customer


class Tally(msgspec.Struct):
    """What became of the events, by their index."""

    recorded: set[int] = set()
    duplicates: set[int] = set()
    rejected: dict[int, str] = {}
    partitions: set[int] = set()  # whose journal holds something that the ledger may not have yet

    def response(self, message: pb.RecordUsageRequest) -> pb.RecordUsageResponse:
        return pb.RecordUsageResponse(
            recorded=len(self.recorded),
            duplicates=len(self.duplicates),
            rejected=[
                pb.Rejected(idempotency_key=message.events[index].idempotency_key, error=error)
                for index, error in sorted(self.rejected.items())
            ],
        )


class UsageRecorder:
    """`settled` comes from the journal's reader."""

    def __init__(
        self,
        ledger: Ledger,
        hot: HotStore,
        catalogs: CatalogStore,
        settled: Settled,
        tenant: str,
        limits: Limits | None = None,
    ) -> None:
        self._ledger = ledger
        self._hot = hot
        self._catalogs = catalogs
        self._settled = settled
        self._tenant = tenant
        self._limits = limits or Limits()
        self._prices: PriceList | None = None

    async def record(self, message: pb.RecordUsageRequest, actor: str) -> pb.RecordUsageResponse:
        """Records each event once, whatever its mode says; an event's own fault rejects that event alone.

        Events may be 35 days old. Unavailable: the outcome is unknown; the same call again is safe and converges.
        """
        assert not message.backfill_id, "a backfill's events are gathered first"
        within("events", len(message.events), 1, MAX_EVENTS)
        tally = Tally()
        events = self.parse(message.events, tally)
        events = await self.without_known(events, tally)
        await self.consume(events, tally)
        if tally.recorded:
            async with self._ledger.transaction() as connection:
                detail = (
                    f"recorded={len(tally.recorded)} duplicates={len(tally.duplicates)} rejected={len(tally.rejected)}"
                )
                await changes.audit(connection, self._tenant, actor, "RecordUsage", "-", detail)
        return tally.response(message)

    def parse(self, messages: Iterable[gateway_pb2.CheckAndConsumeRequest], tally: Tally) -> list[Open]:
        """The events that may be recorded; the others are rejected in the tally."""
        events = []
        for index, event in enumerate(messages):
            try:
                request = parse_consume(self._tenant, event)
                if request.mode is Mode.CHECK_ONLY:
                    raise InvalidArgument("mode", "CHECK_ONLY records nothing")
            except InvalidArgument as error:
                tally.rejected[index] = str(error)
                continue
            # What is journaled stays the event as it came, so that its fingerprint is the gateway's.
            events.append(Open(index, msgspec.structs.replace(request, mode=Mode.ADJUST_ONLY)))
        return events

    async def _known(self, events: list[Open]) -> dict[str, bytes]:
        """Of these events' keys, those that the ledger has, with their fingerprints."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                """SELECT idempotency_key, fingerprint FROM usage_events
                   WHERE tenant = $1 AND idempotency_key = ANY($2::text[])""",
                *(self._tenant, [event.request.key for event in events]),
            )
        return {row["idempotency_key"]: row["fingerprint"] for row in rows}

    async def _check(self, events: list[Open], tally: Tally) -> None:
        """Usage has no receipt: what the hot store has lost before the ledger read it is not acknowledged."""
        recorded = [event for event in events if event.index in tally.recorded]
        if recorded and len(await self._known(recorded)) < len({event.request.key for event in recorded}):
            raise Unavailable("the hot store has lost events before the ledger had them; send the same events again")

    async def without_known(self, events: list[Open], tally: Tally) -> list[Open]:
        """The ledger remembers keys for ever, the hot store for an hour."""
        known = await self._known(events)
        fresh = []
        for event in events:
            if event.request.key not in known:
                fresh.append(event)
            elif known[event.request.key] == fingerprint(event.request.payload):
                tally.duplicates.add(event.index)
            else:
                tally.rejected[event.index] = mismatch(event.request.key)
        return fresh

    async def consume(self, events: list[Open], tally: Tally, *, backfill: bool = False) -> None:
        """Has the hot store record them; when it returns they are in the ledger. A backfill's may be ten years old."""
        await self._decide(events, tally, backfill=backfill)
        await self._settle(tally)
        await self._check(events, tally)

    async def _decide(self, events: list[Open], tally: Tally, *, backfill: bool) -> None:
        limits = msgspec.structs.replace(self._limits, oldest_ms=BACKFILL_MS) if backfill else self._limits
        prices = await self._price_list()
        if backfill:
            await self._prepare_archives(events)
        for _ in range(ATTEMPTS):
            if not events:
                return
            calls = [(event.request, prices.charge(event.request, event.plan, event.at_ms)) for event in events]
            replies = await self._hot.consume(calls, limits)
            tally.partitions |= {self._hot.partition(event.name) for event in events}
            again = [event for event, reply in zip(events, replies, strict=True) if self._is_open(event, reply, tally)]
            unloaded = {event.name for event, reply in zip(events, replies, strict=True) if reply == b"!NOT_LOADED"}
            await _load(self._hot, sorted(unloaded))
            prices = await self._price_list()
            events = again
        raise Unavailable("accounts or their prices kept changing; send the same events again")

    def _is_open(self, event: Open, reply: bytes, tally: Tally) -> bool:
        """Whether the event has to be tried again."""
        outcome = parse_outcome(reply, event.request)
        match outcome:
            case Decision():
                if outcome.verdict is Verdict.DENY:
                    tally.rejected[event.index] = outcome.reason.name
                else:
                    (tally.duplicates if outcome.replayed else tally.recorded).add(event.index)
            case Stale():
                event.plan, event.at_ms = outcome.plan, event.request.event_ms or outcome.now_ms
                return True
            case NotLoaded():
                return True
            case Mismatch():
                tally.rejected[event.index] = mismatch(event.request.key)
            case OutOfTime():
                tally.rejected[event.index] = (
                    f"event_time: {event.request.event_ms} ms is outside what is accepted around {outcome.now_ms} ms;"
                    " an older event needs a backfill_id"
                )
            case OutOfRange():
                tally.rejected[event.index] = (
                    f"usage[{outcome.line}].quantity: its amount leaves 0..{MAX_NANOS} nanos, or the period's total"
                    f" 0..{MAX_CUMULATIVE} units"
                )
        return False

    async def _prepare_archives(self, events: Sequence[Open]) -> None:
        """An old event counts on its own period's meters, which the hot store may not have any more."""
        old: dict[Name, set[int]] = {}
        for event in events:
            if event.request.event_ms:
                old.setdefault(event.name, set()).add(event.request.event_ms)
        await _load(self._hot, sorted(old))
        for name, times_ms in sorted(old.items()):
            await fill_archive(self._ledger, self._hot, name, times_ms)

    async def _price_list(self) -> PriceList:
        if self._prices is None or self._prices.generation != await self._catalogs.generation():
            self._prices = PriceList((await self._catalogs.snapshot()).tenants[0])
        return self._prices

    async def _settle(self, tally: Tally) -> None:
        """Waits until what was recorded is in the ledger."""
        if not tally.partitions:
            return
        try:
            async with asyncio.timeout(SETTLED_S):
                for partition, stream_id in (await self._hot.last_ids(tally.partitions)).items():
                    await self._settled(partition, stream_id)
        except TimeoutError:
            raise Unavailable(
                "the events are recorded in the hot store and not yet in the ledger; send the same events again"
            ) from None


async def open_archive(ledger: Ledger, hot: HotStore, name: Name, starts: Iterable[int]) -> None:
    """The hot account, loaded, with the meters of the periods that begin then."""
    await _load(hot, [name])
    await fill_periods(ledger, hot, name, starts)


async def _load(hot: HotStore, names: Sequence[Name]) -> None:
    try:
        async with asyncio.timeout(LOAD_S):
            await ensure(hot, names)
    except TimeoutError:
        raise Unavailable("an account was not loaded in time; make the same call again") from None


def mismatch(key: str) -> str:
    return f"idempotency_key: {key!r} was used before with another payload (reason IDEMPOTENCY_MISMATCH)"
