"""The first memory of idempotency, put together again from the second: what the hot store answered lately goes back
into it with an account that is built anew. So a receipt, or a caller who asks again, finds its answer there instead of
being charged and given back.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import error as StructError
from typing import TYPE_CHECKING, Final

from entitlement.account import Account
from entitlement.decision import Charged, Decision, Reason, Verdict, pack_answer
from entitlement.errors import CorruptRecord
from entitlement.holding import remembered_tail
from entitlement.identity import key_digest
from entitlement.journal import Consumed, Settled, decode
from entitlement.periods import SECOND

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

Name = tuple[str, str]  # tenant, customer
WINDOW_MS: Final = 900 * SECOND  # older keys are known to the ledger alone, which gives back what they are charged
MAX_KEYS: Final = 20_000  # of all accounts that are built together; of each its newest, and as many of late events

# The newest of each account, and those of them that had happened before the window (by the index usage_events_late).
_EVENTS: Final = """
SELECT e.tenant, e.customer, e.idempotency_key, e.fingerprint, e.record
FROM unnest($1::text[], $2::text[]) AS n (tenant, customer),
     LATERAL ((SELECT u.* FROM usage_events u
               WHERE u.tenant = n.tenant AND u.customer = n.customer
                     AND u.event_time >= to_timestamp($3::bigint / 1000.0)
               ORDER BY u.event_time DESC LIMIT $4)
              UNION ALL
              (SELECT u.* FROM usage_events u
               WHERE u.tenant = n.tenant AND u.customer = n.customer
                     AND u.recorded_at >= to_timestamp($3::bigint / 1000.0)
                     AND u.recorded_at - u.event_time > interval '15 minutes'
               ORDER BY u.recorded_at DESC LIMIT $4)) AS e"""


async def answers(
    connection: Connection, accounts: Mapping[Name, Account], now_ms: int
) -> list[tuple[Name, bytes, bytes]]:
    """For each key: whose it is, its digest, and what the hot store shall hold under it."""
    if not accounts:
        return []
    names = sorted(accounts)
    rows = await connection.fetch(
        _EVENTS,
        [tenant for tenant, _ in names],
        [customer for _, customer in names],
        now_ms - WINDOW_MS,
        MAX_KEYS // len(names),
    )
    found = []
    for tenant, customer, key, fingerprint, record in rows:
        name = (tenant, customer)
        if answer := _answer(record, accounts[name], now_ms):
            found.append((name, key_digest(tenant, customer, key), fingerprint + answer))
    return found


def _answer(data: bytes, account: Account, now_ms: int) -> bytes:
    """What was charged, as it was answered; the balance beside it is the account's as it is now. Empty: this was no
    decision of the hot store.
    """
    try:
        record = decode(data)
        if not isinstance(record, Consumed):
            return b""
        answer = _packed(record, account, now_ms)
        return answer + remembered_tail(record) if isinstance(record, Settled) else answer
    except (CorruptRecord, ValueError, StructError):  # The ledger still knows the key.
        return b""


def _packed(record: Consumed, account: Account, now_ms: int) -> bytes:
    return pack_answer(
        Decision(
            Verdict(record.verdict),
            Reason.NONE,
            failed_line=-1,
            shadow=record.shadow,
            epoch=record.epoch,
            sequence=record.sequence,
            credit_type=record.credit_type,
            available=account.available(now_ms),
            held=account.held,
            settled=account.settled,
            overage=account.overage,
            gate=account.gate,
            rate_version=record.rate_version,
            charged=tuple(Charged(line.quantity, line.amount) for line in record.lines),
            quotas=(),
            replayed=False,
        )
    )
