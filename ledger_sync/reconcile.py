"""Verify: proves that hot store and ledger agree to the nano, under load too, and repairs what does not.

Each hot account is read at one moment of its own, say after its journal's record n. Once the ledger has come to n, its
projections, less what it booked after n, must be the same. What differs is looked at again before it is called drift.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from entitlement.account import Account
from ledger_sync import changes, completeness, conservation, drift, hot_deltas, verify_reads
from ledger_sync.drift import HELD, PLACE, Difference, Place
from ledger_sync.hot_store import HotStore
from ledger_sync.install import rebuild
from ledger_sync.pusher import Pusher
from ledger_sync.refusals import NotFound

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger

BATCH: Final = 500  # accounts looked at together
LOOKS: Final = 3  # times that an account is seen to differ before it is drift
MAX_PAUSE_S: Final = 0.2  # between two looks
WAIT_S: Final = 10.0  # for the ledger to come to what the hot accounts show, over the whole call
POLL_S: Final = 0.02
REBUILD_S: Final = 30.0
MAX_LOGGED: Final = 20  # drifts of one report

log = structlog.get_logger(__name__)


class Drift(msgspec.Struct, frozen=True):
    """One part of an account that is wrong. Nanos, of a meter units."""

    customer: str
    difference: Difference
    sequence: int  # of the hot account; 0: found inside the ledger


class Report(msgspec.Struct):
    """What Verify found. `lag`: records that the hot accounts have shown and the ledger did not come to in time."""

    totals: conservation.Totals
    customers: int = 0
    drifts: list[Drift] = []
    findings: list[completeness.Finding] = []
    lag: int = 0

    @property
    def drifted(self) -> int:
        return len({item.customer for item in self.drifts})

    @property
    def drift_nanos(self) -> int:
        """The absolute sum. How far behind an account's journal is, is no amount."""
        return sum(abs(item.difference.drift) for item in self.drifts if item.difference.part != PLACE)


class _Seen(msgspec.Struct, frozen=True):
    """A hot account, with what the ledger said just before it was read."""

    customer: str
    account: Account
    before: Place


class _Found(msgspec.Struct, frozen=True):
    """How one account differs. `certain`: see drift.is_certain."""

    seen: _Seen
    differences: list[Difference]
    certain: bool


