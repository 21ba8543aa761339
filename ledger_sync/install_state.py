"""Accounts ready for the hot store: read under their rows' locks, moved on, and what their install books, booked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.account import Account, Config
from entitlement.periods import DAY, period
from ledger_sync import changes, hot_deltas, remembered
from ledger_sync.accounts import Corrections, Credit, Ledgered, Name, assemble
from ledger_sync.changes import Entry, Transaction
from ledger_sync.contracts import quotas_of
from ledger_sync.hold_rows import Standing, holds_of, open_holds
from ledger_sync.posting import BREAKAGE, Expired, restored
from ledger_sync.posting import Entry as Line
from ledger_sync.quota_usage import used_now
from ledger_sync.subjects import limits_of, used_by_subjects

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Row

ARCHIVE_MS: Final = 36 * DAY  # late events count on the meters of their own period: 35 days back, and a day to spare


class Prepared(msgspec.Struct, frozen=True):
    """Accounts to install once the transaction has committed, those that must settle first, those that do not exist."""

    ready: list[tuple[Name, Account]]
    unsettled: list[Name]
    missing: list[Name]
    answers: list[tuple[Name, bytes, bytes]] = []  # to keys settled lately: whose, digest, fingerprint and answer
    holds: list[Standing] = []  # those that are open, and those that have ended lately


async def prepare(connection: Connection, names: Sequence[Name], now_ms: int, *, settled: bool) -> Prepared:
    """Builds accounts under their rows' locks and moves their epoch on. `now_ms` is the hot store's clock.

    An account that was hot before is built only when `settled` says that all of its journal is in the ledger.
    """
    found = [Ledgered(row, Config.decode(row["config"])) for row in await _rows(connection, _LOCK, names)]
    missing = sorted(set(names) - {account.name for account in found})
    unsettled = [account.name for account in found if account.was_hot and not settled]
    chosen = {account.name: account for account in found if settled or not account.was_hot}
    if not chosen:
        return Prepared([], unsettled, missing)
    await _read(connection, chosen, now_ms)
    broken = {name: _broken(account) for name, account in chosen.items()}
    built = {name: assemble(account, now_ms) for name, account in chosen.items()}
    for name, (account, corrections) in built.items():
        await _book(connection, name, account, corrections, broken[name])
    await _advance(connection, {name: account for name, (account, _) in built.items()})
    ready = [(name, account) for name, (account, _) in built.items()]
    before = {name: account for name, account in ready if chosen[name].was_hot}
    standing = await holds_of(connection, before, now_ms)
    return Prepared(ready, unsettled, missing, await remembered.answers(connection, before, now_ms), standing)


_NAMES: Final = "(SELECT * FROM unnest($1::text[], $2::text[]))"

_LOCK: Final = f"""
SELECT tenant, customer, config, epoch, sequence, version, overage, held, period_start, period_end, allowance, crossed,
       crossings
FROM accounts WHERE (tenant, customer) IN {_NAMES} ORDER BY tenant, customer FOR UPDATE"""  # noqa: S608

_CREDITS: Final = f"""
SELECT g.tenant, g.no, g.id, g.customer, g.amount, g.category, g.priority, g.effective_ms, g.expires_ms, g.created_ms,
       g.features, g.voided_ms, g.swept, b.remaining, b.broken
FROM grants g JOIN grant_balances b ON b.grant_no = g.no
WHERE (g.tenant, g.customer) IN {_NAMES} AND b.remaining <> 0"""  # noqa: S608

_CONTRACTS: Final = f"SELECT tenant, customer, body FROM contracts WHERE state = 1 AND (tenant, customer) IN {_NAMES}"  # noqa: S608

_SUBJECTS: Final = f"""
SELECT tenant, id, subjects FROM customers WHERE (tenant, id) IN {_NAMES} AND subjects <> '[]'"""  # noqa: S608

_SETTLED: Final = f"""
SELECT p.tenant, p.customer, p.settled FROM account_periods p JOIN accounts a USING (tenant, customer, period_start)
WHERE (a.tenant, a.customer) IN {_NAMES}"""  # noqa: S608

_METERS: Final = """
SELECT m.tenant, m.customer, m.period_start, m.meter, m.quantity
FROM meters m JOIN unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[]) AS n (tenant, customer, start, earliest)
     USING (tenant, customer)
WHERE m.period_start >= n.earliest OR m.period_start = n.start"""

_PENDING: Final = f"""
SELECT tenant, customer, body FROM hot_deltas WHERE (tenant, customer) IN {_NAMES} ORDER BY version"""  # noqa: S608


async def _rows(connection: Connection, query: str, names: Iterable[Name]) -> list[Row]:
    pairs = sorted(names)
    return await connection.fetch(query, [tenant for tenant, _ in pairs], [customer for _, customer in pairs])


async def _read(connection: Connection, accounts: Mapping[Name, Ledgered], now_ms: int) -> None:
    """Fills in what lies beside the accounts' rows. Read after the lock, each in a statement of its own."""
    for row in await _rows(connection, _CREDITS, accounts):
        credit = Credit(hot_deltas.grant_of(row), row["remaining"], row["broken"])
        accounts[row["tenant"], row["customer"]].credits.append(credit)
    for row in await _rows(connection, _CONTRACTS, accounts):
        accounts[row["tenant"], row["customer"]].quotas += quotas_of(row["body"])
    for row in await _rows(connection, _SUBJECTS, accounts):
        accounts[row["tenant"], row["id"]].limits += limits_of(row["subjects"])
    if hot := {name: account for name, account in accounts.items() if account.was_hot}:
        await _read_history(connection, hot, now_ms)


