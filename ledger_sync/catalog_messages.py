"""Features and rate cards as messages ↔ values, checked. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from entitlement.catalog import Durability, Feature, Kind, RateCard
from entitlement.errors import InvalidArgument
from entitlement.identity import check_name
from entitlement.quantity import MAX_PRICE, within
from entitlement.rating import Model, Rate, Tier, check_rate
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.translate import check_dimensions, check_known, check_text, to_timestamp

MAX_RATES: Final = 1_000  # of a rate card
MAX_VALUE_BYTES: Final = 1_024  # of a STATIC feature


def checked_feature(message: pb.Feature) -> Feature:
    """The feature in a message; kind METERED when left out."""
    check_name("key", message.key)
    kind = Kind(check_known("kind", message.kind or int(Kind.METERED), tuple(map(int, Kind))))
    check_text("unit", message.unit, 64)
    check_text("value", message.value, MAX_VALUE_BYTES)
    if message.value and kind is not Kind.STATIC:
        raise InvalidArgument("value", f"is what a STATIC feature hands out; this one is {kind.name}")
    durability = Durability(check_known("durability", message.durability, tuple(map(int, Durability))))
    return Feature(message.key, kind, message.unit, message.shadow, message.value, durability)


def checked_rates(card: pb.RateCard) -> tuple[Rate, ...]:
    """The card's rates, in the order given."""
    if not 1 <= len(card.rates) <= MAX_RATES:
        raise InvalidArgument("rates", f"has {len(card.rates)} rates; expected 1..{MAX_RATES}")
    rates = tuple(_checked_rate(f"rates[{index}]", rate) for index, rate in enumerate(card.rates))
    seen: dict[str, int] = {}
    for index, rate in enumerate(rates):
        if (first := seen.setdefault(rate.meter, index)) != index:
            raise InvalidArgument(
                f"rates[{index}]", f"has the feature and match of rates[{first}]: one rate would never win"
            )
    return rates


def _checked_rate(field: str, rate: pb.Rate) -> Rate:
    check_name(f"{field}.feature", rate.feature)
    model = Model(check_known(f"{field}.model", rate.model or int(Model.PER_UNIT), tuple(map(int, Model))))
    tiered = model in (Model.GRADUATED, Model.VOLUME)
    return check_rate(
        field,
        Rate(
            feature=rate.feature,
            price_nanos=0 if tiered else _single_price(f"{field}.tiers", model, rate.tiers),
            per=rate.per or 1,
            match=check_dimensions(f"{field}.match", dict(rate.match)),
            model=model,
            tiers=tuple(Tier(tier.up_to, tier.price_nanos, tier.flat_nanos) for tier in rate.tiers) if tiered else (),
        ),
    )


def _single_price(field: str, model: Model, tiers: Sequence[pb.Tier]) -> int:
    """The price of a model without tiers, which the wire has as a tier without end."""
    if len(tiers) != 1:
        raise InvalidArgument(field, f"has {len(tiers)} tiers; {model.name} expects 1")
    if tiers[0].up_to:
        raise InvalidArgument(
            f"{field}[0].up_to", f"{tiers[0].up_to} has no meaning in {model.name}; expected 0 (no end)"
        )
    if tiers[0].flat_nanos:
        raise InvalidArgument(
            f"{field}[0].flat_nanos", f"{tiers[0].flat_nanos} has no meaning in {model.name}; GRADUATED has flat fees"
        )
    return within(f"{field}[0].price_nanos", tiers[0].price_nanos, 0, MAX_PRICE)


def feature_message(feature: Feature) -> pb.Feature:
    return pb.Feature(
        key=feature.key,
        kind=int(feature.kind),  # type: ignore[arg-type]
        unit=feature.unit,
        shadow=feature.shadow,
        value=feature.value,
        durability=int(feature.durability),  # type: ignore[arg-type]
    )


def card_message(card: RateCard) -> pb.RateCard:
    message = pb.RateCard(
        id=card.id,
        version=str(card.version),
        effective_at=to_timestamp(card.effective_ms),
        credit_type=card.credit_type,
    )
    for rate in card.rates:
        tiers = rate.tiers or (Tier(0, rate.price_nanos),)
        message.rates.add(
            feature=rate.feature,
            match=dict(rate.match),
            model=int(rate.model),
            per=rate.per,
            tiers=[pb.Tier(up_to=t.up_to, price_nanos=t.price_nanos, flat_nanos=t.flat_nanos) for t in tiers],
        )
    return message
