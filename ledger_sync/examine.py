"""Examine: how ledger_sync, and what it rests on, are doing. Reads a few rows, changes nothing, and always answers:
what cannot be reached is a finding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from time import time
from typing import TYPE_CHECKING, Final

from google.protobuf.timestamp_pb2 import Timestamp

from entitlement import hot_store_health
from entitlement.build import own_version
from entitlement.errors import Unavailable
from entitlement.examination import Check, Outcome, fail, ok, warn
from entitlement.quantity import MAX_NANOS
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import examine_database, quarantine
from ledger_sync.examine_database import PATIENCE_S
from ledger_sync.hot_store import HotStore, Node
from ledger_sync.journal_reader import Lag
from ledger_sync.patrol import Patrol
from ledger_sync.worker import Health

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger

LATE_S: Final = 60.0  # what has waited for longer is not on its way
LOOK_AGAIN_S: Final = 0.5  # longer than a record takes to be read
SYNC: Final = "ledger_sync"
MONEY: Final = "money"

_FIGURES: Final = """
SELECT (SELECT count(*) FROM accounts WHERE tenant = $1) AS customers,
       (SELECT count(*) FROM outbox) AS outbox_pending,
       (SELECT created_at FROM outbox ORDER BY txid, id LIMIT 1) AS oldest_unpublished,
       (SELECT count(*) FROM holds WHERE tenant = $1 AND state = 1) AS holds_open,
       (SELECT count(*) FROM webhook_deliveries WHERE tenant = $1 AND failed_at IS NOT NULL) AS webhooks_given_up,
       (SELECT count(*) FROM ended_periods WHERE tenant = $1) AS invoices_due"""


class Examiner:
    """`lag` says what the journal holds and the ledger does not; `loops` is how each of the process is doing."""

    def __init__(
        self,
        ledger: Ledger,
        hot: HotStore,
        tenant: str,
        *,
        lag: Callable[[], Awaitable[Lag]],
        loops: Mapping[str, Health],
        patrol: Patrol | None,
    ) -> None:
        self._ledger = ledger
        self._hot = hot
        self._tenant = tenant
        self._lag = lag
        self._loops = loops
        self._patrol = patrol

    async def examine(self) -> pb.Examination:
        found = pb.Examination(version=own_version(), tenant=self._tenant, partitions=self._hot.partitions)
        database = await examine_database.examine(self._ledger)
        checks = [*database, *await self._examine_hot(found)]
        self._patrolled(found)
        checks += _loops(self._loops)
        if any(check.name == "migrations" and check.outcome is Outcome.OK for check in database):
            async with self._ledger.transaction(readonly=True) as connection:
                await self._count(connection, found)
            checks += money(found)
        found.checks.extend(map(message, checks))
        return found

    async def _examine_hot(self, found: pb.Examination) -> list[Check]:
        try:
            async with asyncio.timeout(PATIENCE_S):
                facts, lag = await self._hot.facts(), await self._sure_lag()
        except (Unavailable, TimeoutError) as error:
            why = str(error) or f"no answer within {PATIENCE_S:.0f} s"
            fix = "start it, or correct ENTITLEMENT_SYNC_REDIS_URL; gateways grant by contract only until it is back"
            return [fail(hot_store_health.COMPONENT, "reachable", f"from ledger_sync: {why}", fix)]
        found.hot_store = facts.server.identity.run_id
        found.journal_lag = lag.records
        if lag.records:
            found.oldest_unsettled.CopyFrom(_at(lag.oldest_ms / 1000))
        cluster = self._hot.is_cluster
        judged = [hot_store_health.judge(node.info, node.config, cluster=cluster) for node in facts.nodes]
        opening = hot_store_health.judge_opening(facts.opening, facts.server)
        return [*_merged(judged), opening, _rights(facts.nodes)]

    async def _sure_lag(self) -> Lag:
        """What seems late is looked at again: it may be on its way this moment, after a stop of everything."""
        lag = await self._lag()
        if lag.records and time() - lag.oldest_ms / 1000 > LATE_S:
            await asyncio.sleep(LOOK_AGAIN_S)
            lag = await self._lag()
        return lag

    async def _count(self, connection: Connection, found: pb.Examination) -> None:
        row = await connection.fetchrow(_FIGURES, self._tenant)
        assert row is not None
        for name in ("customers", "outbox_pending", "holds_open", "webhooks_given_up", "invoices_due"):
            setattr(found, name, row[name])
        found.quarantined = await quarantine.count(connection, self._tenant, "")
        if row["oldest_unpublished"]:
            found.oldest_unpublished.FromDatetime(row["oldest_unpublished"])

    def _patrolled(self, found: pb.Examination) -> None:
        if self._patrol is None:
            return
        if self._patrol.rounded_s:
            found.patrolled_at.CopyFrom(_at(self._patrol.rounded_s))
        if self._patrol.rounded_s or self._patrol.drifted:
            found.drifted, found.drift_nanos = self._patrol.drifted, min(self._patrol.drift_nanos, MAX_NANOS)


def _rights(nodes: Sequence[Node]) -> Check:
    """Whether its user of the hot store may do all that it has to."""
    lacking = list(dict.fromkeys(line for node in nodes for line in node.lacking))
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        fix = "ACL LOAD with the users of helm/entitlement-gateway/files/users.acl (docs/redis.md)"
        return fail(SYNC, "hot store user", f"it may not: {', '.join(lacking[:3])}{more}", fix)
    return ok(SYNC, "hot store user", f"all {len(hot_store_health.SYNC_NEEDS)} commands that it needs")


def _merged(judged: Sequence[Sequence[Check]]) -> Iterator[Check]:
    """Of the primaries of a cluster: what is well once, what is not of each that it is true of."""
    for same in zip(*judged, strict=True):
        unwell = [check for check in same if check.outcome is not Outcome.OK]
        yield from dict.fromkeys(unwell) or same[:1]


def money(found: pb.Examination) -> Iterable[Check]:
    """Whether everything that was decided is booked, the same on both sides, and told."""
    late = "see the loop 'drain' above and ledger_sync's log; entitlement doctor looks at PostgreSQL"
    if found.HasField("journal_lag"):
        yield _waits("journal lag", found.journal_lag, "records", found.oldest_unsettled, late)
    late = "the publisher does not take events: see ENTITLEMENT_SYNC_PUBLISHER and ledger_sync's log"
    yield _waits("outbox", found.outbox_pending, "events", found.oldest_unpublished, late)
    yield _drift(found)
    if found.quarantined:
        fix = "entitlement quarantine list says why; then entitlement quarantine retry --all, or drop"
        yield fail(MONEY, "quarantine", f"{found.quarantined:,} records that could not be booked", fix)
    else:
        yield ok(MONEY, "quarantine", "0 records")
    if found.webhooks_given_up:
        fix = "entitlement webhooks list says why; entitlement webhooks retry sends them anew"
        yield warn(MONEY, "webhooks", f"{found.webhooks_given_up:,} were given up", fix)


def _drift(found: pb.Examination) -> Check:
    if found.drifted:
        told = f"{found.drifted:,} customers, {found.drift_nanos:,} nanos"
        return fail(MONEY, "drift", told, "entitlement verify says where; entitlement verify --repair books it")
    if found.HasField("patrolled_at"):
        return ok(MONEY, "drift", f"0 nanos; the patrol looked {_age_s(found.patrolled_at):,.0f} s ago")
    return ok(MONEY, "drift", "not looked for here yet; entitlement status --verify looks now")


def _waits(name: str, count: int, what: str, oldest: Timestamp, fix: str) -> Check:
    if not count:
        return ok(MONEY, name, f"0 {what}")
    age_s = max(0.0, _age_s(oldest)) if oldest.seconds else 0.0
    found = f"{count:,} {what}, the oldest at most {age_s:,.1f} s old"
    return fail(MONEY, name, found, fix) if age_s > LATE_S else ok(MONEY, name, found)


def _loops(loops: Mapping[str, Health]) -> Iterable[Check]:
    for name, health in loops.items():
        if health.well:
            yield ok(SYNC, f"loop {name}", f"runs, restarted {health.restarts} times" if health.restarts else "runs")
        else:
            why = f"{', '.join(health.hung)} hangs" if health.hung else health.error or "has not started"
            yield fail(SYNC, f"loop {name}", why, "it is started again by itself; if that does not help, see its log")


def message(check: Check) -> pb.Check:
    outcome = pb.Check.Outcome.ValueType(int(check.outcome))
    return pb.Check(component=check.component, name=check.name, outcome=outcome, found=check.found, fix=check.fix)


def _at(seconds: float) -> Timestamp:
    time_ = Timestamp()
    time_.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return time_


def _age_s(moment: Timestamp) -> float:
    return time() - moment.seconds - moment.nanos / 1e9
