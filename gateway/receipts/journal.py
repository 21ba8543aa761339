"""Receipts as the event loop sees them: drafted, kept, replayed on another hot store, dropped once settled."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import structlog

from entitlement import receipt
from entitlement.catalog import Durability
from entitlement.decision import Charge, Consume, Mode
from entitlement.errors import EntitlementError, InvalidArgument, Unavailable
from entitlement.opening import Opening
from gateway.receipts.folder import Folder, Segment
from gateway.receipts.writer import Group, Held, Turn, Writer

MAX_REMEMBERED: Final = 50_000  # prices whose bytes are kept
TEND_EVERY_S: Final = 0.5
AGAIN_S: Final = 30.0
ADOPT_S: Final = 30.0  # how often is looked for folders whose gateways did not come back
KEPT_S: Final = 5.0  # for a disk to take a receipt
SEAL_AFTER_S: Final = 2.0  # a segment that holds something is finished after this, so that it can be dropped
DEGRADED: Final = 0  # the opening of what was granted without a hot store
NOTHING: Final = -1
StreamId = tuple[int, int]

_log = structlog.get_logger(__name__)


class Journals(Protocol):
    """What a hot store says of its journal streams, by partition."""

    async def last_ids(self) -> dict[int, StreamId]:
        """The id that each has given last; none for one that does not exist."""
        ...

    async def settled(self) -> dict[int, tuple[int, StreamId]]:
        """Under which opening the ledger has come how far."""
        ...


class _Sealed(msgspec.Struct):
    """A finished segment. `opening`: the last one under which the hot store knew all that it holds. `marks`: how far
    the ledger has to come in each partition, under it, before the segment can be dropped.
    """

    segment: Segment
    opening: int
    marks: Mapping[int, StreamId] | None = None


class Written(msgspec.Struct, frozen=True):
    """What has been made durable since the writer was started."""

    receipts: int = 0
    size: int = 0
    syncs: int = 0
    sync_s: float = 0.0


class Receipts:
    """The receipts of one gateway. `begin` before anything is drafted; `stop` may be called twice."""

    def __init__(self, base: Path, *, max_bytes: int = 1 << 30, clock: Callable[[], float] = time.monotonic) -> None:
        self._base = base
        self.max_bytes = max_bytes
        self._clock = clock
        self._offset_s = time.time() - clock()
        self._prices: dict[int, tuple[Charge, bytes]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._folder: Folder | None = None
        self._orphans: list[Folder] = []  # of gateways that did not come back
        self._writer: Writer | None = None
        self._sealed: list[_Sealed] = []
        self._begun_s = 0.0
        self._deployment = ""
        self._broken = ""  # why the disk took nothing
        self.problem = ""  # why nothing can be granted now
        self.opening = 0
        self._adopt_s = 0.0  # not before this is looked for folders of others
        self._again_s = 0.0  # not before this are receipts replayed that could not be
        self._begun = NOTHING  # the opening of the segment in hand, as asked of the writer
        self.replayed = 0  # debited once more
        self.damaged = 0  # places found broken inside segments
        self.refused = 0  # receipts that could not be replayed

    def check(self) -> None:
        """InvalidArgument: there can be no receipts in this place."""
        try:
            self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgument("receipts_dir", f"{self._base}: {error.strerror}") from None
        if not os.access(self._base, os.W_OK | os.X_OK):
            raise InvalidArgument("receipts_dir", f"{self._base} cannot be written to")

    # On the way of every decision

    def draft(self, request: Consume, charge: Charge) -> bytes:
        """The receipt of a call, but for its answer; empty when none is asked for. Raises Unavailable when receipts
        cannot be kept: then nothing must be granted.
        """
        if charge.durability is Durability.REDIS or (charge.mode or request.mode) is Mode.CHECK_ONLY:
            return b""
        if self.problem:
            raise Unavailable(self.problem)
        known = self._prices.get(id(charge))
        price = self._price(charge) if known is None else known[1]
        return receipt.draft(request, price, self._now_ms())

    def draft_hold(self, kind: int, asked: Consume, charge: Charge) -> bytes:
        """The same for a call about a hold."""
        if charge.durability is Durability.REDIS:
            return b""
        if self.problem:
            raise Unavailable(self.problem)
        return receipt.draft(asked, self._price(charge), self._now_ms(), kind)

    def keep(self, receipts: list[bytes], held: Held) -> None:
        """Makes receipts durable, then tells the futures; Unavailable if that fails. Returns at once."""
        assert self._writer is not None, "begun"
        self._writer.put(Group(receipts, held))

    async def grant(self, request: Consume, charge: Charge) -> None:
        """Keeps what was granted while the hot store is away; durable when this returns. It goes into a segment of its
        own, under no opening, so that it is settled when the hot store is back. Raises Unavailable.
        """
        if self._writer is None or self.problem:
            raise Unavailable(self.problem or "receipts: the hot store was never there, so nobody knows whose they are")
        if self._begun != DEGRADED:
            self._begun = DEGRADED
            self._writer.put(Turn(DEGRADED, _unheard))
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        body = receipt.draft(request, self._price(charge), self._now_ms(), receipt.DEGRADED)
        self._writer.put(Group([body], [(done, None)]))
        await _in_time(done)

    @property
    def owes(self) -> bool:
        """Whether something was granted that the hot store may not know of, and it is time to tell it."""
        if self._clock() < self._again_s:
            return False
        return self._begun == DEGRADED or any(sealed.opening != self.opening for sealed in self._sealed)

    def _now_ms(self) -> int:
        return int((self._clock() + self._offset_s) * 1000)

    async def append(self, body: bytes) -> None:
        """Makes one receipt durable before it returns. Raises Unavailable."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.keep([body], [(done, None)])
        await _in_time(done)

    def _price(self, charge: Charge) -> bytes:
        if len(self._prices) >= MAX_REMEMBERED:
            self._prices.clear()
        packed = receipt.prices(charge)
        self._prices[id(charge)] = (charge, packed)
        return packed

    def _kept(self, groups: Sequence[Group], error: str) -> None:
        """In the writer's thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._tell, groups, error)
        except RuntimeError:  # The loop has ended, and with it everyone who waited.
            return

    def _tell(self, groups: Sequence[Group], error: str) -> None:
        if error:
            self._fail(error)
        for group in groups:
            for future, answer in group.held:
                if future.done():
                    continue
                if error:
                    future.set_exception(Unavailable(f"receipts: {error}; the outcome is unknown"))
                else:
                    future.set_result(answer)

    def _fail(self, error: str) -> None:
        if not self._broken:
            _log.error("receipts cannot be written", error=error)
        self._broken = error
        self._judge()

    def _judge(self) -> None:
        """Whether grants can be kept now."""
        if self._writer is not None and not self._writer.alive:
            self.problem = "receipts: their writer has ended; nothing is granted until the gateway is started again"
        elif self._broken:
            self.problem = f"receipts: {self._broken}; nothing is granted until the disk takes them again"
        elif (size := self.size) > self.max_bytes:
            self.problem = f"receipts: {size} bytes wait for the ledger, the limit is {self.max_bytes}"
        else:
            self.problem = ""

    @property
    def size(self) -> int:
        """Bytes on disk that are not known to be settled."""
        current = self._writer.current_bytes if self._writer else 0
        return current + sum(sealed.segment.end for sealed in self._sealed)

    @property
    def pending(self) -> int:
        """Receipts of this process, at most, that are not known to be settled."""
        current = self._writer.current_records if self._writer else 0
        return current + sum(sealed.segment.records for sealed in self._sealed)

    @property
    def written(self) -> Written:
        writer = self._writer
        return Written(writer.written, writer.written_bytes, writer.syncs, writer.sync_s) if writer else Written()

    # The hot store's openings

    def tell_time(self, now_ms: int) -> None:
        """The hot store's clock, by which receipts are dated."""
        self._offset_s = now_ms / 1000 - self._clock()

    async def begin(self, opening: Opening) -> list[Segment]:
        """What is decided from now on is decided under this opening. Returns the segments of others, which the hot
        store may not know of. Unavailable: the disk does not take receipts.
        """
        self._loop = asyncio.get_running_loop()
        try:
            if self._deployment != opening.deployment:
                await self._claim(opening.deployment)
        except (InvalidArgument, OSError) as error:
            raise Unavailable(f"receipts: {error}") from None
        if problem := await self._turn(opening.number):
            self._fail(problem)
            raise Unavailable(self.problem)
        self._broken = ""
        self.opening = opening.number
        self._collect()
        self._judge()
        return [sealed.segment for sealed in self._sealed if sealed.opening != opening.number]

    def put_off(self, segment: Segment) -> None:
        """Not all of it could be replayed, for now: it stays, and is tried again in a while."""
        self._again_s = self._clock() + AGAIN_S
        _log.error("receipts wait for their accounts", segment=segment.path.name, again_s=AGAIN_S)

    def keep_copy(self, segment: Segment) -> bool:
        """For people to look at: something in it is damaged or cannot be replayed. Whether it could be made."""
        assert self._folder is not None, "begun"
        try:
            self._folder.keep(segment)
        except OSError as error:
            _log.error("receipts that cannot be replayed are not copied", segment=segment.path.name, error=str(error))
            return False
        return True

    def replayed_all(self, segments: Sequence[Segment], opening: Opening) -> None:
        """The hot store knows all that these segments hold, under this opening."""
        paths = {segment.path for segment in segments}
        for sealed in self._sealed:
            if sealed.segment.path in paths:
                sealed.opening, sealed.marks = opening.number, None

    async def _claim(self, deployment: str) -> None:
        await self.stop()
        folder = Folder.claim(self._base, deployment)
        orphans: list[Folder] = []
        try:
            orphans += Folder.orphans(self._base, deployment)
            folder.clear_spare()
            sealed = [_Sealed(segment, segment.opening) for each in (folder, *orphans) for segment in each.segments()]
        except BaseException:
            for each in (folder, *orphans):
                each.release()
            raise
        self._folder, self._orphans, self._sealed = folder, orphans, sealed
        self._deployment = deployment
        self._adopt_s = self._clock() + ADOPT_S
        self._writer = Writer(folder, self._kept)
        self._writer.start()

    async def _turn(self, opening: int) -> str:
        self._begun = opening
        assert self._writer is not None and self._loop is not None
        done: asyncio.Future[str] = self._loop.create_future()

        def turned(error: str) -> None:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(lambda: None if done.done() else done.set_result(error))

        self._writer.put(Turn(opening, turned))
        error = await done
        self._begun_s = self._clock()
        return error

    def _collect(self) -> None:
        """Takes over what the writer has finished."""
        assert self._writer is not None and self._folder is not None
        for segment in self._writer.take_sealed():
            if segment.is_empty:
                self._discard(segment)
            else:
                self._sealed.append(_Sealed(segment, segment.opening))

    # What is settled

    async def tend(self, journals: Journals) -> None:
        """Once: finishes a segment that has been open for long, tries a disk that has failed, drops what the ledger
        has. Raises Unavailable when the hot store does.
        """
        if self._writer is None:
            return
        if not self._writer.alive:
            self._judge()
            return
        # Not while others wait to be dropped: a small file takes as much of the disk as a full one.
        waited = not self._sealed and self._clock() - self._begun_s > SEAL_AFTER_S and self._writer.current_bytes > 0
        if waited or self._broken:
            self._broken = await self._turn(self._begun)
        self._collect()
        await self._adopt()
        try:
            if self._sealed:
                await self._drop_settled(journals)
        finally:
            self._judge()

    async def _adopt(self) -> None:
        """Takes over what gateways on the same disk have left that have died and did not come back."""
        if self._clock() < self._adopt_s:
            return
        self._adopt_s, deployment = self._clock() + ADOPT_S, self._deployment
        for folder, segments in await asyncio.to_thread(_left, self._base, deployment):
            if self._deployment != deployment or self._folder is None:  # It has ended, or is another's, meanwhile.
                folder.release()
                continue
            _log.warning("receipts of another gateway are taken over", folder=folder.path.name, segments=len(segments))
            self._orphans.append(folder)
            self._sealed += [_Sealed(segment, segment.opening) for segment in segments]

    async def _drop_settled(self, journals: Journals) -> None:
        opening = self.opening
        known = [sealed for sealed in self._sealed if sealed.opening == opening]
        if fresh := [sealed for sealed in known if sealed.marks is None]:
            marks = await journals.last_ids()  # All that they hold had been journaled before.
            if not marks:
                return  # Receipts, and no journal: it has been emptied.
            for sealed in fresh:
                if sealed.opening == opening:
                    sealed.marks = marks
        settled = await journals.settled()
        for sealed in known:
            if sealed.opening == self.opening == opening and _is_settled(sealed, settled):
                self._sealed.remove(sealed)
                self._discard(sealed.segment)

    def _discard(self, segment: Segment) -> None:
        assert self._folder is not None
        try:
            self._folder.discard(segment)
        except OSError as error:
            _log.warning("receipts that are settled stay on disk", error=str(error))

    async def stop(self) -> None:
        """Makes durable what was kept, and lets go of the folder."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await asyncio.to_thread(writer.stop)
        if self._folder is not None:
            for folder in (self._folder, *self._orphans):
                folder.release()
            self._folder, self._orphans = None, []
        self._deployment = ""


def _left(base: Path, deployment: str) -> list[tuple[Folder, list[Segment]]]:
    return [(folder, folder.segments()) for folder in Folder.orphans(base, deployment)]


def _is_settled(sealed: _Sealed, settled: Mapping[int, tuple[int, StreamId]]) -> bool:
    assert sealed.marks is not None
    for partition, mark in sealed.marks.items():
        opening, reached = settled.get(partition, (0, (0, 0)))
        if opening != sealed.opening or reached < mark:
            return False
    return True


async def _in_time(done: asyncio.Future[Any]) -> None:
    try:
        async with asyncio.timeout(KEPT_S):
            await done
    except TimeoutError:
        raise Unavailable("receipts: the disk does not answer; the outcome is unknown") from None


def _unheard(error: str) -> None:
    """A turn that fails is seen by the receipts that come after it."""


async def tend(receipts: Receipts, journals: Journals) -> None:
    """Until it is cancelled."""
    while True:
        await asyncio.sleep(TEND_EVERY_S)
        try:
            await receipts.tend(journals)
        except (EntitlementError, OSError) as error:
            _log.warning("receipts are kept until the hot store says what is settled", error=str(error))
