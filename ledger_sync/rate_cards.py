"""The rows of rate cards: one for each version, never changed. All in the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from entitlement.catalog import Kind, RateCard
from entitlement.errors import InvalidArgument
from entitlement.rating import Rate

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Row


async def lock(connection: Connection, tenant: str) -> None:
    """Changes of one tenant's catalogue happen one after the other."""
    await connection.execute("INSERT INTO catalogs (tenant, generation) VALUES ($1, 0) ON CONFLICT DO NOTHING", tenant)
    await connection.execute("SELECT 1 FROM catalogs WHERE tenant = $1 FOR UPDATE", tenant)


async def count_up(connection: Connection, tenant: str) -> None:
    """The catalogue has changed: gateways will read it again."""
    await connection.execute("UPDATE catalogs SET generation = generation + 1 WHERE tenant = $1", tenant)


async def versions(connection: Connection, tenant: str, card: str) -> list[RateCard]:
    rows = await connection.fetch(
        """SELECT id, version, effective_ms, credit_type, rates FROM rate_cards WHERE tenant = $1 AND id = $2
           ORDER BY version""",
        *(tenant, card),
    )
    return [card_of(row) for row in rows]


async def write(connection: Connection, tenant: str, card: RateCard) -> None:
    await connection.execute(
        """INSERT INTO rate_cards (tenant, id, version, effective_ms, credit_type, rates)
           VALUES ($1, $2, $3, $4, $5, $6)""",
        *(tenant, card.id, card.version, card.effective_ms, card.credit_type),
        msgspec.json.encode(card.rates).decode(),
    )


async def refuse_unmetered(connection: Connection, tenant: str, field: str, rates: Iterable[Rate]) -> None:
    rows = await connection.fetch(
        "SELECT key FROM features WHERE tenant = $1 AND kind <> $2", *(tenant, int(Kind.METERED))
    )
    unmetered = {row["key"] for row in rows}
    for index, rate in enumerate(rates):
        if rate.feature in unmetered:
            raise InvalidArgument(
                f"{field}[{index}].feature", f"{rate.feature!r} is not METERED: it cannot have a price"
            )


def card_of(row: Row) -> RateCard:
    rates = msgspec.json.decode(row["rates"], type=tuple[Rate, ...])
    return RateCard(row["id"], row["version"], row["effective_ms"], row["credit_type"], rates)
