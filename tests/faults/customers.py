"""Who the load speaks for: the catalogue, the customers, and what each of them has."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Final

import grpc
import msgspec

from entitlement.rating import Model, Rate, Tier
from entitlement.v1 import ledger_pb2
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from tests.stacks import CHANNEL, DEADLINE_S, card

PLAN: Final = "faults"
CALLS, TOKENS = "calls", "tokens"
PRICE: Final = 1_000_003  # of a call, nanos
TIERS: Final = ((1_000, 7_000_001), (10_000, 5_000_003), (0, 3_000_000))  # of tokens: up to, price for each 1,000
PER: Final = 1_000
RATES: Final = (
    Rate(CALLS, PRICE),
    Rate(TOKENS, 0, PER, model=Model.GRADUATED, tiers=tuple(Tier(up_to, price) for up_to, price in TIERS)),
)
PLENTY: Final = PRICE * 10**7
LITTLE: Final = PRICE * 150 + 7
QUOTA: Final = 120  # calls a month
CREDIT_LINE: Final = PRICE * 200  # of a customer in arrears, whose gate lies at 150 %


class Customer(msgspec.Struct, frozen=True):
    """`most_nanos`: what it can be charged while nothing is lost; `most_units`: the quota, 0 = none."""

    id: str
    feature: str
    granted: int
    most_nanos: int
    most_units: int = 0
    weight: int = 1  # of the load
    rolls: bool = False  # its period ends in the middle of the run


def put_catalogue(admin: str) -> None:
    with grpc.insecure_channel(admin, options=CHANNEL) as channel:
        stub = LedgerAdminStub(channel)
        for key in (CALLS, TOKENS):
            stub.PutFeature(ledger_pb2.Feature(key=key, kind=ledger_pb2.Feature.METERED), timeout=DEADLINE_S)
        stub.PutRateCard(card(PLAN, *RATES), timeout=DEADLINE_S)


def put_customers(admin: str, random: Random, rich: int = 10) -> list[Customer]:
    """Two hot ones, `rich` with plenty, one with tiers, two that run out, one in arrears, one with a quota."""
    with grpc.insecure_channel(admin, options=CHANNEL) as channel:
        stub = LedgerAdminStub(channel)
        made = [_put(stub, random, CALLS, PLENTY, weight=6) for _ in range(2)]
        made += [_put(stub, random, CALLS, PLENTY) for _ in range(rich)]
        made += [_put(stub, random, TOKENS, PLENTY, weight=2)]
        made += [_put(stub, random, CALLS, LITTLE) for _ in range(2)]
        quota = ledger_pb2.QuotaLimit(feature=CALLS, limit=QUOTA, period=ledger_pb2.MONTH)
        made += [_put(stub, random, CALLS, PLENTY, ledger_pb2.Contract(quotas=[quota]), most_units=QUOTA)]
        arrears = ledger_pb2.Contract(
            billing=ledger_pb2.Contract.ARREARS, allowance_nanos=CREDIT_LINE, gate_percent=150
        )
        made += [_put(stub, random, CALLS, 0, arrears, most_nanos=CREDIT_LINE * 3 // 2)]
    return made


def put_many(admin: str, random: Random, count: int) -> list[Customer]:
    """So many more with plenty."""
    with grpc.insecure_channel(admin, options=CHANNEL) as channel, ThreadPoolExecutor(16) as pool:
        stub = LedgerAdminStub(channel)
        draws = [Random(random.getrandbits(64)) for _ in range(count)]
        return list(pool.map(lambda draw: _put(stub, draw, CALLS, PLENTY), draws))


def _put(
    stub: LedgerAdminStub,
    random: Random,
    feature: str,
    granted: int,
    contract: ledger_pb2.Contract | None = None,
    *,
    weight: int = 1,
    most_nanos: int = 0,
    most_units: int = 0,
) -> Customer:
    name = f"c-{uuid.UUID(int=random.getrandbits(128)).hex[:12]}"
    message = ledger_pb2.Contract(id=f"{name}-c", customer=name, rate_card=PLAN)
    message.MergeFrom(contract or ledger_pb2.Contract(billing=ledger_pb2.Contract.PREPAID))
    stub.PutCustomer(ledger_pb2.Customer(id=name), timeout=DEADLINE_S)
    stub.PutContract(message, timeout=DEADLINE_S)
    if granted:
        grant = ledger_pb2.Grant(id=f"{name}-g", customer=name, amount_nanos=granted)
        stub.CreateGrant(grant, timeout=DEADLINE_S)
    return Customer(name, feature, granted, most_nanos or granted, most_units, weight)


def price_of(feature: str, units: int) -> int:
    """Nanos of that many units from the first one on, by the published price: rounded once, half to even."""
    if feature == CALLS:
        return units * PRICE
    total, below = 0, 0
    for up_to, price in TIERS:
        within = max(0, (min(units, up_to) if up_to else units) - below)
        total += within * price
        below = up_to
    whole, rest = divmod(total, PER)
    return whole + (rest * 2 > PER or (rest * 2 == PER and whole % 2 == 1))