async def _read_history(connection: Connection, accounts: Mapping[Name, Ledgered], now_ms: int) -> None:
    for row in await _rows(connection, _SETTLED, accounts):
        accounts[row["tenant"], row["customer"]].settled = row["settled"]
    for name, hold in await open_holds(connection, list(accounts)):
        accounts[name].holds.append(hold)
    for row in await _rows(connection, _PENDING, accounts):
        accounts[row["tenant"], row["customer"]].pending.append(hot_deltas.parse(row["body"]))
    listed = list(accounts.values())
    meters = await connection.fetch(
        _METERS,
        [account.name[0] for account in listed],
        [account.name[1] for account in listed],
        [account.row["period_start"] for account in listed],
        [period(a.config.recurrence, a.config.anchor_ms, now_ms - ARCHIVE_MS)[0] for a in listed],
    )
    for row in meters:
        accounts[row["tenant"], row["customer"]].meters[row["period_start"], row["meter"]] = row["quantity"]
    for account in listed:
        if account.quotas:
            account.used = await used_now(connection, *account.name, account.config, account.quotas, now_ms)
        if account.limits:
            account.used_by = await used_by_subjects(
                connection, *account.name, account.config.anchor_ms, account.limits, now_ms
            )


def _broken(account: Ledgered) -> dict[int, Expired]:
    return {credit.grant.no: Expired(credit.remaining, credit.broken) for credit in account.credits if credit.broken}


async def _book(
    connection: Connection, name: Name, account: Account, corrections: Corrections, expired: dict[int, Expired]
) -> None:
    tenant, customer = name
    overage = f"overage:{customer}"
    moved: dict[int, int] = defaultdict(int)
    was = {no: grant.broken for no, grant in expired.items()}
    for kind, parts, sign, other in (
        ("void", corrections.removed, -1, BREAKAGE),
        ("reclass", corrections.reclassed, 1, overage),
        ("repay", corrections.repaid, -1, overage),
    ):
        if not parts:
            continue
        entries: list[Line] = [(f"grant:{grant.id}", grant.no, sign * amount) for grant, amount in parts]
        entries.append((other, None, -sum(amount for _, _, amount in entries)))
        entries = restored(entries, expired, {grant.no: grant.id for grant, _ in parts})
        transaction = Transaction(
            tenant=tenant,
            customer=customer,
            kind=kind,
            key=f"install:{customer}:{account.epoch}",
            credit_type=account.config.credit_type,
            version=account.version,
            epoch=account.epoch,
            entries=[Entry(where, amount, no) for where, no, amount in entries],
        )
        await changes.book(connection, transaction)
        for grant, amount in parts:
            moved[grant.no] += sign * amount
    if moved:
        await connection.execute(
            """UPDATE grant_balances b SET remaining = remaining + m.amount
               FROM unnest($1::bigint[], $2::bigint[]) AS m (no, amount) WHERE b.grant_no = m.no""",
            *(list(moved), list(moved.values())),
        )
    if back := {no: grant.broken for no, grant in expired.items() if grant.broken != was[no]}:
        await connection.execute(
            """UPDATE grant_balances b SET broken = m.broken
               FROM unnest($1::bigint[], $2::bigint[]) AS m (no, broken) WHERE b.grant_no = m.no""",
            *(list(back), list(back.values())),
        )


async def _advance(connection: Connection, accounts: Mapping[Name, Account]) -> None:
    values = list(accounts.items())
    await connection.execute(
        """UPDATE accounts a
           SET epoch = n.epoch, applied = n.version, overage = n.overage, period_start = n.period_start,
               period_end = n.period_end, allowance = n.allowance
           FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
                       $8::bigint[])
               AS n (tenant, customer, epoch, version, overage, period_start, period_end, allowance)
           WHERE a.tenant = n.tenant AND a.customer = n.customer""",
        [tenant for (tenant, _), _ in values],
        [customer for (_, customer), _ in values],
        [account.epoch for _, account in values],
        [account.version for _, account in values],
        [account.overage for _, account in values],
        [account.period_start for _, account in values],
        [account.period_end for _, account in values],
        [account.allowance for _, account in values],
    )
    if any(account.epoch > 1 for account in accounts.values()):
        await _rows(connection, f"DELETE FROM hot_deltas WHERE (tenant, customer) IN {_NAMES}", accounts)  # noqa: S608
