"""The catalogue: which price a call gets, and what happens to it when a price changes."""

from __future__ import annotations

import random

import pytest

from entitlement.catalog import Catalogs, Feature, RateCard, Snapshot
from entitlement.decision import Charge, Consume, Line, Mode, Price, Stale
from entitlement.rating import Rate
from gateway.catalog import MAX_REMEMBERED_CHARGES, MAX_REMEMBERED_PLANS, NO_PLAN, Catalog

NOW = 1_700_000_000_000
TOKENS, IMAGES = Feature("tokens"), Feature("images", shadow=True)


class Clock:
    def __init__(self, now: int = NOW) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def card(version: int, effective_ms: int, price: int, plan: str = "standard", *more: Rate) -> RateCard:
    return RateCard(plan, version, effective_ms, "USD", (Rate("tokens", price), *more))


def snapshot(*cards: RateCard, generation: int = 1) -> Snapshot:
    return Snapshot("default", generation, (TOKENS, IMAGES), cards)


def catalog(*cards: RateCard, clock: Clock | None = None) -> Catalog:
    made = Catalog(clock or Clock())
    made.swap(snapshot(*cards))
    return made


def call(*features: str, event_ms: int = 0, customer: str = "bob", **dimensions: str) -> Consume:
    lines = tuple(Line(feature, 1, tuple(sorted(dimensions.items()))) for feature in features or ("tokens",))
    return Consume("default", customer, "", "k", Mode.NORMAL, event_ms, lines, b"")


def price_of(charge: Charge) -> int:
    return int(charge.prices[0].rate.split(" ")[1])


def test_a_call_is_charged_by_the_version_in_force_now() -> None:
    made = catalog(card(1, 0, 5), card(2, NOW + 1, 6))
    assert made.price(call()) == Charge("standard", 1, 0, NOW + 1, (Price("tokens", "U 5 1"),))


def test_the_most_specific_match_wins_and_names_its_meter() -> None:
    by_model = Rate("tokens", 7, 1, (("model", "m1"),))
    by_both = Rate("tokens", 9, 1_000, (("model", "m1"), ("type", "in")))
    made = catalog(card(1, 0, 5, "standard", by_model, by_both))
    assert made.price(call()).prices == (Price("tokens", "U 5 1"),)
    assert made.price(call(model="m2")).prices == (Price("tokens", "U 5 1"),)
    assert made.price(call(model="m1")).prices == (Price("tokens,model=m1", "U 7 1"),)
    assert made.price(call(model="m1", type="in")).prices == (Price("tokens,model=m1,type=in", "U 9 1000"),)
    assert made.price(call(model="m1", type="out")).prices == (Price("tokens,model=m1", "U 7 1"),)


def test_every_line_has_its_own_price_in_order() -> None:
    made = catalog(card(1, 0, 5, "standard", Rate("images", 40)))
    prices = made.price(call("images", "tokens", "images")).prices
    assert prices == (Price("images", "U 40 1", True), Price("tokens", "U 5 1"), Price("images", "U 40 1", True))


def test_a_feature_without_a_rate_has_no_price() -> None:
    assert catalog(card(1, 0, 5)).price(call("images")).prices == (Price("images", "-", True),)
    only_m1 = RateCard("standard", 1, 0, "USD", (Rate("tokens", 5, 1, (("model", "m1"),)),))
    assert catalog(only_m1).price(call(model="m2")).prices == (Price("tokens", "-"),)


def test_a_feature_that_the_catalogue_does_not_have_is_unknown_even_when_a_rate_names_it() -> None:
    made = catalog(card(1, 0, 5, "standard", Rate("video", 1)))
    assert made.price(call("video")).prices == (Price("video", "!"),)


@pytest.mark.parametrize(("at", "version"), [(99, 0), (100, 1), (199, 1), (200, 2), (299, 2), (300, 3), (10**15, 3)])
def test_the_event_s_time_picks_the_version(at: int, version: int) -> None:
    made = catalog(card(3, 300, 7), card(1, 100, 5), card(2, 200, 6), clock=Clock(10**16))
    assert made.price(call(event_ms=at)).version == version


def test_versions_are_in_force_one_after_the_other() -> None:
    made = catalog(card(1, 100, 5), card(2, 200, 6), card(3, 300, 7))
    windows = [
        (made.price(call(event_ms=at)).from_ms, made.price(call(event_ms=at)).until_ms) for at in (100, 200, 300)
    ]
    assert windows == [(100, 200), (200, 300), (300, 0)]


def test_of_two_versions_with_the_same_start_the_later_version_counts() -> None:
    made = catalog(card(2, 100, 6), card(1, 100, 5), card(3, 300, 7))
    assert made.price(call(event_ms=100)).version == 2
    assert made.price(call(event_ms=100)).until_ms == 300
    assert catalog(card(1, 0, 5), card(2, 0, 6)).price(call()).version == 2


def test_a_backdated_version_ends_where_the_next_one_starts() -> None:
    made = catalog(card(1, 0, 5), card(2, 1_000, 6), card(3, 500, 7))
    assert [made.price(call(event_ms=at)).version for at in (499, 500, 999, 1_000)] == [1, 3, 3, 2]


