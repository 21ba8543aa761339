"""Contracts in the ledger. A customer's follow one another without overlap; the first one opens the account.

A contract is scheduled until it begins, in force until it ends (at most one of a customer), then over for good. While
none is in force the account is suspended.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from entitlement import keys
from entitlement.account import Config, Status
from entitlement.errors import InvalidArgument
from entitlement.identity import check_id
from entitlement.periods import Recurrence
from entitlement.quantity import MAX_NANOS
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import allotments, changes, hot_deltas, overrides
from ledger_sync.announcements import CONTRACT_CHANGED, announce
from ledger_sync.contracts import DERIVED, checked, config_of, features_of, plan_of, quotas_of
from ledger_sync.hot_store import Name
from ledger_sync.ledger import LedgerRefused
from ledger_sync.quota_usage import used_now
from ledger_sync.rated import rfc3339
from ledger_sync.refusals import FailedPrecondition, NotFound, Refusal
from ledger_sync.subjects import limits_of, used_by_subjects
from ledger_sync.translate import Page, page_token, to_ms

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

SCHEDULED, IN_FORCE, ENDED = 0, 1, 2  # contracts.state
BATCH: Final = 200  # customers in one round

log = structlog.get_logger(__name__)

_SUBJECTS: Final = "SELECT subjects FROM customers WHERE tenant = $1 AND id = $2"


class Standing(msgspec.Struct, frozen=True):
    """A contract as it lies in the ledger."""

    contract: pb.Contract
    state: int

    @property
    def starts_ms(self) -> int:
        return to_ms("effective_at", self.contract.effective_at)

    @property
    def ends_ms(self) -> int:
        return to_ms("ends_at", self.contract.ends_at) if self.contract.HasField("ends_at") else 0


class ContractStore:
    """Every put is one transaction; what it changes of a hot account is decided in it. Its chore begins and ends
    contracts when their time comes.
    """

    def __init__(self, ledger: Ledger, tenant: str, partitions: int = keys.PARTITIONS) -> None:
        self._ledger = ledger
        self._tenant = tenant
        self._partitions = partitions

    async def put(self, message: pb.Contract, actor: str) -> pb.Contract:
        """Creates a contract of the customer, or replaces it as a whole; the same content again changes nothing. An
        anchor or effective_at that is left out stays what it was.
        """
        check_id("id", message.id)
        check_id("customer", message.customer)
        async with self._ledger.transaction() as connection:
            customer = await _lock_customer(connection, self._tenant, message.customer)
            now_ms = await changes.now_ms(connection)
            if await _has_account(connection, self._tenant, message.customer):  # The sweep may not have come yet.
                await _turn(connection, (self._tenant, message.customer), customer, now_ms)
            others = await self._standing(connection, message)
            mine = others.pop(message.id, None)
            contract = checked(message, now_ms, mine.contract if mine else None)
            if mine and contract == mine.contract:
                return contract
            state = IN_FORCE if to_ms("effective_at", contract.effective_at) <= now_ms else SCHEDULED
            _check_time(Standing(contract, state), mine, others.values())
            await changes.check_features(connection, self._tenant, features_of(contract))
            credit = await self._credit_type(connection, contract)
            await overrides.derive(connection, self._tenant, contract, now_ms)
            await self._write(connection, contract, state)
            await self._take_effect(connection, customer, mine, Standing(contract, state), credit)
            detail = (
                f"contract={contract.id} plan={plan_of(contract)} billing={pb.Contract.Billing.Name(contract.billing)}"
            )
            await changes.audit(connection, self._tenant, actor, "PutContract", contract.customer, detail)
            await _announce(connection, self._tenant, contract, "put", now_ms)
        return contract

    async def list(self, page: Page) -> pb.ListContractsResponse:
        """By id, with their defaults filled in; of one customer when the page names it."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                """SELECT body FROM contracts WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND id > $3
                   ORDER BY id LIMIT $4""",
                *(self._tenant, page.customer, page.after[0] if page.after else "", page.size + 1),
            )
        contracts = [pb.Contract.FromString(row["body"]) for row in rows[: page.size]]
        response = pb.ListContractsResponse(contracts=contracts)
        if len(rows) > page.size:
            response.next_page_token = page_token(response.contracts[-1].id)
        return response

    async def tend(self, now_ms: int) -> bool:
        """Begins and ends what is due."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                """SELECT tenant, customer FROM contracts WHERE state = 0 AND effective_ms <= $1
                   UNION SELECT tenant, customer FROM contracts WHERE state = 1 AND ends_ms > 0 AND ends_ms <= $1
                   LIMIT $2""",
                *(now_ms, BATCH),
            )
        return sum([await self._try((row["tenant"], row["customer"]), now_ms) for row in rows]) > 0

    async def _try(self, name: Name, now_ms: int) -> bool:
        """Whether it was done. One customer's trouble is not the others'."""
        try:
            async with self._ledger.transaction() as connection:
                await _turn(connection, name, await _lock_customer(connection, *name), now_ms)
        except (Refusal, InvalidArgument, LedgerRefused) as error:
            log.error("contract_not_turned", customer=name[1], error=str(error))
            return False
        return True

    async def _standing(self, connection: Connection, message: pb.Contract) -> dict[str, Standing]:
        """The customer's contracts by id, and any other's that has the message's id (which is refused)."""
        owner = await connection.fetchval(
            "SELECT customer FROM contracts WHERE tenant = $1 AND id = $2", self._tenant, message.id
        )
        if owner not in (None, message.customer):
            raise InvalidArgument("customer", f"contract {message.id!r} is another customer's")
        return await _contracts(connection, self._tenant, message.customer)

    async def _credit_type(self, connection: Connection, contract: pb.Contract) -> str:
        credit: str | None = await connection.fetchval(
            "SELECT credit_type FROM rate_cards WHERE tenant = $1 AND id = $2 LIMIT 1", self._tenant, contract.rate_card
        )
        if credit is None or contract.rate_card.startswith(DERIVED):
            raise InvalidArgument("rate_card", f"{contract.rate_card!r} does not exist: put it first")
        return credit

    async def _write(self, connection: Connection, contract: pb.Contract, state: int) -> None:
        await connection.execute(
            """INSERT INTO contracts (tenant, id, customer, body, effective_ms, ends_ms, state, top_up_below, commits,
                                      continues)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
               ON CONFLICT (tenant, id) DO UPDATE SET body = $4, effective_ms = $5, ends_ms = $6, state = $7,
                   top_up_below = $8, commits = $9, continues = $10, updated_at = clock_timestamp()""",
            *(self._tenant, contract.id, contract.customer, contract.SerializeToString(deterministic=True)),
            to_ms("effective_at", contract.effective_at),
            to_ms("ends_at", contract.ends_at) if contract.HasField("ends_at") else 0,
            state,
            contract.top_up.below_nanos if contract.HasField("top_up") else None,
            contract.minimum_commit_nanos > 0,
            contract.failure_policy.allowance_nanos,
        )

    async def _take_effect(
        self, connection: Connection, customer: Row, mine: Standing | None, now: Standing, credit: str
    ) -> None:
        """What a put means for the account; one that is scheduled opens it, suspended, so that it can have grants."""
        contract = now.contract
        config = config_of(contract, credit, customer["status"])
        if not await _has_account(connection, self._tenant, contract.customer):
            await self._open(connection, contract.customer, config if now.state == IN_FORCE else _suspended(config))
        elif now.state == IN_FORCE:
            account = await changes.lock(connection, self._tenant, contract.customer)
            before = mine.contract if mine and mine.state == IN_FORCE else None
            await _reconfigure(connection, account, config, contract, before)
        else:
            account = await changes.lock(connection, self._tenant, contract.customer)
            _check_credit(account.config, config)
        account = await changes.lock(connection, self._tenant, contract.customer)
        await _check_room(connection, account, contract)
        if now.state == IN_FORCE:
            try:
                await _put_seats(connection, account, contract)
            except (Refusal, InvalidArgument) as error:
                raise InvalidArgument("seats", str(error)) from None

    async def _open(self, connection: Connection, customer: str, config: Config) -> None:
        await connection.execute(
            """INSERT INTO accounts (tenant, customer, partition, credit_type, config, version, applied)
               VALUES ($1, $2, $3, $4, $5, 1, 1)""",
            *(self._tenant, customer, keys.partition_of(self._tenant, customer, self._partitions)),
            *(config.credit_type, config.encode()),
        )


