"""Customers in the ledger: who is billed, whether they may go on, and the subjects under them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.account import Config, Status
from entitlement.errors import InvalidArgument
from entitlement.identity import check_id
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes, hot_deltas
from ledger_sync.contract_store import in_force
from ledger_sync.contracts import status_of
from ledger_sync.translate import Page, check_known, check_text, page_token, unsupported

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

MAX_SUBJECTS: Final = 1_000

_STATUSES = (pb.Customer.ACTIVE, pb.Customer.SUSPENDED, pb.Customer.CLOSED)


class Subject(msgspec.Struct, frozen=True):
    """A key, user or workspace under a customer, as it lies in the ledger."""

    id: str


class CustomerStore:
    """Every put is one transaction; what it changes of a hot account is decided in it."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant

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
        if config is None:
            return
        status = status_of(customer.status)
        if status is Status.ACTIVE and not await in_force(connection, self._tenant, customer.id):
            status = Status.SUSPENDED
        changed = msgspec.structs.replace(Config.decode(config), status=status)
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

    async def _customer(self, connection: Connection, customer: str) -> Row | None:
        """The customer's row, locked: what happens to one customer happens one after the other."""
        return await connection.fetchrow(
            "SELECT * FROM customers WHERE tenant = $1 AND id = $2 FOR NO KEY UPDATE", self._tenant, customer
        )


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
