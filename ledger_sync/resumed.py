"""Periods that begin where an earlier one began: another rule of periods may lead back to a start that was there before
(monthly to yearly, in January). The hot account turns such a page empty; the ledger goes on with what stands there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from entitlement.journal import Rolled
from ledger_sync import hot_deltas
from ledger_sync.hot_deltas import Change

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

Cycle = tuple[str, str, int]  # tenant, customer, start of the period

_SETTLED: Final = """
SELECT tenant, customer, period_start, settled
FROM account_periods JOIN unnest($1::text[], $2::text[], $3::bigint[]) AS n (tenant, customer, period_start)
     USING (tenant, customer, period_start)"""

_METERS: Final = """
SELECT tenant, customer, period_start, meter, quantity
FROM meters JOIN unnest($1::text[], $2::text[], $3::bigint[]) AS n (tenant, customer, period_start)
     USING (tenant, customer, period_start) WHERE quantity <> 0"""

# Decided before, and the hot store had not applied them when it turned the page: they will count on the new one.
_PENDING: Final = """
SELECT body FROM hot_deltas WHERE tenant = $1 AND customer = $2 AND version > $3"""


async def read(connection: Connection, rolled: Iterable[Rolled]) -> dict[Cycle, Change]:
    """What the hot account lacks when it turns to a period that the ledger has usage of. Hardly any turn has one."""
    versions = {(record.tenant, record.customer, record.period_start): record.version for record in rolled}
    if not versions:
        return {}
    columns = list(zip(*versions, strict=True))
    settled = {(row[0], row[1], row[2]): row[3] for row in await connection.fetch(_SETTLED, *columns)}
    meters: dict[Cycle, dict[str, int]] = {cycle: {} for cycle in settled}
    for row in await connection.fetch(_METERS, *columns):
        meters.setdefault((row[0], row[1], row[2]), {})[row[3]] = row[4]
    found = {}
    for cycle, units in meters.items():
        nanos = settled.get(cycle, 0)
        for row in await connection.fetch(_PENDING, cycle[0], cycle[1], versions[cycle]):
            delta = hot_deltas.parse(row["body"])
            if delta.cycle == cycle[2]:
                nanos -= delta.settled
                for meter, more in delta.meters:
                    units[meter] = units.get(meter, 0) - more
        found[cycle] = Change(settled=nanos, meters=tuple(sorted(units.items())), cycle=cycle[2])
    return found