async def _turn(connection: Connection, name: Name, customer: Row, now_ms: int) -> None:
    """Ends the contract that is over and begins the one whose time has come: one change of the account."""
    standing = (await _contracts(connection, *name)).values()
    over = [item for item in standing if item.state != ENDED and 0 < item.ends_ms <= now_ms]
    due = [item for item in standing if item.state == SCHEDULED and item.starts_ms <= now_ms and item not in over]
    if not over and not due:
        return
    account = await changes.lock(connection, *name)
    for item in over:
        await _end(connection, account, item, now_ms)
    for item in due:
        await _set_state(connection, account.tenant, item.contract.id, IN_FORCE)
        config = config_of(item.contract, account.config.credit_type, customer["status"])
        await _reconfigure(connection, account, config, item.contract, None)
        await _start_seats(connection, account, item.contract)
        await _announce(connection, account.tenant, item.contract, "started", now_ms)
    if over and not due:
        await suspend(connection, account)


async def _start_seats(connection: Connection, account: changes.Locked, contract: pb.Contract) -> None:
    """What has no room does not keep the contract from its start."""
    try:
        async with connection.transaction():
            await _put_seats(connection, account, contract)
    except (Refusal, InvalidArgument) as error:
        log.error("seats_not_issued", customer=account.customer, contract=contract.id, error=str(error))
        await changes.audit(connection, account.tenant, "ledger_sync", "SkipSeats", account.customer, str(error))


