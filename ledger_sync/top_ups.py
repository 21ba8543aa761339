"""Credit that is bought when it runs low: a contract's rule, carried out once for each fall below its bound, and again
only when that has not lifted what is available to it.

What is available is what the ledger has settled, a moment behind the hot store. DIRECT creates a grant. WEBHOOK asks
for one by an event that names the grant's id; whoever answers creates a grant with that id. Until then nothing more is
asked, for a day; then the same is asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from entitlement.account import Status
from entitlement.errors import InvalidArgument
from entitlement.grants import Category
from entitlement.identity import MAX_ID_BYTES, key_digest
from entitlement.periods import DAY, Recurrence, period
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes
from ledger_sync.announcements import TOP_UP_CREATED, TOP_UP_REQUESTED, announce
from ledger_sync.changes import Locked
from ledger_sync.hot_store import Name
from ledger_sync.issuing import RESERVED, NewGrant, issue
from ledger_sync.refusals import Refusal

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

BATCH: Final = 200  # customers who buy in one round
PAGE: Final = 10_000  # rules that are looked at in one round, which takes some 50 ms
ASK_AGAIN_MS: Final = DAY
ACTOR: Final = "top-up"  # in the audit log

log = structlog.get_logger(__name__)


class TopUp(msgspec.Struct, frozen=True):
    """One that was decided. `answered`: its grant exists."""

    no: int
    grant: str
    amount: int
    decided_ms: int
    answered: bool


class Standing(msgspec.Struct, frozen=True):
    """What a decision depends on. Amounts are nanos; `spent`: of the top-ups decided since the month began."""

    rule: pb.TopUp
    available: int
    last: TopUp | None
    spent: int
    month_ms: int


class Step(msgspec.Struct, frozen=True):
    """The top-up with this number is to be: its grant created, or (`ask`) asked for. Grants have ids of its number."""

    no: int
    amount: int
    ask: bool


# Of the contracts that {rules} selects, those whose account stands below the bound. By index, one after the other.
_STANDING: Final = """
SELECT c.tenant, c.customer, c.body, (s.credit - a.overage - a.held)::text AS available, m.spent::text AS spent,
       t.no, t.grant_id, t.amount, t.decided_ms, t.answered
FROM ({rules}) c
     JOIN customers k ON k.tenant = c.tenant AND k.id = c.customer AND k.status = 1
     JOIN accounts a ON a.tenant = c.tenant AND a.customer = c.customer
     CROSS JOIN LATERAL (
         SELECT coalesce(sum(b.remaining), 0) AS credit FROM grants g JOIN grant_balances b ON b.grant_no = g.no
         WHERE g.tenant = c.tenant AND g.customer = c.customer AND g.voided_ms = 0 AND g.effective_ms <= $1
               AND (g.expires_ms = 0 OR g.expires_ms > $1)) s
     CROSS JOIN LATERAL (
         SELECT coalesce(sum(u.amount), 0) AS spent FROM top_ups u
         WHERE u.tenant = c.tenant AND u.customer = c.customer AND u.decided_ms >= $2) m
     LEFT JOIN LATERAL (
         SELECT u.no, u.grant_id, u.amount, u.decided_ms,
                EXISTS (SELECT FROM grants g WHERE g.tenant = u.tenant AND g.id = u.grant_id) AS answered
         FROM top_ups u WHERE u.tenant = c.tenant AND u.customer = c.customer ORDER BY u.no DESC LIMIT 1) t ON true
