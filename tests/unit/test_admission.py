"""The hot path's rare ways: what is missing is brought, what cannot be is refused, what is too much is told so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from entitlement.catalog import Feature, RateCard, Snapshot
from entitlement.decision import (
    Charge,
    Consume,
    Decision,
    Line,
    Mismatch,
    Mode,
    NotLoaded,
    Outcome,
    OutOfRange,
    OutOfTime,
    Reason,
    Stale,
    Verdict,
)
from entitlement.errors import EntitlementError, IdempotencyMismatch, InvalidArgument, Overloaded, Unavailable
from entitlement.rating import Rate
from gateway.admission import MAX_ATTEMPTS, Admission
from gateway.catalog import Catalog
from gateway.store.protocol import Sight

NOW = 1_700_000_000_000


def allowed(key: str = "k1") -> Decision:
    return Decision(Verdict.ALLOW, Reason.NONE, -1, False, 1, int(key[1:]), "USD", 0, 0, 0, 0, 0, "1", (), (), False)


def call(key: str = "k1", customer: str = "bob") -> Consume:
    return Consume("acme", customer, "", key, Mode.NORMAL, 0, (Line("tokens", 1),), b"")


Answer = Callable[[Consume, Charge], Outcome]


class Store:
    """Answers as it is told, a turn of the loop later."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str]] = []
        self.failing: dict[str, EntitlementError] = {}  # of batches, by key

    async def consume(self, request: Consume, charge: Charge) -> Outcome:
        self.asked.append((request.key, charge.plan))
        await asyncio.sleep(0)
        return self.answer(request, charge)

    async def consume_many(self, calls: Sequence[tuple[Consume, Charge]]) -> list[Outcome | EntitlementError]:
        return [self.failing.get(request.key) or await self.consume(request, charge) for request, charge in calls]

    async def read(self, tenant: str, customer: str) -> Sight:
        raise NotImplementedError

    async def ask_install(self, tenant: str, customer: str) -> None:
        raise NotImplementedError


