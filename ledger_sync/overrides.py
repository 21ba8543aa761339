"""Rates of a contract's own. With them its account is priced by a rate card derived from the contract's: each version
of that one with the contract's rates in place of those with the same feature and match, or beside the others. Derived
versions are immutable rows like any; their id is the contract's after '='.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from entitlement.catalog import RateCard
from entitlement.rating import Rate
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import rate_cards
from ledger_sync.catalog_messages import checked_rates
from ledger_sync.contracts import DERIVED

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection


async def derive(connection: Connection, tenant: str, contract: pb.Contract, now_ms: int) -> None:
    """Adds the versions of the contract's derived card that its overrides and its rate card ask for: all of them when
    it is new, later on one that counts from now and those that lie ahead.
    """
    if not contract.overrides:
        return
    await rate_cards.lock(connection, tenant)
    await rate_cards.refuse_unmetered(connection, tenant, "overrides", own_rates(contract))
    base = await rate_cards.versions(connection, tenant, contract.rate_card)
    known = await rate_cards.versions(connection, tenant, f"{DERIVED}{contract.id}")
    wanted = base if not known else list(_from_now(base, now_ms))
    changed = False
    for card in wanted:
        changed |= await _add(connection, tenant, contract, known, card)
    if changed:
        await rate_cards.count_up(connection, tenant)


async def derived_from(connection: Connection, tenant: str, card: str) -> list[str]:
    """The cards that contracts, past and present, derive from one."""
    rows = await connection.fetch(
        """SELECT body FROM contracts c WHERE tenant = $1
           AND EXISTS (SELECT 1 FROM rate_cards r WHERE r.tenant = c.tenant AND r.id = '=' || c.id) ORDER BY id""",
        tenant,
    )
    contracts = [pb.Contract.FromString(row["body"]) for row in rows]
    return [f"{DERIVED}{contract.id}" for contract in contracts if contract.rate_card == card]


async def follow(connection: Connection, tenant: str, card: RateCard) -> None:
    """A new version of a rate card is one of every card that is derived from it."""
    rows = await connection.fetch("SELECT body FROM contracts WHERE tenant = $1 AND state < 2 ORDER BY id", tenant)
    for row in rows:
        contract = pb.Contract.FromString(row["body"])
        if contract.overrides and contract.rate_card == card.id:
            known = await rate_cards.versions(connection, tenant, f"{DERIVED}{contract.id}")
            await _add(connection, tenant, contract, known, card)


async def _add(
    connection: Connection, tenant: str, contract: pb.Contract, known: list[RateCard], card: RateCard
) -> bool:
    """Whether it was missing."""
    rates = merged(card.rates, own_rates(contract))
    same = [version for version in known if version.effective_ms == card.effective_ms][-1:]
    if same and same[0].rates == rates:
        return False
    number = known[-1].version + 1 if known else 1
    derived = RateCard(f"{DERIVED}{contract.id}", number, card.effective_ms, card.credit_type, rates)
    await rate_cards.write(connection, tenant, derived)
    known.append(derived)
    return True


def _from_now(base: Iterable[RateCard], now_ms: int) -> Iterable[RateCard]:
    """The version in force, as of now, and those that come."""
    cards = sorted(base, key=lambda card: (card.effective_ms, card.version))
    current = [card for card in cards if card.effective_ms <= now_ms][-1:]
    return [
        *(msgspec.structs.replace(card, effective_ms=now_ms) for card in current),
        *(card for card in cards if card.effective_ms > now_ms),
    ]


def own_rates(contract: pb.Contract) -> tuple[Rate, ...]:
    return checked_rates(pb.RateCard(rates=contract.overrides))


def merged(base: tuple[Rate, ...], own: tuple[Rate, ...]) -> tuple[Rate, ...]:
    """`own` rates win over those with the same feature and match."""
    replaced = {rate.meter for rate in own}
    return (*(rate for rate in base if rate.meter not in replaced), *own)
