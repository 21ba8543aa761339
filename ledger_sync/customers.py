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
from ledger_sync.subjects import (
    LimitRule,
    Subject,
    checked_subject,
    subject_message,
    subjects_of,
    used_by_subjects,
)
from ledger_sync.translate import Page, check_known, check_text, page_token

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

MAX_SUBJECTS: Final = 1_000

_STATUSES = (pb.Customer.ACTIVE, pb.Customer.SUSPENDED, pb.Customer.CLOSED)


class CustomerStore:
    """Every put is one transaction; what it changes of a hot account is decided in it."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant

    async def put_customer(self, message: pb.Customer, actor: str) -> pb.Customer:
        """Creates a customer or replaces its name, status and subjects. Status ACTIVE when left out."""
        customer = checked_customer(message)
        subjects = [checked_subject("subject", subject) for subject in customer.subjects]
        async with self._ledger.transaction() as connection:
            row = await self._customer(connection, customer.id)
            if row and _customer_message(row) == customer:
                return customer
            await connection.execute(
                """INSERT INTO customers (tenant, id, name, status, subjects) VALUES ($1, $2, $3, $4, $5)
                   ON CONFLICT (tenant, id) DO UPDATE SET name = $3, status = $4, subjects = $5""",
                *(self._tenant, customer.id, customer.name, customer.status, msgspec.json.encode(subjects).decode()),
            )
            if row and (row["status"], subjects_of(row["subjects"])) != (customer.status, subjects):
                await self._change_account(connection, customer, subjects_of(row["subjects"]), subjects)
            detail = f"status={pb.Customer.Status.Name(customer.status)} subjects={len(subjects)}"
            await changes.audit(connection, self._tenant, actor, "PutCustomer", customer.id, detail)
        return customer

    async def _change_account(
        self, connection: Connection, customer: pb.Customer, before: list[Subject], now: list[Subject]
    ) -> None:
        """A limit that is new, or counts by another window, starts with what its window has used so far."""
        config = await connection.fetchval(
            "SELECT config FROM accounts WHERE tenant = $1 AND customer = $2 FOR UPDATE", self._tenant, customer.id
        )
        if config is None:
            return
        status = status_of(customer.status)
        if status is Status.ACTIVE and not await in_force(connection, self._tenant, customer.id):
            status = Status.SUSPENDED
        changed = msgspec.structs.replace(Config.decode(config), status=status)
        counted = {(subject.id, subject.period) for subject in before if subject.limit}
        fresh = [
            LimitRule(subject.id, subject.limit, subject.period)
            for subject in now
            if subject.limit and (subject.id, subject.period) not in counted
        ]
        now_ms = await changes.now_ms(connection)
        used = await used_by_subjects(connection, self._tenant, customer.id, changed.anchor_ms, fresh, now_ms)
        change = hot_deltas.Change(
            config=changed,
            subjects=tuple(hot_deltas.UsedBySubject(subject, nanos, now_ms) for subject, nanos in used.items()),
        )
        await hot_deltas.decide(connection, self._tenant, customer.id, change)

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
    subjects = [checked_subject(f"subjects[{index}]", subject) for index, subject in enumerate(message.subjects)]
    if len({subject.id for subject in message.subjects}) != len(message.subjects):
        raise InvalidArgument("subjects", "names a subject twice")
    customer = pb.Customer()
    customer.CopyFrom(message)
    del customer.subjects[:]
    customer.subjects.extend(map(subject_message, subjects))
    customer.status = check_known("status", message.status or pb.Customer.ACTIVE, _STATUSES)  # type: ignore[assignment]
    return customer


def _customer_message(row: Row) -> pb.Customer:
    return pb.Customer(
        id=row["id"],
        name=row["name"],
        status=row["status"],
        subjects=map(subject_message, subjects_of(row["subjects"])),
    )
