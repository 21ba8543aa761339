"""Customers and their contracts in the ledger. A customer has one contract at most; with it comes the account."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from entitlement import keys
from entitlement.account import Config
from entitlement.errors import InvalidArgument
from entitlement.identity import check_id
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes, hot_deltas
from ledger_sync.contracts import checked, config_of, features_of, quotas_of, status_of
from ledger_sync.quota_usage import used_now
from ledger_sync.refusals import FailedPrecondition, NotFound
from ledger_sync.translate import Page, check_known, check_text, page_token, to_ms, unsupported

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

MAX_SUBJECTS: Final = 1_000

_STATUSES = (pb.Customer.ACTIVE, pb.Customer.SUSPENDED, pb.Customer.CLOSED)


class Subject(msgspec.Struct, frozen=True):
    """A key, user or workspace under a customer, as it lies in the ledger."""

    id: str


class CustomerStore:
    """Every put is one transaction; what it changes of a hot account is decided in it."""

    def __init__(self, ledger: Ledger, tenant: str, partitions: int = keys.PARTITIONS) -> None:
        self._ledger = ledger
        self._tenant = tenant
        self._partitions = partitions

    async def put_customer(self, message: pb.Customer, actor: str) -> pb.Customer:
        """Creates a customer or replaces its name, status and subjects. Status ACTIVE when left out."""
        customer = checked_customer(message)
        subjects = [Subject(subject.id) for subject in customer.subjects]
        async with self._ledger.transaction() as connection:
            row = await self._customer(connection, customer.id)
            if row and _customer_message(row) == customer:
                return customer
            await connection.execute(
                """INSERT INTO customers (tenant, id, name, status, subjects) VALUES ($1, $2, $3, $4, $5)
                   ON CONFLICT (tenant, id) DO UPDATE SET name = $3, status = $4, subjects = $5""",
                *(self._tenant, customer.id, customer.name, customer.status, msgspec.json.encode(subjects).decode()),
            )
            if row and row["status"] != customer.status:
                await self._restatus(connection, customer)
            detail = f"status={pb.Customer.Status.Name(customer.status)} subjects={len(subjects)}"
            await changes.audit(connection, self._tenant, actor, "PutCustomer", customer.id, detail)
        return customer

    async def _restatus(self, connection: Connection, customer: pb.Customer) -> None:
        config = await connection.fetchval(
            "SELECT config FROM accounts WHERE tenant = $1 AND customer = $2 FOR UPDATE", self._tenant, customer.id
        )
        if config is not None:
            changed = msgspec.structs.replace(Config.decode(config), status=status_of(customer.status))
            await hot_deltas.decide(connection, self._tenant, customer.id, hot_deltas.Change(config=changed))

    async def list_customers(self, page: Page) -> pb.ListCustomersResponse:
        """By id."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                "SELECT * FROM customers WHERE tenant = $1 AND id > $2 ORDER BY id LIMIT $3",
                *(self._tenant, page.after[0] if page.after else "", page.size + 1),
            )
        response = pb.ListCustomersResponse(customers=[_customer_message(row) for row in rows[: page.size]])
        if len(rows) > page.size:
            response.next_page_token = page_token(response.customers[-1].id)
        return response

    async def put_contract(self, message: pb.Contract, actor: str) -> pb.Contract:
        """Creates the customer's contract, and with it the account, or replaces it as a whole; the same content again
        changes nothing. An anchor or effective_at that is left out stays what it was.
        """
        check_id("id", message.id)
        check_id("customer", message.customer)
        async with self._ledger.transaction() as connection:
            customer = await self._customer(connection, message.customer)
            if customer is None:
                raise NotFound("customer", f"{message.customer!r} is unknown: put the customer first")
            account = await connection.fetchrow(
                "SELECT config FROM accounts WHERE tenant = $1 AND customer = $2 FOR UPDATE",
                *(self._tenant, message.customer),
            )
            before = await self._contract(connection, message)
            now_ms = await changes.now_ms(connection)
            contract = checked(message, now_ms, before)
            if contract == before:
                return contract
            await changes.check_features(connection, self._tenant, features_of(contract))
            config = config_of(contract, await self._credit_type(connection, contract), customer["status"])
            await self._write_contract(connection, contract)
            if account is None:
                await self._open_account(connection, contract.customer, config)
            else:
                await self._change_account(
                    connection, Config.decode(account["config"]), config, contract, before, now_ms
                )
            detail = f"contract={contract.id} plan={config.plan} billing={config.billing.name}"
            await changes.audit(connection, self._tenant, actor, "PutContract", contract.customer, detail)
        return contract

    async def list_contracts(self, page: Page) -> pb.ListContractsResponse:
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

    async def _customer(self, connection: Connection, customer: str) -> Row | None:
        """The customer's row, locked: what happens to one customer happens one after the other."""
        return await connection.fetchrow(
            "SELECT * FROM customers WHERE tenant = $1 AND id = $2 FOR NO KEY UPDATE", self._tenant, customer
        )

    async def _contract(self, connection: Connection, message: pb.Contract) -> pb.Contract | None:
        """The contract that the message replaces."""
        rows = await connection.fetch(
            "SELECT id, customer, body FROM contracts WHERE tenant = $1 AND (id = $2 OR customer = $3)",
            *(self._tenant, message.id, message.customer),
        )
        for row in rows:
            if row["customer"] != message.customer:
                raise InvalidArgument("customer", f"contract {message.id!r} is another customer's")
            if row["id"] != message.id:
                raise FailedPrecondition(
                    "id",
                    f"the customer has the contract {row['id']!r}: a second one is not supported yet; replace that one",
                )
        return pb.Contract.FromString(rows[0]["body"]) if rows else None

    async def _credit_type(self, connection: Connection, contract: pb.Contract) -> str:
        credit: str | None = await connection.fetchval(
            "SELECT credit_type FROM rate_cards WHERE tenant = $1 AND id = $2 LIMIT 1", self._tenant, contract.rate_card
        )
        if credit is None:
            raise InvalidArgument("rate_card", f"{contract.rate_card!r} does not exist: put it first")
        return credit

    async def _write_contract(self, connection: Connection, contract: pb.Contract) -> None:
        await connection.execute(
            """INSERT INTO contracts (tenant, id, customer, body, effective_ms, ends_ms) VALUES ($1, $2, $3, $4, $5, 0)
               ON CONFLICT (tenant, id) DO UPDATE SET body = $4, effective_ms = $5, updated_at = clock_timestamp()""",
            *(self._tenant, contract.id, contract.customer, contract.SerializeToString(deterministic=True)),
            to_ms("effective_at", contract.effective_at),
        )

    async def _open_account(self, connection: Connection, customer: str, config: Config) -> None:
        await connection.execute(
            """INSERT INTO accounts (tenant, customer, partition, credit_type, config, version, applied)
               VALUES ($1, $2, $3, $4, $5, 1, 1)""",
            *(self._tenant, customer, keys.partition_of(self._tenant, customer, self._partitions)),
            *(config.credit_type, config.encode()),
        )

    async def _change_account(
        self,
        connection: Connection,
        was: Config,
        config: Config,
        contract: pb.Contract,
        before: pb.Contract | None,
        now_ms: int,
    ) -> None:
        if was.credit_type != config.credit_type:
            raise FailedPrecondition(
                "rate_card", f"is in {config.credit_type!r} and the account in {was.credit_type!r}, which cannot change"
            )
        # A quota that is new, or counts by another window, starts with what its window has used so far.
        known = [] if before is None or was.anchor_ms != config.anchor_ms else before.quotas
        rules = {(quota.feature, quota.period) for quota in known}
        fresh = [
            rule
            for rule in quotas_of(contract.SerializeToString())
            if (rule.feature, int(rule.recurrence)) not in rules
        ]
        used = await used_now(connection, self._tenant, contract.customer, config, fresh, now_ms)
        change = hot_deltas.Change(
            config=config,
            used=tuple(hot_deltas.Used(feature, units, now_ms) for feature, units in used.items() if units),
        )
        await hot_deltas.decide(connection, self._tenant, contract.customer, change)