class Reconciler:
    """Reads everything, changes nothing unless told to repair."""

    def __init__(self, ledger: Ledger, hot: HotStore, pusher: Pusher, tenant: str) -> None:
        self._ledger = ledger
        self._hot = hot
        self._pusher = pusher
        self._tenant = tenant
        self.wait_s = WAIT_S

    async def verify(
        self, customer: str = "", *, repair: bool = False, actor: str = "unknown", logged: bool = True
    ) -> Report:
        """The report of what was found; with `repair` it has been healed when this returns, or is on its way: the
        ledger is authoritative, its projections become the sums of its entries, and a ledger change makes the hot
        account what they say. NotFound: no such customer.
        """
        report = await self._inside(customer, repair, actor)
        deadline = monotonic() + self.wait_s
        after = ""
        while names := await self._accounts(customer, after):
            report.customers += len(names)
            found = await self._differing(names, deadline, report)
            if repair:
                for seen, differences in found:
                    await self._repair(seen, differences, actor)
            report.drifts += [
                Drift(seen.customer, difference, seen.account.sequence)
                for seen, differences in found
                for difference in differences
            ]
            after = names[-1]
            if customer:
                break
        if customer and not report.customers:
            raise NotFound("customer", f"{customer!r} is unknown or has no contract")
        # Now that the journal has been waited for:
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            report.totals = await conservation.totals(connection, self._tenant, customer)
            report.findings = await completeness.findings(connection, self._tenant, customer)
        if logged:
            log_drifts(report.drifts)
            for item in report.findings[:MAX_LOGGED]:
                log.error("found", customer=item.customer, what=item.name, detail=item.detail)
        return report

    async def compare(self, after: str) -> tuple[list[str], list[Drift]]:
        """The next customers after that one, in order, and what of their hot accounts drifts. Changes nothing."""
        names = await self._accounts("", after)
        unused = Report(conservation.NOTHING)
        found = await self._differing(names, monotonic() + self.wait_s, unused) if names else []
        return names, [Drift(seen.customer, item, seen.account.sequence) for seen, items in found for item in items]

    async def _inside(self, customer: str, repair: bool, actor: str) -> Report:
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            report = Report(await conservation.totals(connection, self._tenant, customer))
            found = await conservation.mismatches(connection, self._tenant, customer)
        for item in found:
            report.drifts.append(Drift(item.customer, Difference(item.part, item.projected, item.entries), 0))
        if repair:
            for name in sorted({item.customer for item in found}):
                async with self._ledger.transaction() as connection:
                    await conservation.repair(connection, self._tenant, actor, name)
        return report

    async def _accounts(self, customer: str, after: str) -> list[str]:
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                """SELECT customer FROM accounts WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND customer > $3
                   ORDER BY customer LIMIT $4""",
                *(self._tenant, customer, after, BATCH),
            )
        return [row["customer"] for row in rows]

    async def _differing(
        self, names: Sequence[str], deadline: float, report: Report
    ) -> list[tuple[_Seen, list[Difference]]]:
        """The accounts that differ each time they are looked at, with how they did the last time. A look at something
        that was just being changed does not count; where every look was one, it is lag.
        """
        found: list[tuple[_Seen, list[Difference]]] = []
        looks: Counter[str] = Counter()
        pause = 0.0
        while names:
            await asyncio.sleep(pause)
            differing, lag = await self._look(names, deadline)
            report.lag += lag if not pause else 0
            pause = min(pause + POLL_S, MAX_PAUSE_S)
            names = []
            for item in differing:
                looks[item.seen.customer] += item.certain
                if looks[item.seen.customer] == LOOKS:
                    found.append((item.seen, item.differences))
                elif item.certain or monotonic() < deadline:
                    names.append(item.seen.customer)
                else:
                    report.lag += 1
        return found

    async def _look(self, names: Sequence[str], deadline: float) -> tuple[list[_Found], int]:
        async with self._ledger.transaction(readonly=True) as connection:
            mark = await verify_reads.mark(connection, self._tenant, names)
        accounts = await self._hot.snapshots([(self._tenant, name) for name in names])
        seen = [
            _Seen(name, account, mark.places[name])
            for name, account in zip(names, accounts, strict=True)
            if account is not None
        ]
        reached, lag = await self._reach(seen, deadline)
        if not reached:
            return [], lag
        wanted = {item.customer: item.account for item in reached}
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            books = await verify_reads.books(connection, self._tenant, wanted, mark)
        found = []
        for item in reached:
            behind = drift.is_behind(item.account, item.before)
            if differences := drift.differences(item.account, books[item.customer], behind=behind):
                certain = drift.is_certain(item.account, item.before, books[item.customer])
                found.append(_Found(item, differences, certain))
        return found, lag

    async def _reach(self, seen: list[_Seen], deadline: float) -> tuple[list[_Seen], int]:
        """Waits until the ledger has come to where the hot accounts were; those for which it has, and the lag."""
        while True:
            async with self._ledger.transaction(readonly=True) as connection:
                places = await verify_reads.places(connection, self._tenant, [item.customer for item in seen])
            late = {
                item.customer: missing
                for item in seen
                if (missing := item.account.sequence - places[item.customer].sequence) > 0
            }
            if not late or monotonic() > deadline:
                return [item for item in seen if item.customer not in late], sum(late.values())
            await asyncio.sleep(POLL_S)

    async def _repair(self, seen: _Seen, found: list[Difference], actor: str) -> None:
        """By a ledger change. What has lost records, or has holds or grants that no change can name, is built anew."""
        text = "; ".join(f"{item.part} hot {item.hot} ledger {item.ledger}" for item in found)
        name = (self._tenant, seen.customer)
        change = drift.repair(found, seen.account.period_start)
        async with self._ledger.transaction() as connection:
            account = await changes.lock(connection, *name)
            known = await verify_reads.grants_of(connection, *name)
            anew = any(item.part in (PLACE, HELD) for item in found) or not known.issuperset(
                no for no, _ in change.grants
            )
            if anew:
                await changes.audit(connection, self._tenant, actor, "Rebuild", seen.customer, text)
            elif await verify_reads.repaired(connection, *name, seen.account.version):
                return  # By someone who looked at the same time.
            else:
                await self._book(connection, account, change, actor, text)
        if anew:
            async with asyncio.timeout(REBUILD_S):
                await rebuild(self._hot, name)
        else:
            self._pusher.wake()

    async def _book(
        self, connection: Connection, account: changes.Locked, change: hot_deltas.Change, actor: str, text: str
    ) -> None:
        """The change, a transaction without entries that stands for it in the history, and an audit line."""
        customer = account.customer
        version = await hot_deltas.decide(connection, self._tenant, customer, change)
        transaction = changes.Transaction(
            tenant=self._tenant,
            customer=customer,
            kind="adjust",
            key=f"repair:{customer}:{version}",
            credit_type=account.config.credit_type,
            version=version,
            entries=(),
            note=text[: changes.MAX_DETAIL],
        )
        await changes.book(connection, transaction)
        await changes.audit(connection, self._tenant, actor, "Repair", customer, text)


def log_drifts(drifts: Sequence[Drift]) -> None:
    for item in drifts[:MAX_LOGGED]:
        part, hot, ledger = item.difference.part, item.difference.hot, item.difference.ledger
        log.error("drift", customer=item.customer, part=part, hot=hot, ledger=ledger, sequence=item.sequence)
