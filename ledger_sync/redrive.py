"""What becomes of the records in quarantine: booked after all, or given up. Either way hot store and ledger agree then.

A record was passed over where it stood in its account's journal: it is booked late, and the account's position stays
where it is. Whether the hot account has paid for it, decides what that gets: see `Place.forgotten`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from entitlement.errors import CorruptRecord, EntitlementError, InvalidArgument, Unavailable
from entitlement.journal import Consumed, Record, decode
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes, hot_deltas, passed_over, quarantine
from ledger_sync.bookkeeping import Bookkeeper
from ledger_sync.hot_store import HotStore
from ledger_sync.install import ensure, rebuild
from ledger_sync.ledger import LedgerRefused, translated
from ledger_sync.passed_over import Place
from ledger_sync.posting import Posted, Reason, Rejected, read
from ledger_sync.quarantine import Kept
from ledger_sync.refusals import NotFound
from ledger_sync.translate import Page, check_text, page_token

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger

MAX_IDS: Final = 1_000  # named in one call
MAX_LEFT: Final = 1_000  # told of in one answer
CHUNK: Final = 100  # records in one transaction
HOT_S: Final = 30.0  # for accounts to come into the hot store

log = structlog.get_logger(__name__)


class Redriver:
    """The quarantine of one tenant, for whoever works it off."""

    def __init__(self, ledger: Ledger, hot: HotStore, tenant: str) -> None:
        self._ledger = ledger
        self._hot = hot
        self._tenant = tenant
        self._bookkeeper = Bookkeeper()

    async def list(self, page: Page) -> pb.ListQuarantineResponse:
        """What is unresolved, in the order it came; of one customer when the page names it."""
        after = int(page.after[0]) if page.after else 0
        async with self._ledger.transaction(readonly=True) as connection:
            found = await quarantine.page(connection, self._tenant, page.customer, after, page.size + 1)
        shown = found[: page.size]
        response = pb.ListQuarantineResponse(records=[quarantine.message(item) for item in self._ours(shown)])
        if len(found) > page.size:
            response.next_page_token = page_token(shown[-1].id)
        return response

    async def retry(self, request: pb.QuarantineRequest, actor: str) -> pb.QuarantineResponse:
        """Books what can be booked by now. What is in the ledger already is recognised; the rest is `left` (a thousand
        of it are told), with its reason of now. Each hundred records are one transaction. NotFound: an id is not one of
        an unresolved record, and nothing was changed. Unavailable: a store is away; what was done stays done.
        """
        ids = await self._chosen(request)
        response = pb.QuarantineResponse()
        for first in range(0, len(ids), CHUNK):
            chunk = ids[first : first + CHUNK]
            await self._ensure_hot(chunk)
            async with self._ledger.transaction() as connection:
                left = await self._retry(connection, chunk, actor, response)
            response.left.extend(map(quarantine.message, left[: MAX_LEFT - len(response.left)]))
        return response

    async def retry_readable(self) -> int:
        """Books, as `retry` does, what an older program kept because it did not know the codec or the kind, and this
        one does. How many it tried.
        """
        async with self._ledger.transaction(readonly=True) as connection:
            ids = await passed_over.readable(connection, CHUNK)
            ours = [item.id for item in self._ours(await passed_over.kept(connection, ids))]
        if ours:
            done = await self.retry(pb.QuarantineRequest(ids=ours), "upgrade")
            log.warning("readable_now", resolved=done.resolved, left=len(done.left))
        return len(ours)

    async def drop(self, request: pb.QuarantineRequest, actor: str) -> pb.QuarantineResponse:
        """Gives records up, with a reason: a hot account that has paid for one gets it back. Transactions and errors as
        those of `retry`.
        """
        if not request.reason:
            raise InvalidArgument("reason", "is empty; expected why these records are given up")
        check_text("reason", request.reason, quarantine.MAX_REASON)
        ids = await self._chosen(request)
        response = pb.QuarantineResponse()
        for first in range(0, len(ids), CHUNK):
            async with self._ledger.transaction() as connection:
                anew = await self._drop(connection, ids[first : first + CHUNK], actor, request.reason, response)
            for customer in sorted(anew):
                await self._rebuild(customer)
        return response

    async def _chosen(self, request: pb.QuarantineRequest) -> Sequence[int]:
        ids = list(dict.fromkeys(request.ids))
        if bool(ids) == request.all:
            raise InvalidArgument("ids", "expected the ids of records, or all = true; one of both")
        if len(request.ids) > MAX_IDS:
            raise InvalidArgument("ids", f"has {len(request.ids)} ids; expected at most {MAX_IDS}")
        async with self._ledger.transaction(readonly=True) as connection:
            if request.all:
                return await passed_over.unresolved(connection)
            known = {item.id for item in self._ours(await passed_over.kept(connection, ids))}
        for index, number in enumerate(request.ids):
            if number not in known:
                raise NotFound(f"ids[{index}]", f"there is no unresolved record {number} in quarantine")
        return ids

    def _ours(self, found: Iterable[Kept]) -> Sequence[Kept]:
        """Without other tenants' records. What nobody can read is everybody's."""
        return [item for item in found if (quarantine.who_of(item.arrival.data) or (self._tenant,))[0] == self._tenant]

    async def _ensure_hot(self, ids: Sequence[int]) -> None:
        """Accounts that were opened since, and never used, are installed before anything is booked for them: only then
        it is known what their hot state started from.
        """
        async with self._ledger.transaction(readonly=True) as connection:
            items = self._ours(await passed_over.kept(connection, ids))
            names = sorted({who for item in items if (who := quarantine.who_of(item.arrival.data))})
            cold = await passed_over.never_hot(connection, names)
        if not cold:
            return
        try:
            async with asyncio.timeout(HOT_S):
                await ensure(self._hot, cold)
        except TimeoutError:
            raise Unavailable("the accounts of these records did not come into the hot store in time") from None

    async def _retry(
        self, connection: Connection, ids: Sequence[int], actor: str, response: pb.QuarantineResponse
    ) -> Sequence[Kept]:
        items = self._ours(await passed_over.lock(connection, ids))
        left: list[Kept] = []
        for item in items:
            if why := await self._book(connection, item):
                left.append(msgspec.structs.replace(item, reason=quarantine.plain(why)))
                await passed_over.set_reason(connection, left[-1])
            else:
                await passed_over.resolve(connection, item, f"retried by {actor}")
        if items:
            response.resolved += len(items) - len(left)
            detail = f"resolved={len(items) - len(left)} left={len(left)} ids={_numbers(items)}"
            await changes.audit(connection, self._tenant, actor, "RetryQuarantine", "quarantine", detail)
        return left

    async def _book(self, connection: Connection, item: Kept) -> str:
        """'' when the record is in the ledger, else why not."""
        posted = read(item.arrival)
        if isinstance(posted, Rejected):
            return f"{posted.reason}: {posted.detail}"
        if item.word == Reason.KEY_MISMATCH:
            return _given_back(posted)
        record = posted.record
        place = await passed_over.place(connection, record.tenant, record.customer)
        if place is None:
            return f"{Reason.UNKNOWN_ACCOUNT}: the ledger has no account {record.customer!r}"
        if await passed_over.forgotten(connection, place, item, record):
            posted = _as_before(posted, place)  # The hot account pays for it now.
        elif why := place.refuses(record):
            return f"{item.word}: {why}"
        elif place.paid(record) and isinstance(record, Consumed) and not place.is_next(record):
            taken = await passed_over.charged_by_another(connection, posted)
            if taken is not None:
                change = hot_deltas.compensation(record, place.period_start, posted.subject)
                await hot_deltas.decide(connection, record.tenant, record.customer, change)
                return "" if taken == posted.fingerprint else _given_back(posted)
        why = await self._settle(connection, item, posted, place)
        # That the account was unknown once is not forgotten: the next retry has to know it.
        return f"{item.word}: no longer, but {why}" if why and item.word == Reason.UNKNOWN_ACCOUNT else why

    async def _settle(self, connection: Connection, item: Kept, posted: Posted, place: Place) -> str:
        try:
            with translated():
                async with connection.transaction():  # A savepoint: what is refused stops no other.
                    outcome = await self._bookkeeper.book(connection, [posted])
        except LedgerRefused as refused:
            return f"{Reason.REFUSED}: {refused}"
        await passed_over.close_gap(connection, place, item, posted.record)
        for rejected in outcome.rejected:
            if rejected.reason is Reason.KEY_MISMATCH:  # Found only now; settlement has given it back.
                return _given_back(posted)
            return f"{rejected.reason}: {rejected.detail}"
        return ""

    async def _drop(
        self, connection: Connection, ids: Sequence[int], actor: str, reason: str, response: pb.QuarantineResponse
    ) -> set[str]:
        items = self._ours(await passed_over.lock(connection, ids))
        anew: set[str] = set()
        for item in items:
            if (record := _decoded(item)) and await self._give_back(connection, item, record):
                anew.add(record.customer)
            await passed_over.resolve(connection, item, f"dropped by {actor}: {reason}")
        if items:
            response.resolved += len(items)
            detail = f"dropped={len(items)} ids={_numbers(items)}: {reason}"
            await changes.audit(connection, self._tenant, actor, "DropQuarantine", "quarantine", detail)
        return anew

    async def _give_back(self, connection: Connection, item: Kept, record: Record) -> bool:
        """What the record did to the hot account is undone there; whether it has to be built anew for that."""
        place = await passed_over.place(connection, record.tenant, record.customer)
        if place is None or item.word == Reason.KEY_MISMATCH or not place.paid(record):
            return False
        if await passed_over.forgotten(connection, place, item, record):
            return False
        if await passed_over.is_booked(connection, record):
            return False
        await passed_over.pass_by(connection, place, record)
        await passed_over.close_gap(connection, place, item, record)
        change = passed_over.undone(record, place.period_start)
        if change is None or not await passed_over.knows_grants(connection, record, change):
            return True
        await hot_deltas.decide(connection, record.tenant, record.customer, change)
        return False

    async def _rebuild(self, customer: str) -> None:
        try:
            async with asyncio.timeout(HOT_S):
                await rebuild(self._hot, (self._tenant, customer))
        except (EntitlementError, TimeoutError) as error:  # The drop stands. Verify tells of it, and repairs it.
            log.warning("a dropped record's account was not built anew", customer=customer, error=str(error))


def _as_before(posted: Posted, place: Place) -> Posted:
    """The record as one that was granted before the account was installed as it is now: settlement books it, and takes
    it from the hot account, which has not paid for it.
    """
    return msgspec.structs.replace(posted, record=msgspec.structs.replace(posted.record, epoch=place.epoch - 1))


def _given_back(posted: Posted) -> str:
    text = f"{posted.key!r} was charged before with another payload; what this took was given back: it can be dropped"
    return f"{Reason.KEY_MISMATCH}: {text}"


def _decoded(item: Kept) -> Record | None:
    try:
        return decode(item.arrival.data)
    except CorruptRecord:
        return None


def _numbers(items: Iterable[Kept]) -> str:
    return " ".join(str(item.id) for item in items)
