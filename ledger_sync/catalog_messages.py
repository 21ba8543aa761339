"""Features and rate cards as messages ↔ values, checked. Pure."""

from __future__ import annotations

from typing import Final

from entitlement.catalog import Feature, Kind, RateCard
from entitlement.errors import InvalidArgument
from entitlement.identity import check_name
from entitlement.quantity import MAX_PER, MAX_PRICE, within
from entitlement.rating import Model, Rate
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.translate import check_dimensions, check_known, check_text, to_timestamp, unsupported

MAX_RATES: Final = 1_000  # of a rate card
MAX_VALUE_BYTES: Final = 1_024  # of a STATIC feature

_MODELS = (pb.Rate.MODEL_UNSPECIFIED, pb.Rate.PER_UNIT, pb.Rate.GRADUATED, pb.Rate.VOLUME, pb.Rate.PACKAGE)


def checked_feature(message: pb.Feature) -> Feature:
    """The feature in a message; kind METERED when left out."""
    check_name("key", message.key)
    kind = Kind(check_known("kind", message.kind or int(Kind.METERED), tuple(map(int, Kind))))
    check_text("unit", message.unit, 64)
    check_text("value", message.value, MAX_VALUE_BYTES)
    if message.value and kind is not Kind.STATIC:
        raise InvalidArgument("value", f"is what a STATIC feature hands out; this one is {kind.name}")
    return Feature(message.key, kind, message.unit, message.shadow, message.value)


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
    if check_known(f"{field}.model", rate.model, _MODELS) > pb.Rate.PER_UNIT:
        raise unsupported(f"{field}.model", pb.Rate.Model.Name(rate.model))
    if len(rate.tiers) != 1:
        raise InvalidArgument(f"{field}.tiers", f"has {len(rate.tiers)} tiers; PER_UNIT expects 1")
    tier = rate.tiers[0]
    if tier.up_to:
        raise InvalidArgument(
            f"{field}.tiers[0].up_to", f"{tier.up_to} has no meaning in PER_UNIT; expected 0 (no end)"
        )
    if tier.flat_nanos:
        raise unsupported(f"{field}.tiers[0].flat_nanos", "a flat price")
    return Rate(
        feature=rate.feature,
        price_nanos=within(f"{field}.tiers[0].price_nanos", tier.price_nanos, 0, MAX_PRICE),
        per=within(f"{field}.per", rate.per or 1, 1, MAX_PER),
        match=check_dimensions(f"{field}.match", dict(rate.match)),
    )


def feature_message(feature: Feature) -> pb.Feature:
    return pb.Feature(
        key=feature.key,
        kind=int(feature.kind),  # type: ignore[arg-type]
        unit=feature.unit,
        shadow=feature.shadow,
        value=feature.value,
    )


def card_message(card: RateCard) -> pb.RateCard:
    message = pb.RateCard(
        id=card.id,
        version=str(card.version),
        effective_at=to_timestamp(card.effective_ms),
        credit_type=card.credit_type,
    )
    for rate in card.rates:
        assert rate.model is Model.PER_UNIT
        message.rates.add(
            feature=rate.feature,
            match=dict(rate.match),
            model=pb.Rate.PER_UNIT,
            per=rate.per,
            tiers=[pb.Tier(price_nanos=rate.price_nanos)],
        )
    return message