WHERE s.credit - a.overage - a.held < c.top_up_below"""

_RULES: Final = (
    "SELECT tenant, customer, body, top_up_below FROM contracts WHERE state = 1 AND top_up_below IS NOT NULL"
)
_PAGE: Final = f"{_RULES} AND (tenant, customer) > ($3, $4) ORDER BY tenant, customer LIMIT $5"
_LOW: Final = f"{_STANDING.format(rules=_PAGE)} ORDER BY c.tenant, c.customer"
_ONE: Final = _STANDING.format(rules=f"{_RULES} AND tenant = $3 AND customer = $4")

_LAST: Final = f"{_RULES} AND (tenant, customer) > ($1, $2) ORDER BY tenant, customer OFFSET $3 LIMIT 1"

_DECIDED: Final = """
INSERT INTO top_ups (tenant, customer, no, grant_id, amount, decided_ms) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (tenant, customer, no) DO UPDATE SET decided_ms = excluded.decided_ms"""


class TopUps:
    """The chore that looks at every customer with a rule, page by page and round after round. `on_created` after a
    grant: its account has changed.
    """

    def __init__(self, ledger: Ledger, on_created: Callable[[], None]) -> None:
        self._ledger = ledger
        self._on_created = on_created
        self._after: Name = ("", "")
        self._refused: set[Name] = set()  # and logged

    async def tend(self, now_ms: int) -> bool:
        """The next page's customers that stand below their bound. There may be more at once when one has bought: it may
        still stand there. Other pages wait for the next sweep, so that looking costs little however many there are.
        """
        month_ms = month_of(now_ms)
        async with self._ledger.transaction(readonly=True) as connection:
            last = await connection.fetchrow(_LAST, *self._after, PAGE - 1)
            rows = await connection.fetch(_LOW, now_ms, month_ms, *self._after, PAGE)
        low = [(row["tenant"], row["customer"]) for row in rows if next_step(_standing(row, month_ms), now_ms)]
        done = [await self._top_up(name) for name in low[:BATCH]]
        if len(low) > BATCH:
            self._after = low[BATCH - 1]
            return True
        self._after = (last["tenant"], last["customer"]) if last else ("", "")
        return any(done)

    async def _top_up(self, name: Name) -> bool:
        """Decides anew, now under the account's lock, and carries it out in the same transaction."""
        try:
            async with self._ledger.transaction() as connection:
                account = await changes.lock(connection, *name)
                month_ms = month_of(account.now_ms)
                row = await connection.fetchrow(_ONE, account.now_ms, month_ms, *name)
                standing = _standing(row, month_ms) if row and account.config.status is Status.ACTIVE else None
                step = next_step(standing, account.now_ms) if standing else None
                if not standing or not step:
                    return False
                await _carry_out(connection, account, standing, step)
        except (Refusal, InvalidArgument) as error:  # A full account: the others shall not wait for it.
            if name not in self._refused:
                self._refused.add(name)
                log.error("top_up_refused", customer=name[1], error=str(error))
            return False
        self._refused.discard(name)
        if not step.ask:
            self._on_created()
        return True


def next_step(standing: Standing, now_ms: int) -> Step | None:
    """What the rule wants now, if anything. Pure."""
    rule, pending = standing.rule, standing.last
    if standing.available >= rule.below_nanos:
        return None
    ask, no, amount, spent = rule.via == pb.TopUp.WEBHOOK, 1, rule.amount_nanos, standing.spent
    if pending and pending.answered:
        no = pending.no + 1
    elif pending:  # The same one: asked again, or no longer to be asked for.
        if ask and now_ms - pending.decided_ms < ASK_AGAIN_MS:
            return None
        no, amount = pending.no, pending.amount
        spent -= pending.amount if pending.decided_ms >= standing.month_ms else 0
    if rule.monthly_cap_nanos and spent + amount > rule.monthly_cap_nanos:
        return None
    return Step(no, amount, ask)


def grant_id(tenant: str, customer: str, no: int) -> str:
    """The same for the same top-up. A long customer's id is represented by its digest."""
    found = f"{RESERVED}topup/{customer}/{no}"
    return found if len(found) <= MAX_ID_BYTES else f"{RESERVED}topup/~{key_digest(tenant, customer, '').hex()}/{no}"


def month_of(now_ms: int) -> int:
    """When the calendar month (UTC) began."""
    return period(Recurrence.MONTH, 0, now_ms)[0]


async def _carry_out(connection: Connection, account: Locked, standing: Standing, step: Step) -> None:
    now_ms, grant = account.now_ms, grant_id(account.tenant, account.customer, step.no)
    await connection.execute(_DECIDED, *(account.tenant, account.customer, step.no, grant, step.amount, now_ms))
    if not step.ask:
        new = NewGrant(id=grant, amount=step.amount, category=Category.PAID, effective_ms=now_ms)
        await issue(connection, account, new)
    data = {
        "grant": grant,
        "amountNanos": step.amount,
        "availableNanos": standing.available,
        "creditType": account.config.credit_type,
    }
    await announce(
        connection,
        TOP_UP_REQUESTED if step.ask else TOP_UP_CREATED,
        # A ':' is in no caller's key, by which rated events are called. What is asked again is another event.
        event_id=f"{grant}:requested:{now_ms}" if step.ask else f"{grant}:created",
        tenant=account.tenant,
        customer=account.customer,
        time_ms=now_ms,
        data=data,
    )
    detail = f"grant={grant} amount_nanos={step.amount} available_nanos={standing.available}"
    action = "RequestTopUp" if step.ask else "CreateTopUp"
    await changes.audit(connection, account.tenant, ACTOR, action, account.customer, detail)


def _standing(row: Row, month_ms: int) -> Standing:
    last = TopUp(row["no"], row["grant_id"], row["amount"], row["decided_ms"], row["answered"]) if row["no"] else None
    rule = pb.Contract.FromString(row["body"]).top_up
    return Standing(rule, int(row["available"]), last, int(row["spent"]), month_ms)
