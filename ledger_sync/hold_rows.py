"""Holds read from the ledger, for an account that is built anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.account import Account
from entitlement.holding import Hold
from entitlement.journal import decode
from entitlement.periods import HOUR
from ledger_sync.hold_books import Moved, State, effect, folded, moved

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Row

Name = tuple[str, str]  # tenant, customer
WINDOW_MS: Final = HOUR  # those that have ended within it are known in the hot store, too
MAX_ENDED: Final = 10_000  # of all accounts that are built together; of each its newest

_OPEN: Final = """
SELECT h.tenant, h.customer, h.id, h.state FROM holds h
     JOIN unnest($1::text[], $2::text[]) AS n (tenant, customer) USING (tenant, customer)
WHERE h.state = 1"""

_ENDED: Final = """
SELECT h.tenant, h.customer, h.id, h.state
FROM unnest($1::text[], $2::text[]) AS n (tenant, customer),
     LATERAL (SELECT * FROM holds h
              WHERE h.tenant = n.tenant AND h.customer = n.customer AND h.state <> 1 AND h.changed_ms >= $3
              ORDER BY h.changed_ms DESC LIMIT $4) AS h"""

_MOVES: Final = """
SELECT m.tenant, m.customer, m.hold, m.amount, m.record
FROM hold_moves m
     JOIN unnest($1::text[], $2::text[], $3::text[]) AS n (tenant, customer, hold) USING (tenant, customer, hold)
ORDER BY m.tenant, m.customer, m.epoch, m.sequence"""


class Standing(msgspec.Struct, frozen=True):
    """A hold as its hash in the hot store shall be. `expires_ms` 0: it has ended."""

    name: Name
    id: str
    epoch: int
    fields: dict[str, str | bytes]
    expires_ms: int


async def open_holds(connection: Connection, names: Sequence[Name]) -> list[tuple[Name, Hold]]:
    rows = await connection.fetch(_OPEN, *_columns(names))
    return [(name, hold) for name, hold, _ in await _holds(connection, rows)]


async def holds_of(connection: Connection, accounts: Mapping[Name, Account], now_ms: int) -> list[Standing]:
    """The holds of accounts that are to be installed: those that are open, and those that have ended lately."""
    names = _columns(list(accounts))
    rows = [
        *await connection.fetch(_OPEN, *names),
        *await connection.fetch(_ENDED, *names, now_ms - WINDOW_MS, MAX_ENDED // max(1, len(accounts))),
    ]
    return [
        Standing(
            name,
            hold.id,
            accounts[name].epoch,
            hold.fields(state.letter, accounts[name], now_ms),
            hold.expires_ms if state is State.HELD else 0,
        )
        for name, hold, state in await _holds(connection, rows)
    ]


async def _holds(connection: Connection, rows: Sequence[Row]) -> list[tuple[Name, Hold, State]]:
    states = {(row["tenant"], row["customer"], row["id"]): State(row["state"]) for row in rows}
    if not states:
        return []
    moves: dict[tuple[str, str, str], list[Moved]] = defaultdict(list)
    for row in await connection.fetch(_MOVES, *(list(part) for part in zip(*states, strict=True))):
        record = moved(decode(row["record"]))
        if record and effect(record) == row["amount"]:  # Else it did not count: its account was gone.
            moves[row["tenant"], row["customer"], row["hold"]].append(record)
    found = [
        ((tenant, customer), folded(moves[tenant, customer, hold]), state)
        for (tenant, customer, hold), state in states.items()
    ]
    return [(name, hold, state) for name, hold, state in found if hold is not None]


def _columns(names: Sequence[Name]) -> tuple[list[str], list[str]]:
    return [tenant for tenant, _ in names], [customer for _, customer in names]