async def suspend(connection: Connection, account: changes.Locked) -> None:
    """No contract is in force."""
    config = _suspended(account.config)
    if config != account.config:
        await hot_deltas.decide(connection, account.tenant, account.customer, hot_deltas.Change(config=config))


async def in_force(connection: Connection, tenant: str, customer: str) -> bool:
    found: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT 1 FROM contracts WHERE tenant = $1 AND customer = $2 AND state = 1)", tenant, customer
    )
    return found


def _suspended(config: Config) -> Config:
    if config.status is Status.CLOSED:
        return config
    return msgspec.structs.replace(config, status=Status.SUSPENDED)


def _check_time(now: Standing, mine: Standing | None, others: Iterable[Standing]) -> None:
    contract = now.contract
    if mine and mine.state == ENDED:
        raise FailedPrecondition("id", f"contract {contract.id!r} has ended; put another one")
    if mine and mine.state == IN_FORCE and now.state == SCHEDULED:
        raise InvalidArgument("effective_at", "lies in the future, and the contract is in force")
    for other in others:
        if (not now.ends_ms or other.starts_ms < now.ends_ms) and (not other.ends_ms or now.starts_ms < other.ends_ms):
            until = f"ends at {rfc3339(other.ends_ms)}" if other.ends_ms else "has no end: give it ends_at first"
            raise FailedPrecondition("effective_at", f"the contract {other.contract.id!r} is active then; it {until}")


async def _lock_customer(connection: Connection, tenant: str, customer: str) -> Row:
    """The customer's row, locked: what happens to one customer happens one after the other."""
    row = await connection.fetchrow(
        "SELECT * FROM customers WHERE tenant = $1 AND id = $2 FOR NO KEY UPDATE", tenant, customer
    )
    if row is None:
        raise NotFound("customer", f"{customer!r} is unknown: put the customer first")
    return row


async def _contracts(connection: Connection, tenant: str, customer: str) -> dict[str, Standing]:
    """In the order they begin."""
    rows = await connection.fetch(
        "SELECT id, body, state FROM contracts WHERE tenant = $1 AND customer = $2 ORDER BY effective_ms, id",
        *(tenant, customer),
    )
    return {row["id"]: Standing(pb.Contract.FromString(row["body"]), row["state"]) for row in rows}


async def _has_account(connection: Connection, tenant: str, customer: str) -> bool:
    query = "SELECT EXISTS (SELECT 1 FROM accounts WHERE tenant = $1 AND customer = $2)"
    found: bool = await connection.fetchval(query, tenant, customer)
    return found


