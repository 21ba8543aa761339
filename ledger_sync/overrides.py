"""Rates of a contract's own. With them its account is priced by a rate card derived from the contract's: each version
of that one with the contract's rates of that time in place of those with the same feature and match, or beside the
others. Derived versions are immutable rows like any; their id is the contract's after '='.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class Own(msgspec.Struct, frozen=True):
    """A contract's own rates from a time on, and the card that they change."""

    since_ms: int
    base: str
    rates: tuple[Rate, ...]


async def derive(connection: Connection, tenant: str, contract: pb.Contract, now_ms: int) -> None:
    """Makes the contract's derived card what its overrides and its rate card say from now on; when it is new, for all
    time.
    """
    if not contract.overrides:
        return
    await rate_cards.lock(connection, tenant)
    rates = checked_rates(pb.RateCard(rates=contract.overrides))
    await rate_cards.refuse_unmetered(connection, tenant, "overrides", rates)
    history = await _history(connection, tenant, contract.id)
    if not history or (history[-1].base, history[-1].rates) != (contract.rate_card, rates):
        await connection.execute(
            """INSERT INTO contract_rates (tenant, contract, since_ms, base, rates) VALUES ($1, $2, $3, $4, $5)
               ON CONFLICT (tenant, contract, since_ms) DO UPDATE SET base = $4, rates = $5""",
            *(tenant, contract.id, now_ms if history else 0, contract.rate_card),
            msgspec.json.encode(rates).decode(),
        )
    if await _rebuild(connection, tenant, contract.id):
        await rate_cards.count_up(connection, tenant)


async def follow(connection: Connection, tenant: str, card: str) -> None:
    """A card has a new version: so have those that are derived from it, wherever it counts in them."""
    for contract in await _deriving(connection, tenant, card):
        await _rebuild(connection, tenant, contract)


async def derived_from(connection: Connection, tenant: str, card: str) -> list[str]:
    """The cards that contracts, past and present, derive from one."""
    return [f"{DERIVED}{contract}" for contract in await _deriving(connection, tenant, card)]


async def _deriving(connection: Connection, tenant: str, card: str) -> list[str]:
    rows = await connection.fetch(
        "SELECT DISTINCT contract FROM contract_rates WHERE tenant = $1 AND base = $2 ORDER BY contract", tenant, card
    )
    return [row["contract"] for row in rows]


async def _history(connection: Connection, tenant: str, contract: str) -> list[Own]:
    rows = await connection.fetch(
        "SELECT since_ms, base, rates FROM contract_rates WHERE tenant = $1 AND contract = $2 ORDER BY since_ms",
        *(tenant, contract),
    )
    return [Own(row["since_ms"], row["base"], msgspec.json.decode(row["rates"], type=tuple[Rate, ...])) for row in rows]


async def _rebuild(connection: Connection, tenant: str, contract: str) -> bool:
    """Adds the versions that are missing; whether there were any."""
    history = await _history(connection, tenant, contract)
    bases = {base: await rate_cards.versions(connection, tenant, base) for base in {own.base for own in history}}
    derived = f"{DERIVED}{contract}"
    known = await rate_cards.versions(connection, tenant, derived)
    missing = missing_versions(history, bases, known)
    for number, card in enumerate(missing, known[-1].version + 1 if known else 1):
        await rate_cards.write(connection, tenant, msgspec.structs.replace(card, id=derived, version=number))
    return bool(missing)


def missing_versions(
    history: Sequence[Own], bases: Mapping[str, Sequence[RateCard]], known: Sequence[RateCard]
) -> list[RateCard]:
    """What a derived card lacks, without id and number: whatever counts from a time when something changes. Pure."""
    times = {own.since_ms for own in history} | {card.effective_ms for card in known}
    times |= {card.effective_ms for cards in bases.values() for card in cards}
    cards = [wanted(history, bases, at_ms) for at_ms in sorted(times)]
    return [card for card in cards if card and not _stands(known, card)]


def wanted(history: Sequence[Own], bases: Mapping[str, Sequence[RateCard]], at_ms: int) -> RateCard | None:
    """What the derived card says from that time on; None: its base has no version in force then."""
    own = [item for item in history if item.since_ms <= at_ms][-1]
    base = in_force(bases[own.base], at_ms)
    return RateCard("", 0, at_ms, base.credit_type, merged(base.rates, own.rates)) if base else None


def in_force(cards: Sequence[RateCard], at_ms: int) -> RateCard | None:
    """Of versions in any order; of two from the same time the later one counts."""
    begun = [card for card in cards if card.effective_ms <= at_ms]
    return max(begun, key=lambda card: (card.effective_ms, card.version), default=None)


def _stands(known: Sequence[RateCard], wanted: RateCard) -> bool:
    card = in_force(known, wanted.effective_ms)
    return card is not None and (card.effective_ms, card.rates) == (wanted.effective_ms, wanted.rates)


def merged(base: tuple[Rate, ...], own: tuple[Rate, ...]) -> tuple[Rate, ...]:
    """`own` rates win over those with the same feature and match."""
    replaced = {rate.meter for rate in own}
    return (*(rate for rate in base if rate.meter not in replaced), *own)