class Loader:
    """Does what it is told when it is asked to bring something."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.refreshed = 0
        self.on_load: Callable[[], None] = lambda: None
        self.on_refresh: Callable[[], None] = lambda: None

    async def load(self, tenant: str, customer: str) -> None:
        self.loaded.append(customer)
        await asyncio.sleep(0)
        self.on_load()

    async def refresh(self) -> None:
        self.refreshed += 1
        for _ in range(3):
            await asyncio.sleep(0)
        self.on_refresh()


def snapshot(*plans: str) -> Snapshot:
    cards = tuple(RateCard(plan, 1, 0, "USD", (Rate("tokens", 1),)) for plan in plans)
    return Snapshot("acme", 1, (Feature("tokens"),), cards)


def admission(answer: Answer, *plans: str, limit: int = 100) -> tuple[Admission, Store, Loader, Catalog]:
    store, loader, catalog = Store(answer), Loader(), Catalog(lambda: NOW)
    if plans:
        catalog.swap(snapshot(*plans))
    return Admission(store, catalog, loader, NoPolicy(), limit), store, loader, catalog


class NoPolicy:
    async def decide(self, request: Consume, away: Unavailable) -> Decision:
        raise away


async def test_a_decision_is_given_back_after_one_question() -> None:
    made, store, loader, _ = admission(lambda *_: allowed(), "standard")
    assert await made.admit(call()) == allowed()
    assert (store.asked, loader.loaded, loader.refreshed) == ([("k1", "standard")], [], 0)


async def test_an_account_that_is_missing_is_loaded_and_asked_again() -> None:
    made, store, loader, _ = admission(lambda *_: allowed() if loader.loaded else NotLoaded(), "standard")
    assert await made.admit(call()) == allowed()
    assert (len(store.asked), loader.loaded) == (2, ["bob"])


async def test_another_plan_is_learned_and_asked_again() -> None:
    made, store, loader, _ = admission(
        lambda _, charge: allowed() if charge.plan == "premium" else Stale("premium", NOW), "standard", "premium"
    )
    assert await made.admit(call()) == allowed()
    assert [plan for _, plan in store.asked] == ["standard", "premium"]
    await made.admit(call("k2"))
    assert (len(store.asked), loader.refreshed) == (3, 0)


async def test_a_plan_that_is_not_known_is_read_first_and_nobody_is_priced_without_it() -> None:
    """The first calls of a process arrive together, before its catalogue."""

    def answer(_: Consume, charge: Charge) -> Outcome:
        if charge.plan != "standard":
            return Stale("standard", NOW)
        assert charge.prices[0].rate == "U 1 1", "decided without a price"
        return allowed()

    made, _, loader, catalog = admission(answer)
    loader.on_refresh = lambda: catalog.swap(snapshot("standard"))

    async def caller(number: int) -> Decision:
        for _ in range(number):
            await asyncio.sleep(0)
        return await made.admit(call(f"k{number}", f"customer-{number % 3}"))

    answers = await asyncio.gather(*(caller(number) for number in range(20)))
    assert {answer.verdict for answer in answers} == {Verdict.ALLOW}
    assert loader.refreshed >= 1


async def test_a_plan_that_nobody_has_is_decided_on_without_a_price() -> None:
    made, _, loader, _ = admission(
        lambda _, charge: allowed() if charge.plan == "lost" else Stale("lost", NOW), "standard"
    )
    assert await made.admit(call()) == allowed()
    assert loader.refreshed == 1


@pytest.mark.parametrize("outcome", [NotLoaded(), Stale("standard", NOW), Stale("other", NOW)])
async def test_what_never_settles_is_unavailable_after_a_few_questions(outcome: Outcome) -> None:
    made, store, _, _ = admission(lambda *_: outcome, "standard")
    with pytest.raises(Unavailable, match="retry with the same key"):
        await made.admit(call())
    assert len(store.asked) == MAX_ATTEMPTS + 1
    assert made.in_flight == 0


async def test_what_the_store_refuses_is_told_by_field_and_bound() -> None:
    refusals: list[tuple[Outcome, type[Exception], str]] = [
        (Mismatch(), IdempotencyMismatch, r"^idempotency_key: 'k1' .*IDEMPOTENCY_MISMATCH.*nothing was charged"),
        (OutOfTime(NOW), InvalidArgument, rf"^event_time: .*35 days before to 5 minutes after the store's {NOW} ms"),
        (OutOfRange(0), InvalidArgument, r"^usage\[0\]\.quantity: .*9223372036854775807 nanos.*9007199254740991 units"),
    ]
    for outcome, kind, message in refusals:
        made, store, _, _ = admission(lambda *_, outcome=outcome: outcome, "standard")  # type: ignore[misc]
        with pytest.raises(kind, match=message):
            await made.admit(call())
        assert (len(store.asked), made.in_flight) == (1, 0)


async def test_more_than_the_limit_in_flight_is_overload_and_nothing_is_tried() -> None:
    gate = asyncio.Event()
    made, store, _, _ = admission(lambda *_: allowed(), "standard", limit=3)
    original = store.consume

    async def held(request: Consume, charge: Charge) -> Outcome:
        await gate.wait()
        return await original(request, charge)

    store.consume = held  # type: ignore[method-assign]
    flying = [asyncio.create_task(made.admit(call(f"k{number}"))) for number in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="3 calls are in flight, the limit is 3"):
        await made.admit(call("k9"))
    with pytest.raises(Overloaded):
        await made.admit_many([call("k8")])
    assert store.asked == []
    gate.set()
    assert len(await asyncio.gather(*flying)) == 3
    assert made.in_flight == 0
    assert await made.admit(call("k10")) == allowed()


async def test_a_cancelled_call_is_not_in_flight_any_more() -> None:
    made, store, _, _ = admission(lambda *_: allowed(), "standard")
    never = asyncio.Event()

    async def held(request: Consume, charge: Charge) -> Outcome:
        await never.wait()
        return allowed()

    store.consume = held  # type: ignore[method-assign]
    flying = asyncio.create_task(made.admit(call()))
    await asyncio.sleep(0)
    assert made.in_flight == 1
    flying.cancel()
    await asyncio.gather(flying, return_exceptions=True)
    assert made.in_flight == 0


async def test_many_get_their_own_decisions_and_refusals_in_order() -> None:
    outcomes: dict[str, Outcome] = {"k2": Mismatch(), "k3": OutOfRange(0), "k4": NotLoaded()}
    made, _, loader, _ = admission(lambda request, _: outcomes.get(request.key, allowed(request.key)), "standard")
    loader.on_load = lambda: outcomes.pop("k4", None)  # type: ignore[func-returns-value, assignment, return-value]
    found = await made.admit_many([call(f"k{number}") for number in range(1, 6)])
    assert found[0] == allowed("k1") and found[3] == allowed("k4") and found[4] == allowed("k5")
    assert isinstance(found[1], IdempotencyMismatch) and isinstance(found[2], InvalidArgument)
    assert made.in_flight == 0


async def test_of_a_batch_only_what_failed_is_decided_without_the_store() -> None:
    class Lenient:
        async def decide(self, request: Consume, away: Unavailable) -> Decision:
            asked.append((request.key, away))
            return allowed("k9")

    asked: list[tuple[str, Unavailable]] = []
    denied = Decision(
        *(Verdict.DENY, Reason.INSUFFICIENT_CREDITS, 0, False, 1, 2, "USD", 0, 0, 0, 0, 0, "1", (), (), False)
    )
    store, catalog, away = Store(lambda *_: denied), Catalog(lambda: NOW), Unavailable("hot store: TRYAGAIN")
    catalog.swap(snapshot("standard"))
    store.failing = {"k1": away}
    made = Admission(store, catalog, Loader(), Lenient(), 100)
    assert await made.admit_many([call("k1"), call("k2")]) == [allowed("k9"), denied]
    assert asked == [("k1", away)]