async def _set_state(connection: Connection, tenant: str, contract: str, state: int) -> None:
    await connection.execute(
        "UPDATE contracts SET state = $3, updated_at = clock_timestamp() WHERE tenant = $1 AND id = $2",
        *(tenant, contract, state),
    )


async def _end(connection: Connection, account: changes.Locked, standing: Standing, now_ms: int) -> None:
    """Its seats' credit ends with it."""
    contract = standing.contract
    await _set_state(connection, account.tenant, contract.id, ENDED)
    if await allotments.read(connection, account.tenant, allotments.seats_id(contract.id)):
        await allotments.end(connection, account, allotments.seats_id(contract.id), void=True)
    await _announce(connection, account.tenant, contract, "ended", now_ms)


async def _put_seats(connection: Connection, account: changes.Locked, contract: pb.Contract) -> None:
    seats = allotments.Seats(
        contract=contract.id,
        amount=contract.seats * contract.allowance_per_seat_nanos,
        recurrence=Recurrence(contract.period),
        anchor_ms=to_ms("anchor", contract.anchor),
    )
    await allotments.put_seats(connection, account, seats)


async def _check_room(connection: Connection, account: changes.Locked, contract: pb.Contract) -> None:
    """The credit line and what the grants have left stay an int64 together."""
    left = int(
        await connection.fetchval(
            """SELECT coalesce(sum(b.remaining), 0)::text FROM grants g JOIN grant_balances b ON b.grant_no = g.no
               WHERE g.tenant = $1 AND g.customer = $2 AND g.voided_ms = 0 AND g.swept < 2""",
            *(account.tenant, account.customer),
        )
    )
    if contract.allowance_nanos > MAX_NANOS - left:
        raise InvalidArgument(
            "allowance_nanos",
            f"{contract.allowance_nanos} with the {left} that grants have left is over {MAX_NANOS}",
        )


def _check_credit(was: Config, config: Config) -> None:
    if was.credit_type != config.credit_type:
        raise FailedPrecondition(
            "rate_card", f"is in {config.credit_type!r} and the account in {was.credit_type!r}, which cannot change"
        )


async def _reconfigure(
    connection: Connection,
    account: changes.Locked,
    config: Config,
    contract: pb.Contract,
    before: pb.Contract | None,
) -> None:
    """Makes the account what a contract in force says. A quota or subject's limit that is new, or counts by another
    window, starts with what its window has used so far.
    """
    was = account.config
    _check_credit(was, config)
    since_ms = min(to_ms("effective_at", contract.effective_at), account.now_ms) if before is None else account.now_ms
    since_ms = max(since_ms, *[until_ms for until_ms, _ in was.earlier], 0)
    config = config.following(was, since_ms)
    known = [] if before is None or was.anchor_ms != config.anchor_ms else before.quotas
    rules = {(quota.feature, quota.period) for quota in known}
    fresh = [
        rule for rule in quotas_of(contract.SerializeToString()) if (rule.feature, int(rule.recurrence)) not in rules
    ]
    used = await used_now(connection, account.tenant, account.customer, config, fresh, account.now_ms)
    if was.anchor_ms == config.anchor_ms:
        by_subject = {}
    else:
        limits = limits_of(await connection.fetchval(_SUBJECTS, account.tenant, account.customer))
        by_subject = await used_by_subjects(
            *(connection, account.tenant, account.customer, config.anchor_ms, limits, account.now_ms)
        )
    change = hot_deltas.Change(
        config=config,
        subjects=tuple(hot_deltas.UsedBySubject(name, nanos, account.now_ms) for name, nanos in by_subject.items()),
        used=tuple(hot_deltas.Used(feature, units, account.now_ms) for feature, units in used.items() if units),
    )
    await hot_deltas.decide(connection, account.tenant, account.customer, change)


async def _announce(connection: Connection, tenant: str, contract: pb.Contract, change: str, now_ms: int) -> None:
    await announce(
        connection,
        CONTRACT_CHANGED,
        event_id=f"{contract.customer}:{contract.id}:{change}:{now_ms}",
        tenant=tenant,
        customer=contract.customer,
        time_ms=now_ms,
        data={"contract": contract.id, "change": change, "at": rfc3339(now_ms)},
    )