def checked_customer(message: pb.Customer) -> pb.Customer:
    """A copy with its default filled in."""
    check_id("id", message.id)
    check_text("name", message.name)
    if len(message.subjects) > MAX_SUBJECTS:
        raise InvalidArgument("subjects", f"has {len(message.subjects)} subjects; expected at most {MAX_SUBJECTS}")
    for index, subject in enumerate(message.subjects):
        check_id(f"subjects[{index}].id", subject.id)
        if subject.limit_nanos or subject.period:
            raise unsupported(
                f"subjects[{index}].{'limit_nanos' if subject.limit_nanos else 'period'}", "a subject's limit"
            )
    if len({subject.id for subject in message.subjects}) != len(message.subjects):
        raise InvalidArgument("subjects", "names a subject twice")
    customer = pb.Customer()
    customer.CopyFrom(message)
    customer.status = check_known("status", message.status or pb.Customer.ACTIVE, _STATUSES)  # type: ignore[assignment]
    return customer


def _customer_message(row: Row) -> pb.Customer:
    subjects = msgspec.json.decode(row["subjects"], type=list[Subject])
    return pb.Customer(
        id=row["id"],
        name=row["name"],
        status=row["status"],
        subjects=[pb.Subject(id=subject.id) for subject in subjects],
    )
