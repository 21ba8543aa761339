"""Brings the ledger's catalogue to what a file says: reads what is there, checks it all, then writes what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, TypeVar

import grpc

from entitlement.v1 import ledger_pb2 as pb
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.cli import show
from gateway.cli.calls import DEADLINE_S, CallFailed, describe
from gateway.cli.catalogue import KINDS, Catalogue, Item, Kind, Message
from gateway.cli.difference import difference
from gateway.cli.yaml_source import BadFile, Fault, Where

PAGE_SIZE: Final = 1000
LISTED: Final = 20  # entries shown one by one; more are only counted


class Change(StrEnum):
    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Step:
    """One entry of the file: what becomes of it, and the call that makes it so."""

    kind: Kind
    id: str
    change: Change
    detail: str  # what changes
    where: Where
    send: Callable[[], object]


class Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


PageT = TypeVar("PageT", bound=Page)


def plan(stub: LedgerAdminStub, catalogue: Catalogue) -> list[Step]:
    """What an apply would do, in order; writes nothing.

    BadFile: the file names what neither it nor the ledger has, or changes a grant, which never changes.
    """
    features = {message.key: message for page in pages(stub.ListFeatures) for message in page.features}
    versions = [card for page in pages(stub.ListRateCards) for card in page.rate_cards]
    customers = {message.id: message for page in pages(stub.ListCustomers) for message in page.customers}
    contracts = {message.id: message for page in pages(stub.ListContracts) for message in page.contracts}
    grants = {message.id: message for page in pages(stub.ListGrants) for message in page.grants}
    grants |= {message.id: message for page in pages(stub.ListRecurringGrants) for message in page.grants}
    known: dict[Kind, Collection[str]] = {
        "feature": {*features, *(item.id for item in catalogue.features)},
        "rate card": {*(card.id for card in versions), *(item.id for item in catalogue.rate_cards)},
        "customer": {*customers, *(item.id for item in catalogue.customers)},
    }
    steps = [
        *_steps("feature", catalogue.features, features, stub.PutFeature),
        *_steps("rate card", catalogue.rate_cards, _current(catalogue.rate_cards, versions), stub.PutRateCard),
        *_steps("customer", catalogue.customers, customers, stub.PutCustomer),
        *_steps("contract", catalogue.contracts, contracts, stub.PutContract),
        *_steps("grant", catalogue.grants, grants, stub.CreateGrant),
    ]
    faults = [
        reference.fault(known[reference.kind])
        for reference in catalogue.references.values()
        if reference.value.text() not in known[reference.kind]
    ]
    faults += [
        Fault(step.where, f"the grant {step.id!r} with {step.detail}", "a new id for a new grant: grants never change")
        for step in steps
        if step.kind == "grant" and step.change is Change.CHANGED
    ]
    if faults:
        raise BadFile(catalogue.file, faults)
    return steps


def pages(call: grpc.UnaryUnaryMultiCallable[pb.ListRequest, PageT], customer: str = "") -> Iterator[PageT]:
    """A whole listing, page by page."""
    token = ""
    while True:
        page = call(pb.ListRequest(customer=customer, page_size=PAGE_SIZE, page_token=token), timeout=DEADLINE_S)
        yield page
        token = page.next_page_token
        if not token:
            return


def carry_out(steps: Sequence[Step], file: str, address: str) -> None:
    """Sends what differs, in order. CallFailed names the entry that was refused: what stands before it is applied, and
    the same file goes on from there.
    """
    wanted = [step for step in steps if step.change is not Change.UNCHANGED]
    with show.progress(f"applying {file}", len(wanted)) as advance:
        for step in wanted:
            try:
                step.send()
            except grpc.RpcError as error:
                refusal = describe(error, address, "admin")
                raise CallFailed(f"{file}:{step.where.line}: {step.kind} {step.id}: {refusal}") from None
            advance()


def show_steps(steps: Sequence[Step]) -> None:
    counts = Counter((step.kind, step.change) for step in steps)
    kinds = [kind for kind in KINDS if any((kind, change) in counts for change in Change)]
    changes = list(Change)
    rows = [[kind, *(str(counts[kind, change]) for change in changes)] for kind in kinds]
    show.table(["catalogue", *(f">{change}" for change in changes)], rows)
    changed = [step for step in steps if step.change is Change.CHANGED]
    for step in changed[:LISTED]:
        show.line(f"{step.kind} {step.id}: {step.detail}")
    if len(changed) > LISTED:
        show.line(f"and {len(changed) - LISTED} more changes")


def _steps(
    kind: Kind,
    items: Sequence[Item[Message]],
    existing: Mapping[str, Message],
    put: grpc.UnaryUnaryMultiCallable[Message, Message],
) -> list[Step]:
    steps = []
    for item in items:
        there = existing.get(item.id)
        detail = difference(item.message, there) if there else ""
        change = Change.CREATED if there is None else Change.CHANGED if detail else Change.UNCHANGED
        steps.append(Step(kind, item.id, change, detail, item.where, _call(put, item.message)))
    return steps


def _call(put: grpc.UnaryUnaryMultiCallable[Message, Message], message: Message) -> Callable[[], object]:
    return lambda: put(message, timeout=DEADLINE_S)


def _current(items: Sequence[Item[pb.RateCard]], versions: Sequence[pb.RateCard]) -> dict[str, pb.RateCard]:
    """The version that a card of the file is compared with: the one in force from its effective_at, or the newest."""
    current: dict[str, pb.RateCard] = {}
    wanted = {item.id: item.message for item in items}
    for card in sorted(versions, key=lambda card: int(card.version)):
        message = wanted.get(card.id)
        if message is None:
            continue
        if not message.HasField("effective_at") or message.effective_at == card.effective_at or card.id not in current:
            current[card.id] = card
    return current
