"""The catalogue: features and the versions of rate cards, as one immutable snapshot that both processes read alike."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from entitlement.rating import Rate


class Kind(IntEnum):
    """What a feature is. Numbers as in ledger.proto."""

    METERED = 1
    BOOLEAN = 2
    STATIC = 3


class Durability(IntEnum):
    """What a grant rests on before it is acknowledged. Numbers as in ledger.proto; ascending."""

    UNSPECIFIED = 0  # as the gateway is set
    REDIS = 1  # the hot store alone: what its failover loses is lost
    RECEIPT = 2  # the gateway's own disk as well
    RECEIPT_REPLICA = 3  # and the memory of a replica


class Feature(msgspec.Struct, frozen=True):
    key: str
    kind: Kind = Kind.METERED
    unit: str = ""
    shadow: bool = False  # decide and record, never deny
    value: str = ""
    durability: Durability = Durability.UNSPECIFIED


class RateCard(msgspec.Struct, frozen=True):
    """One immutable version of a rate card, in force from `effective_ms` until a later version's."""

    id: str
    version: int
    effective_ms: int
    credit_type: str
    rates: tuple[Rate, ...]


class Policy(msgspec.Struct, frozen=True):
    """A customer who may go on while the hot store is away: on which plan, for what, up to how many nanos a gateway."""

    customer: str
    plan: str
    allowance: int
    entitled: tuple[str, ...] = ()  # empty: every feature


class Snapshot(msgspec.Struct, frozen=True):
    """One tenant's whole catalogue. `generation` counts up with every change."""

    tenant: str
    generation: int
    features: tuple[Feature, ...] = ()
    rate_cards: tuple[RateCard, ...] = ()
    policies: tuple[Policy, ...] = ()  # by customer


class Catalogs(msgspec.Struct, frozen=True):
    """Every tenant's snapshot, as published in the hot store."""

    generation: int
    tenants: tuple[Snapshot, ...] = ()

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Catalogs:
        return msgspec.json.decode(data, type=cls)