def test_before_the_first_version_there_is_no_price_until_it_starts() -> None:
    charge = catalog(card(1, NOW + 5, 5)).price(call("tokens", "video"))
    assert charge == Charge("standard", 0, 0, NOW + 5, (Price("tokens", "-"), Price("video", "!")))


def test_without_a_catalogue_a_call_has_no_plan_and_no_feature() -> None:
    assert Catalog(Clock()).price(call()) == Charge(NO_PLAN, 0, 0, 0, (Price("tokens", "!"),))


def test_a_swap_changes_the_price_of_the_next_call() -> None:
    made = catalog(card(1, 0, 5))
    before = made.price(call())
    made.swap(snapshot(card(1, 0, 5), card(2, NOW - 1, 6), generation=2))
    assert (price_of(before), price_of(made.price(call()))) == (5, 6)
    assert made.generation == 2


def test_a_swap_forgets_features_and_cards_that_are_gone() -> None:
    made = catalog(card(1, 0, 5))
    made.price(call())
    made.swap(Snapshot("default", 2))
    assert made.price(call()).prices == (Price("tokens", "!"),)
    assert not made.knows("standard")


def test_a_price_changes_by_itself_when_its_time_comes() -> None:
    clock = Clock()
    made = catalog(card(1, 0, 5), card(2, NOW + 10, 6), clock=clock)
    assert price_of(made.price(call())) == 5
    clock.now += 9
    assert price_of(made.price(call())) == 5
    clock.now += 1
    assert price_of(made.price(call())) == 6


def test_an_old_event_does_not_change_which_price_is_current() -> None:
    made = catalog(card(1, 0, 5), card(2, 1_000, 6))
    assert price_of(made.price(call(event_ms=999))) == 5
    assert price_of(made.price(call())) == 6


def test_an_event_a_little_ahead_is_priced_as_of_now() -> None:
    """As the store decides it: otherwise they would never agree while a price change lies between."""
    made = catalog(card(1, 0, 5), card(2, NOW + 60_000, 6))
    assert made.price(call(event_ms=NOW + 120_000)).version == 1


def test_the_store_s_time_corrects_the_clock() -> None:
    made = catalog(card(1, 0, 5), card(2, NOW + 3_600_000, 6))
    made.learn(call(), Stale("standard", NOW + 3_600_000))
    assert price_of(made.price(call())) == 6
    made.learn(call(), Stale("standard", NOW))
    assert price_of(made.price(call())) == 5


def test_a_customer_s_plan_is_learned_and_guessed_for_the_next_unknown_one() -> None:
    made = catalog(card(1, 0, 5), card(1, 0, 9, "premium"))
    made.learn(call(customer="ann"), Stale("premium", NOW))
    assert made.price(call(customer="ann")).plan == "premium"
    assert made.price(call(customer="new")).plan == "premium"
    made.learn(call(customer="bob"), Stale("standard", NOW))
    assert (made.price(call(customer="ann")).plan, made.price(call(customer="bob")).plan) == ("premium", "standard")


def test_a_plan_that_the_catalogue_does_not_have_is_not_known_and_has_no_price() -> None:
    made = catalog(card(1, 0, 5))
    made.learn(call(), Stale("secret", NOW))
    assert not made.knows("secret")
    assert made.price(call()) == Charge("secret", 0, 0, 0, (Price("tokens", "-"),))


def test_a_charge_is_compiled_once_for_each_shape() -> None:
    made = catalog(card(1, 0, 5))
    assert made.price(call(model="m1")) is made.price(call(model="m1", customer="ann"))
    assert made.price(call(model="m1")) is not made.price(call(model="m2"))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (MAX_REMEMBERED_CHARGES, MAX_REMEMBERED_PLANS) == (20_000, 200_000)
    monkeypatch.setattr("gateway.catalog.MAX_REMEMBERED_CHARGES", 10)
    monkeypatch.setattr("gateway.catalog.MAX_REMEMBERED_PLANS", 10)
    made = catalog(card(1, 0, 5))
    for number in range(100):
        assert price_of(made.price(call(model=f"m{number}"))) == 5
        made.learn(call(customer=f"c{number}"), Stale("standard", NOW))
    version = made._versions["standard"][0]
    assert len(version._charges) <= 10
    assert len(made._plans) <= 10


def test_the_version_in_force_agrees_with_a_search_on_random_cards(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        cards = [card(version, rng.randrange(0, 50), version) for version in range(1, rng.randint(2, 8))]
        rng.shuffle(cards)
        made = catalog(*cards, clock=Clock(10**6))
        for at in range(1, 60):
            reached = [found for found in cards if found.effective_ms <= at]
            expected = max(reached, key=lambda found: (found.effective_ms, found.version), default=None)
            charge = made.price(call(event_ms=at))
            assert charge.version == (expected.version if expected else 0)
            assert charge.from_ms <= at and (charge.until_ms == 0 or at < charge.until_ms)


def test_a_snapshot_survives_its_codec() -> None:
    whole = Catalogs(7, (snapshot(card(1, 0, 5, "standard", Rate("images", 4, 1_000, (("size", "1k"),)))),))
    assert Catalogs.decode(whole.encode()) == whole
