"""A catalogue as code: the messages that a file stands for, each with the line it stands on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar

from entitlement.identity import is_id, is_name, is_value
from entitlement.v1 import ledger_pb2 as pb
from gateway.cli.yaml_source import Alphabet, Fault, Value, Where, suggest

Kind = Literal["feature", "rate card", "customer", "contract", "grant"]
KINDS: Final[tuple[Kind, ...]] = ("feature", "rate card", "customer", "contract", "grant")  # each may name earlier ones

ID: Final = Alphabet(is_id, "an id: 1..128 of A-Z a-z 0-9 . _ ~ @ / + = -")
NAME: Final = Alphabet(is_name, "a name: 1..64 of a-z 0-9 . _ -, a letter first")
DIMENSION: Final = Alphabet(is_value, "1..128 of A-Z a-z 0-9 . _ ~ @ / + -")

FAILURE_ACTIONS: Final = {"terminate": pb.FailurePolicy.TERMINATE, "continue": pb.FailurePolicy.CONTINUE}
DURABILITIES: Final = {
    "redis": pb.Feature.REDIS,
    "receipt": pb.Feature.RECEIPT,
    "receipt+replica": pb.Feature.RECEIPT_REPLICA,
}
FEATURE_KINDS: Final = {"metered": pb.Feature.METERED, "boolean": pb.Feature.BOOLEAN, "static": pb.Feature.STATIC}
STATUSES: Final = {"active": pb.Customer.ACTIVE, "suspended": pb.Customer.SUSPENDED, "closed": pb.Customer.CLOSED}
BILLINGS: Final = {"prepaid": pb.Contract.PREPAID, "arrears": pb.Contract.ARREARS, "trial": pb.Contract.TRIAL}
VIAS: Final = {"direct": pb.TopUp.DIRECT, "webhook": pb.TopUp.WEBHOOK}
MODELS: Final = {
    "per_unit": pb.Rate.PER_UNIT,
    "graduated": pb.Rate.GRADUATED,
    "volume": pb.Rate.VOLUME,
    "package": pb.Rate.PACKAGE,
}
CATEGORIES: Final = {
    "paid": pb.Grant.PAID,
    "promotional": pb.Grant.PROMOTIONAL,
    "trial_credit": pb.Grant.TRIAL_CREDIT,
    "allotment": pb.Grant.ALLOTMENT,
}
RECURRENCES: Final = {
    "never": pb.NEVER,
    "hour": pb.HOUR,
    "day": pb.DAY,
    "week": pb.WEEK,
    "month": pb.MONTH,
    "year": pb.YEAR,
}

Message = TypeVar("Message", pb.Feature, pb.RateCard, pb.Customer, pb.Contract, pb.Grant)


@dataclass(frozen=True)
class Item(Generic[Message]):
    """One message and where the file has it."""

    id: str
    message: Message
    where: Where


@dataclass(frozen=True)
class Reference:
    """A name that something must have."""

    kind: Kind
    value: Value

    def fault(self, known: Collection[str]) -> Fault:
        return self.value.fault(f"the {self.kind} to exist{suggest(self.value.text(), list(known))}")


@dataclass
class Catalogue:
    """A whole file, sound in itself; what its `references` name is here or must exist already."""

    file: str
    features: list[Item[pb.Feature]] = field(default_factory=list)
    rate_cards: list[Item[pb.RateCard]] = field(default_factory=list)
    customers: list[Item[pb.Customer]] = field(default_factory=list)
    contracts: list[Item[pb.Contract]] = field(default_factory=list)
    grants: list[Item[pb.Grant]] = field(default_factory=list)
    references: dict[Where, Reference] = field(default_factory=dict)
