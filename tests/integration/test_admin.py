"""LedgerAdmin through a real channel, on a real ledger and a real hot store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from redis.asyncio import Redis

from entitlement import keys
from entitlement.account import MAX_GRANTS, Billing, Status
from entitlement.catalog import Catalogs
from entitlement.decision import Mode
from entitlement.periods import DAY, HOUR, Recurrence
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS, MAX_PER, MAX_PRICE, MAX_QUANTITY
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.install import ensure
from tests.control_rig import DEADLINE_S, TENANT, USD, Rig, card, eventually, refusal, rig, total

INVALID = grpc.StatusCode.INVALID_ARGUMENT
MISSING = grpc.StatusCode.NOT_FOUND
EXISTS = grpc.StatusCode.ALREADY_EXISTS
NOT_YET = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
async def admin(valkey_url: str, database_dsn: str) -> AsyncIterator[Rig]:
    async with rig(valkey_url, database_dsn) as made:
        yield made


@pytest.fixture
async def shop(admin: Rig) -> Rig:
    """A catalogue, and bob with 10 USD."""
    await admin.catalogue()
    await admin.customer("bob", 10 * USD)
    return admin


Case = tuple[object, ...]


def each(cases: list[Case]) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., Awaitable[None]]]:
    """Runs a test for every case on one and the same rig: what is refused leaves nothing behind."""

    def decorate(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def run(self: object, shop: Rig) -> None:
            for case in cases:
                await test(self, shop, *case)

        return run

    return decorate


async def published(client: Redis) -> Catalogs:
    data = await client.get(keys.CATALOG)
    assert isinstance(data, bytes)
    return Catalogs.decode(data)


def at(ms: int) -> Timestamp:
    time = Timestamp()
    time.FromMilliseconds(ms)
    return time


def event(
    key: str, quantity: int = 1, *, feature: str = "input.tokens", customer: str = "bob", ms: int = 0
) -> gateway_pb2.CheckAndConsumeRequest:
    message = gateway_pb2.CheckAndConsumeRequest(idempotency_key=key, customer=customer)
    message.usage.add(feature=feature, quantity=quantity)
    if ms:
        message.event_time.FromMilliseconds(ms)
    return message


class TestFeatures:
    async def test_put_again_changes_what_may_change(self, admin: Rig) -> None:
        first = await admin.stub.PutFeature(pb.Feature(key="calls", unit="call"))
        assert first == pb.Feature(key="calls", kind=pb.Feature.METERED, unit="call")
        assert await admin.control.catalogs.generation() == 1
        assert await admin.stub.PutFeature(first) == first
        assert await admin.control.catalogs.generation() == 1  # Nothing new.
        shadowed = await admin.stub.PutFeature(pb.Feature(key="calls", unit="request", shadow=True))
        assert (shadowed.unit, shadowed.shadow) == ("request", True)
        await admin.stub.PutFeature(pb.Feature(key="sso", kind=pb.Feature.STATIC, value='{"idp": "any"}'))
        listed = await admin.stub.ListFeatures(pb.ListRequest())
        assert [feature.key for feature in listed.features] == ["calls", "sso"]

    @each(
        [
            (pb.Feature(), "key: is empty"),
            (pb.Feature(key="Tokens"), "key: 'Tokens' has a character outside"),
            (pb.Feature(key="t" * 65), "key: has 65 bytes; expected 1..64"),
            (pb.Feature(key="t", kind=9), "kind: 9 is unknown"),  # type: ignore[arg-type]
            (pb.Feature(key="t", unit="a\nb"), "unit: "),
            (pb.Feature(key="t", value="x"), "value: is what a STATIC feature hands out"),
            (pb.Feature(key="calls", kind=pb.Feature.BOOLEAN), "kind: is METERED and cannot change"),
        ],
    )
    async def test_bad_features_are_refused(self, shop: Rig, feature: pb.Feature, problem: str) -> None:
        await shop.stub.PutFeature(pb.Feature(key="calls"))
        code, text = await refusal(shop.stub.PutFeature(feature))
        assert (code, text[: len(problem)]) == (INVALID, problem)


class TestRateCards:
    async def test_versions_are_immutable_and_the_same_content_is_the_same_version(self, shop: Rig) -> None:
        first = await shop.stub.PutRateCard(card("llm", {"input.tokens": 3 * USD, "output.tokens": 15 * USD}))
        assert (first.version, first.effective_at) == ("1", Timestamp())  # The first is in force since ever.
        second = await shop.stub.PutRateCard(card("llm", {"input.tokens": 4 * USD}))
        assert second.version == "2" and second.effective_at.ToMilliseconds() > 0
        assert await shop.stub.PutRateCard(card("llm", {"input.tokens": 4 * USD})) == second
        again = await shop.stub.PutRateCard(card("llm", {"input.tokens": 3 * USD, "output.tokens": 15 * USD}))
        assert again.version == "3"  # Back to the old price is a new version.
        dated = card("llm", {"input.tokens": 5 * USD})
        dated.effective_at.CopyFrom(at(1_700_000_000_000))
        assert (await shop.stub.PutRateCard(dated)).version == "4"
        assert (await shop.stub.PutRateCard(dated)).version == "4"
        listed = await shop.stub.ListRateCards(pb.ListRequest())
        assert [(item.id, item.version) for item in listed.rate_cards] == [("llm", str(n)) for n in range(1, 5)]

    async def test_dimensions_pick_a_rate(self, shop: Rig) -> None:
        message = card("by-model", {"input.tokens": 1})
        message.rates.add(
            feature="input.tokens", match={"model": "a", "region": "eu"}, tiers=[pb.Tier(price_nanos=MAX_PRICE)]
        )
        stored = await shop.stub.PutRateCard(message)
        assert dict(stored.rates[1].match) == {"model": "a", "region": "eu"}
        assert (stored.rates[1].per, stored.rates[1].model) == (1, pb.Rate.PER_UNIT)

    @each(
        [
            ({"id": ""}, "id: is empty"),
            ({"id": "a b"}, "id: 'a b' has a character outside"),
            ({"version": "7"}, "version: is set by the server"),
            ({"credit_type": ""}, "credit_type: is empty"),
            ({"credit_type": "EUR"}, "credit_type: is 'USD' in every version"),
            ({"effective_at": Timestamp(seconds=-1)}, "effective_at.seconds: -1 is outside"),
            ({"rates": []}, "rates: has 0 rates"),
        ],
    )
    async def test_bad_cards_are_refused(self, shop: Rig, change: dict[str, object], problem: str) -> None:
        good = {"id": "llm", "credit_type": "USD", "rates": card("llm", {"input.tokens": 9}).rates}
        code, text = await refusal(shop.stub.PutRateCard(pb.RateCard(**good | change)))  # type: ignore[arg-type]
        assert (code, text[: len(problem)]) == (INVALID, problem)

    @each(
        [
            ({"feature": "nope"}, "rates[0].feature: feature 'nope' does not exist"),
            ({"feature": "sso"}, "rates[0].feature: 'sso' is not METERED"),
            ({"feature": "N"}, "rates[0].feature: 'N' has a character"),
            ({"per": -1}, "rates[0].per: -1 is outside"),
            ({"per": MAX_PER + 1}, f"rates[0].per: {MAX_PER + 1} is outside"),
            ({"model": pb.Rate.GRADUATED, "tiers": []}, "rates[0].tiers: has 0 tiers; expected 1..20"),
            (
                {"model": pb.Rate.VOLUME, "tiers": [pb.Tier(up_to=5), pb.Tier(up_to=5), pb.Tier()]},
                "rates[0].tiers[1].up_to: 5 is not above 5, where the tier before it ends",
            ),
            (
                {"model": pb.Rate.VOLUME, "tiers": [pb.Tier(up_to=5)]},
                "rates[0].tiers[0].up_to: 5 ends the last tier; expected 0 (no end)",
            ),
            ({"model": pb.Rate.PACKAGE, "tiers": []}, "rates[0].tiers: has 0 tiers; PACKAGE expects 1"),
            ({"model": 12}, "rates[0].model: 12 is unknown"),
            ({"tiers": []}, "rates[0].tiers: has 0 tiers; PER_UNIT expects 1"),
            ({"tiers": [pb.Tier(price_nanos=-1)]}, "rates[0].tiers[0].price_nanos: -1 is outside"),
            ({"tiers": [pb.Tier(price_nanos=MAX_PRICE + 1)]}, "rates[0].tiers[0].price_nanos: "),
            ({"tiers": [pb.Tier(price_nanos=1, up_to=5)]}, "rates[0].tiers[0].up_to: 5 has no meaning"),
            (
                {"tiers": [pb.Tier(price_nanos=1, flat_nanos=5)]},
                "rates[0].tiers[0].flat_nanos: 5 has no meaning",
            ),
            ({"match": {"Model": "a"}}, "rates[0].match key: 'Model' has a character"),
            ({"match": {"model": "a,b"}}, "rates[0].match[model]: 'a,b' has a character"),
        ],
    )
    async def test_bad_rates_are_refused(self, shop: Rig, change: dict[str, object], problem: str) -> None:
        await shop.stub.PutFeature(pb.Feature(key="sso", kind=pb.Feature.STATIC))
        rate = pb.Rate(**{"feature": "input.tokens", "tiers": [pb.Tier(price_nanos=1)]} | change)  # type: ignore[arg-type]
        code, text = await refusal(shop.stub.PutRateCard(pb.RateCard(id="x", credit_type="USD", rates=[rate])))
        assert (code, text[: len(problem)]) == (INVALID, problem)

    async def test_two_rates_with_the_same_match_are_refused(self, shop: Rig) -> None:
        message = card("x", {"input.tokens": 1})
        message.rates.add(feature="input.tokens", tiers=[pb.Tier(price_nanos=2)])
        code, text = await refusal(shop.stub.PutRateCard(message))
        assert (code, text) == (INVALID, "rates[1]: has the feature and match of rates[0]: one rate would never win")


class TestPublishing:
    async def test_a_change_is_in_the_hot_store_when_its_call_returns(self, shop: Rig, valkey_url: str) -> None:
        await shop.stub.PutRateCard(card("llm", {"input.tokens": 7 * USD}))
        async with Redis.from_url(valkey_url) as client:
            catalogs = await published(client)
            assert await client.get(keys.CATALOG_GENERATION) == str(catalogs.generation).encode()
        (snapshot,) = catalogs.tenants
        assert (snapshot.tenant, snapshot.generation) == (TENANT, catalogs.generation)
        assert [feature.key for feature in snapshot.features] == ["input.tokens", "output.tokens"]
        assert [(found.id, found.version) for found in snapshot.rate_cards] == [("llm", 1), ("llm", 2)]
        assert snapshot.rate_cards[1].rates[0].price_nanos == 7 * USD

    @pytest.mark.parametrize("lost", ["both", "older"])
    async def test_a_lost_or_older_catalogue_is_published_again(self, shop: Rig, valkey_url: str, lost: str) -> None:
        generation = await shop.control.catalogs.generation()
        async with Redis.from_url(valkey_url) as client:
            if lost == "both":
                await client.delete(keys.CATALOG, keys.CATALOG_GENERATION)
            else:
                await client.set(keys.CATALOG_GENERATION, generation - 1)

            async def again() -> bool:
                return await client.get(keys.CATALOG_GENERATION) == str(generation).encode()

            await eventually(again)
            assert (await published(client)).generation == generation


class TestCustomers:
    async def test_put_list_and_change(self, admin: Rig) -> None:
        bob = await admin.stub.PutCustomer(pb.Customer(id="bob", name="Bob", subjects=[pb.Subject(id="key-1")]))
        assert bob.status == pb.Customer.ACTIVE
        assert await admin.stub.PutCustomer(bob) == bob
        await admin.stub.PutCustomer(pb.Customer(id="amy", status=pb.Customer.SUSPENDED))
        listed = await admin.stub.ListCustomers(pb.ListRequest())
        assert [customer.id for customer in listed.customers] == ["amy", "bob"]
        assert listed.customers[1] == bob

    async def test_a_suspension_reaches_the_hot_account(self, shop: Rig) -> None:
        assert (await shop.consume("bob", "input.tokens", 1_000)).verdict.name == "ALLOW"
        await shop.stub.PutCustomer(pb.Customer(id="bob", status=pb.Customer.SUSPENDED))
        await shop.account_when("bob", lambda account: account.config.status is Status.SUSPENDED)
        assert (await shop.consume("bob", "input.tokens", 1_000)).reason.name == "CUSTOMER_SUSPENDED"

    @each(
        [
            (pb.Customer(), "id: is empty"),
            (pb.Customer(id="{x}"), "id: '{x}' has a character outside"),
            (pb.Customer(id="a" * 129), "id: has 129 bytes"),
            (pb.Customer(id="a", name="n" * 257), "name: has 257 bytes; expected at most 256"),
            (pb.Customer(id="a", name="\u202eevil"), "name: '\\u202eevil' has a control character"),
            (pb.Customer(id="a", status=8), "status: 8 is unknown"),  # type: ignore[arg-type]
            (pb.Customer(id="a", subjects=[pb.Subject(id="")]), "subjects[0].id: is empty"),
            (pb.Customer(id="a", subjects=[pb.Subject(id="k")] * 2), "subjects: names a subject twice"),
            (
                pb.Customer(id="a", subjects=[pb.Subject(id="k", limit_nanos=-5)]),
                "subjects[0].limit_nanos: -5 is outside 0..9223372036854775807",
            ),
            (
                pb.Customer(id="a", subjects=[pb.Subject(id="k", period=pb.DAY)]),
                "subjects[0].period: is of a limit; set limit_nanos or leave the field out",
            ),
            (
                pb.Customer(id="a", subjects=[pb.Subject(id="k", limit_nanos=5, period=9)]),
                "subjects[0].period: 9 is unknown; expected 0..6",
            ),
        ],
    )
    async def test_bad_customers_are_refused(self, shop: Rig, customer: pb.Customer, problem: str) -> None:
        code, text = await refusal(shop.stub.PutCustomer(customer))
        assert (code, text[: len(problem)]) == (INVALID, problem)


class TestContracts:
    async def test_defaults_are_filled_in(self, shop: Rig) -> None:
        await shop.stub.PutCustomer(pb.Customer(id="amy"))
        contract = await shop.stub.PutContract(pb.Contract(id="c-amy", customer="amy", rate_card="llm"))
        assert (contract.billing, contract.gate_percent) == (pb.Contract.PREPAID, 100)
        assert [threshold.percent for threshold in contract.thresholds] == [80, 90, 100, 150]
        assert (contract.period, contract.anchor) == (pb.MONTH, Timestamp())
        assert contract.failure_policy.action == pb.FailurePolicy.TERMINATE
        assert contract.effective_at.ToMilliseconds() > 0
        arrears = pb.Contract(id="c-amy", customer="amy", rate_card="llm", billing=pb.Contract.ARREARS)
        changed = await shop.stub.PutContract(arrears)
        assert (changed.gate_percent, changed.effective_at) == (150, contract.effective_at)

    async def test_putting_the_same_again_changes_nothing(self, shop: Rig) -> None:
        await shop.account("bob")
        before = await shop.rows("SELECT version, config FROM accounts")
        await shop.stub.PutContract(pb.Contract(id="contract-bob", customer="bob", rate_card="llm"))
        assert await shop.rows("SELECT version, config FROM accounts") == before

    async def test_a_change_reaches_the_hot_account(self, shop: Rig) -> None:
        await shop.consume("bob", "input.tokens", 1_000)
        await shop.settled("bob")
        await shop.stub.PutContract(
            pb.Contract(
                id="contract-bob",
                customer="bob",
                rate_card="llm",
                billing=pb.Contract.ARREARS,
                allowance_nanos=5 * USD,
                entitled_features=["input.tokens"],
                quotas=[pb.QuotaLimit(feature="input.tokens", limit=1_500, soft=False)],
            )
        )
        account = await shop.account_when("bob", lambda account: account.version == 3)
        assert (account.config.billing, account.config.credit_line) == (Billing.ARREARS, 5 * USD)
        assert (account.allowance, account.config.gate_percent) == (15 * USD, 150)
        # A quota counts what its window had used before it was agreed.
        assert account.quotas["input.tokens"].used == 1_000
        assert (await shop.consume("bob", "input.tokens", 501)).reason.name == "USAGE_LIMIT_REACHED"
        assert (await shop.consume("bob", "output.tokens", 1)).reason.name == "NO_ENTITLEMENT"

    async def test_an_account_that_was_missing_is_there_at_once(self, shop: Rig) -> None:
        await shop.stub.PutCustomer(pb.Customer(id="amy"))
        async with asyncio.timeout(DEADLINE_S):
            await ensure(shop.hot, [(TENANT, "amy")])
        assert await shop.hot.live([(TENANT, "amy")]) == [False]
        await shop.customer("amy", 5 * USD)
        assert (await shop.consume("amy", "input.tokens", 1_000)).verdict.name == "ALLOW"

    @each(
        [
            ({"id": ""}, INVALID, "id: is empty"),
            ({"customer": "a b"}, INVALID, "customer: 'a b' has a character"),
            ({"customer": "nobody"}, MISSING, "customer: 'nobody' is unknown"),
            ({"rate_card": "nope"}, INVALID, "rate_card: 'nope' does not exist"),
            ({"id": "second"}, NOT_YET, "effective_at: the contract 'contract-bob' is active then; it has no end"),
            ({"customer": "eve"}, INVALID, "customer: contract 'contract-bob' is another customer's"),
            ({"billing": 7}, INVALID, "billing: 7 is unknown"),
            ({"gate_percent": -1}, INVALID, "gate_percent: -1 is outside 0..1000"),
            ({"gate_percent": 1001}, INVALID, "gate_percent: 1001 is outside"),
            ({"thresholds": [pb.Threshold(percent=0)]}, INVALID, "thresholds[0].percent: 0 is outside 1..1000"),
            ({"thresholds": [pb.Threshold(percent=5)] * 2}, INVALID, "thresholds: names a percent twice"),
            ({"thresholds": [pb.Threshold(percent=5)] * 17}, INVALID, "thresholds: has 17 thresholds"),
            ({"allowance_nanos": 1}, INVALID, "allowance_nanos: is a credit line, for billing ARREARS only"),
            ({"allowance_nanos": -1}, INVALID, "allowance_nanos: -1 is outside"),
            ({"period": 9}, INVALID, "period: 9 is unknown"),
            ({"anchor": Timestamp(seconds=4_000_000_000)}, INVALID, "anchor: lies in the future"),
            (
                {"effective_at": Timestamp(seconds=4_000_000_000)},
                INVALID,
                "effective_at: lies in the future, and the contract is in force",
            ),
            ({"ends_at": Timestamp(seconds=4_000)}, INVALID, "ends_at: is not later than effective_at"),
            ({"seats": -3}, INVALID, "seats: -3 is outside"),
            ({"allowance_per_seat_nanos": -3}, INVALID, "allowance_per_seat_nanos: "),
            ({"minimum_commit_nanos": -3}, INVALID, "minimum_commit_nanos: -3 is outside"),
            ({"overrides": [pb.Rate(feature="input.tokens")]}, INVALID, "overrides[0].tiers: has 0 tiers"),
            (
                {"failure_policy": pb.FailurePolicy(action=pb.FailurePolicy.CONTINUE)},
                INVALID,
                "failure_policy.allowance_nanos: 0 is outside",
            ),
            (
                {"failure_policy": pb.FailurePolicy(allowance_nanos=1)},
                INVALID,
                "failure_policy.allowance_nanos: is for CONTINUE only",
            ),
            ({"entitled_features": ["nope"]}, INVALID, "entitled_features[0]: feature 'nope' does not exist"),
            ({"entitled_features": ["input.tokens"] * 2}, INVALID, "entitled_features: names a feature twice"),
            ({"quotas": [pb.QuotaLimit(feature="nope", limit=1)]}, INVALID, "quotas[0].feature: feature 'nope' does"),
            ({"quotas": [pb.QuotaLimit(feature="input.tokens", limit=-1)]}, INVALID, "quotas[0].limit: -1 is outside"),
            (
                {"quotas": [pb.QuotaLimit(feature="input.tokens", limit=MAX_CUMULATIVE + 1)]},
                INVALID,
                "quotas[0].limit: ",
            ),
            ({"quotas": [pb.QuotaLimit(feature="input.tokens")] * 2}, INVALID, "quotas: names a feature twice"),
        ],
    )
    async def test_what_cannot_be_kept_is_refused(
        self, shop: Rig, change: dict[str, object], code: grpc.StatusCode, problem: str
    ) -> None:
        await shop.stub.PutCustomer(pb.Customer(id="eve"))
        before = await shop.rows("SELECT * FROM contracts")
        terms = {"id": "contract-bob", "customer": "bob", "rate_card": "llm"} | change
        found, text = await refusal(shop.stub.PutContract(pb.Contract(**terms)))  # type: ignore[arg-type]
        assert (found, text[: len(problem)]) == (code, problem)
        assert await shop.rows("SELECT * FROM contracts") == before

    async def test_an_account_keeps_its_credit_type(self, shop: Rig) -> None:
        euros = card("euro", {"input.tokens": 1})
        euros.credit_type = "EUR"
        await shop.stub.PutRateCard(euros)
        code, text = await refusal(
            shop.stub.PutContract(pb.Contract(id="contract-bob", customer="bob", rate_card="euro"))
        )
        assert (code, text) == (NOT_YET, "rate_card: is in 'EUR' and the account in 'USD', which cannot change")

    async def test_another_period_rule_turns_the_page(self, shop: Rig) -> None:
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.stub.PutContract(pb.Contract(id="contract-bob", customer="bob", rate_card="llm", period=pb.HOUR))
        account = await shop.account_when("bob", lambda account: account.config.recurrence is Recurrence.HOUR)
        assert (account.settled, account.period_end - account.period_start) == (0, HOUR)
        await shop.settled("bob")
        assert await shop.value("SELECT period_start FROM accounts") == account.period_start


class TestGrants:
    async def test_a_grant_is_booked_once(self, shop: Rig) -> None:
        grant = pb.Grant(
            id="promo",
            customer="bob",
            amount_nanos=5 * USD,
            category=pb.Grant.PROMOTIONAL,
            priority=-1,
            features=["output.tokens", "input.tokens"],
            expires_at=at(4_000_000_000_000),
            note="welcome",
        )
        created = await shop.stub.CreateGrant(grant)
        assert (created.remaining_nanos, created.category) == (5 * USD, pb.Grant.PROMOTIONAL)
        assert list(created.features) == ["input.tokens", "output.tokens"]
        assert await shop.stub.CreateGrant(grant) == created
        listed = await shop.stub.ListTransactions(pb.ListRequest(customer="bob"))
        booked = listed.transactions[-1]
        assert (booked.kind, booked.idempotency_key, total(booked.entries)) == ("grant", "promo", 0)
        assert [(entry.account, entry.amount_nanos, entry.grant) for entry in booked.entries] == [
            ("grant:promo", 5 * USD, "promo"),
            ("issued:promotional", -5 * USD, ""),
        ]
        assert len(listed.transactions) == 2

    @each(
        [
            ({"amount_nanos": 6},),
            ({"priority": 2},),
            ({"note": "x"},),
            ({"customer": "amy"},),
            ({"features": ["input.tokens"]},),
        ],
    )
    async def test_the_id_of_another_grant_is_refused(self, shop: Rig, change: dict[str, object]) -> None:
        await shop.customer("amy")
        grant = {"id": "g", "customer": "bob", "amount_nanos": 5}
        await shop.stub.CreateGrant(pb.Grant(**grant))  # type: ignore[arg-type]
        code, text = await refusal(shop.stub.CreateGrant(pb.Grant(**grant | change)))  # type: ignore[arg-type]
        assert (code, text) == (EXISTS, "id: 'g' is a grant with other content; nothing was changed")

    @each(
        [
            ({"id": ""}, INVALID, "id: is empty"),
            ({"customer": "nobody"}, MISSING, "customer: 'nobody' is unknown or has no contract yet"),
            ({"amount_nanos": 0}, INVALID, "amount_nanos: 0 is outside 1..9223372036854775807"),
            ({"amount_nanos": -1}, INVALID, "amount_nanos: -1 is outside"),
            ({"amount_nanos": MAX_NANOS}, INVALID, f"amount_nanos: {MAX_NANOS} would bring the account's total over"),
            ({"category": 9}, INVALID, "category: 9 is unknown"),
            ({"features": ["nope"]}, INVALID, "features[0]: feature 'nope' does not exist"),
            ({"recurrence": 17}, INVALID, "recurrence: "),
            ({"rollover_max_nanos": 1}, INVALID, "rollover_max_nanos: is for recurring grants"),
            ({"remaining_nanos": 1}, INVALID, "remaining_nanos: is set by the server"),
            ({"expires_at": at(1_000)}, INVALID, "expires_at: is not later than effective_at"),
            ({"note": "n" * 300}, INVALID, "note: has 300 bytes"),
        ],
    )
    async def test_bad_grants_are_refused(
        self, shop: Rig, change: dict[str, object], code: grpc.StatusCode, problem: str
    ) -> None:
        grant = {"id": "g", "customer": "bob", "amount_nanos": 5} | change
        found, text = await refusal(shop.stub.CreateGrant(pb.Grant(**grant)))  # type: ignore[arg-type]
        assert (found, text[: len(problem)]) == (code, problem)

    async def test_the_total_may_be_the_most_an_int64_holds(self, shop: Rig) -> None:
        most = MAX_NANOS - 10 * USD
        await shop.stub.CreateGrant(pb.Grant(id="most", customer="bob", amount_nanos=most))
        code, _ = await refusal(shop.stub.CreateGrant(pb.Grant(id="one-more", customer="bob", amount_nanos=1)))
        assert code is INVALID
        account = await shop.account("bob")
        assert sum(grant.remaining for grant in account.grants) == MAX_NANOS

    async def test_grants_of_one_account_have_a_bound(self, shop: Rig) -> None:
        await shop.execute(
            """WITH made AS (
                   INSERT INTO grants (tenant, id, customer, amount, category, priority, effective_ms, expires_ms,
                                       features, note, created_ms)
                   SELECT $1, 'many-' || n, 'bob', 1, 1, 0, 0, 0, '{}', '', 0 FROM generate_series(1, $2::int) n
                   RETURNING no)
               INSERT INTO grant_balances SELECT no, 1 FROM made""",
            *(TENANT, MAX_GRANTS - 1),
        )
        code, text = await refusal(shop.stub.CreateGrant(pb.Grant(id="g", customer="bob", amount_nanos=5)))
        assert (code, text) == (NOT_YET, f"customer: has {MAX_GRANTS} grants with something left; expected at most 256")

    async def test_voiding_a_grant_that_was_never_hot_books_it_at_once(self, shop: Rig) -> None:
        voided = await shop.stub.VoidGrant(pb.VoidGrantRequest(id="bob-1", reason="mistake"))
        assert (voided.amount_nanos, voided.remaining_nanos) == (10 * USD, 0)
        assert await shop.stub.VoidGrant(pb.VoidGrantRequest(id="bob-1")) == voided
        kinds = [row["kind"] for row in await shop.rows("SELECT kind FROM transactions ORDER BY id")]
        assert kinds == ["grant", "void"]
        assert (await shop.account("bob")).grants == []

    async def test_voiding_a_hot_grant_books_exactly_what_was_left(self, shop: Rig) -> None:
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.stub.VoidGrant(pb.VoidGrantRequest(id="bob-1"))
        await shop.account_when("bob", lambda account: not account.grants)
        await shop.settled("bob")
        (booked,) = await shop.rows(
            "SELECT e.amount FROM transactions t JOIN entries e ON e.transaction_id = t.id "
            "WHERE kind = 'void' AND account = 'breakage'"
        )
        assert booked["amount"] == 7 * USD
        assert await shop.value("SELECT remaining FROM grant_balances") == 0
        assert await shop.value("SELECT applied FROM accounts") == 3
        assert await shop.rows("SELECT * FROM hot_deltas") == []

    async def test_voiding_an_account_that_is_not_hot_is_booked_by_its_install(self, shop: Rig) -> None:
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.settled("bob")
        await shop.hot.drop((TENANT, "bob"))
        await shop.stub.VoidGrant(pb.VoidGrantRequest(id="bob-1"))
        account = await shop.account("bob")
        assert (account.grants, account.epoch, account.sequence) == ([], 2, 1)
        (booked,) = await shop.rows("SELECT id, idempotency_key FROM transactions WHERE kind = 'void'")
        assert booked["idempotency_key"] == "install:bob:2"
        assert await shop.value("SELECT remaining FROM grant_balances") == 0

    async def test_an_unknown_grant_cannot_be_voided(self, shop: Rig) -> None:
        code, text = await refusal(shop.stub.VoidGrant(pb.VoidGrantRequest(id="nope")))
        assert (code, text) == (MISSING, "id: there is no grant 'nope'")

    async def test_listing_shows_what_is_left(self, shop: Rig) -> None:
        await shop.customer("amy", 1 * USD, 2 * USD)
        await shop.consume("bob", "output.tokens", 100_000)
        await shop.settled("bob")
        listed = await shop.stub.ListGrants(pb.ListRequest())
        assert [(grant.id, grant.remaining_nanos) for grant in listed.grants] == [
            ("bob-1", 8_500_000_000),
            ("amy-1", 1 * USD),
            ("amy-2", 2 * USD),
        ]
        listed = await shop.stub.ListGrants(pb.ListRequest(customer="amy"))
        assert [grant.id for grant in listed.grants] == ["amy-1", "amy-2"]


class TestListing:
    async def test_pages_are_whole_and_in_order(self, shop: Rig) -> None:
        for number in range(7):
            await shop.stub.PutCustomer(pb.Customer(id=f"c{number}"))
        found: list[str] = []
        token, pages = "", 0
        while True:
            page = await shop.stub.ListCustomers(pb.ListRequest(page_size=3, page_token=token))
            found += [customer.id for customer in page.customers]
            token, pages = page.next_page_token, pages + 1
            if not token:
                break
        assert (found, pages) == (["bob", *(f"c{number}" for number in range(7))], 3)

    async def test_transactions_by_customer_and_time(self, shop: Rig) -> None:
        await shop.customer("amy", 1 * USD)
        now_ms = await shop.hot.now_ms()
        for days in range(5):
            event_ms = now_ms - days * DAY - HOUR
            await shop.consume("bob", "input.tokens", 1, key=f"d{days}", event_ms=event_ms, mode=Mode.ADJUST_ONLY)
        await shop.settled("bob")
        request = pb.ListRequest(customer="bob", page_size=2, to=at(now_ms - 2 * DAY))
        getattr(request, "from").CopyFrom(at(now_ms - 4 * DAY))
        page = await shop.stub.ListTransactions(request)
        assert [transaction.idempotency_key for transaction in page.transactions] == ["d2", "d3"]
        assert page.next_page_token == ""
        everyone = await shop.stub.ListTransactions(pb.ListRequest())
        assert [transaction.kind for transaction in everyone.transactions] == ["grant"] * 2 + ["consume"] * 5

    @each(
        [
            (pb.ListRequest(page_size=-1), "page_size: -1 is outside 0..1000"),
            (pb.ListRequest(page_size=1001), "page_size: 1001 is outside"),
            (pb.ListRequest(page_token="!"), "page_token: '!' is not one that this listing gave"),
            (pb.ListRequest(page_token="WyJhIiwgMV0="), "page_token: "),  # A rate card's.
            (pb.ListRequest(customer="bob"), "customer: does not filter this listing"),
            (pb.ListRequest(to=at(5)), "to: does not filter this listing"),
        ],
    )
    async def test_bad_pages_are_refused(self, shop: Rig, request_: pb.ListRequest, problem: str) -> None:
        code, text = await refusal(shop.stub.ListCustomers(request_))
        assert (code, text[: len(problem)]) == (INVALID, problem)


class TestAudit:
    async def test_every_change_leaves_one_line_with_its_actor(self, admin: Rig) -> None:
        await admin.stub.PutFeature(pb.Feature(key="calls"), metadata=(("x-actor", "amy@finance"),))
        await admin.stub.PutFeature(pb.Feature(key="calls"))  # Nothing changed.
        await admin.stub.PutRateCard(card("c", {"calls": 5}))
        await admin.stub.PutCustomer(pb.Customer(id="bob"))
        await admin.stub.PutContract(pb.Contract(id="k", customer="bob", rate_card="c"))
        await admin.stub.CreateGrant(pb.Grant(id="g", customer="bob", amount_nanos=5))
        await admin.stub.VoidGrant(pb.VoidGrantRequest(id="g", reason="test"))
        await refusal(admin.stub.VoidGrant(pb.VoidGrantRequest(id="nope")))
        lines = await admin.rows("SELECT actor, action, subject, outcome FROM audit ORDER BY id")
        assert [tuple(line) for line in lines] == [
            ("amy@finance", "PutFeature", "calls", "done"),
            ("unknown", "PutRateCard", "c", "done"),
            ("unknown", "PutCustomer", "bob", "done"),
            ("unknown", "PutContract", "bob", "done"),
            ("unknown", "CreateGrant", "bob", "done"),
            ("unknown", "VoidGrant", "bob", "done"),
        ]

    async def test_an_actor_cannot_forge_lines(self, admin: Rig) -> None:
        call = admin.stub.PutFeature(pb.Feature(key="calls"), metadata=(("x-actor", "a" * 129),))
        code, text = await refusal(call)
        assert (code, text) == (INVALID, "x-actor: has 129 bytes; expected at most 128")


class TestUsage:
    async def test_usage_is_in_the_ledger_when_the_call_returns(self, shop: Rig) -> None:
        events = [event(f"e{number}", 1_000) for number in range(50)]
        response = await shop.stub.RecordUsage(pb.RecordUsageRequest(events=events))
        assert (response.recorded, response.duplicates, list(response.rejected)) == (50, 0, [])
        assert await shop.value("SELECT count(*) FROM usage_events") == 50
        assert await shop.value("SELECT remaining FROM grant_balances") == 10 * USD - 50 * 3_000_000
        again = await shop.stub.RecordUsage(pb.RecordUsageRequest(events=events))
        assert (again.recorded, again.duplicates) == (0, 50)

    async def test_what_has_happened_is_recorded_beyond_the_balance(self, shop: Rig) -> None:
        response = await shop.stub.RecordUsage(pb.RecordUsageRequest(events=[event("big", 10_000_000)]))
        assert response.recorded == 1
        assert (await shop.account("bob")).overage == 20 * USD

    async def test_the_ledger_remembers_keys_that_the_hot_store_forgot(self, shop: Rig, valkey_url: str) -> None:
        await shop.consume("bob", "input.tokens", 7, key="live")
        await shop.settled("bob")
        async with Redis.from_url(valkey_url) as client:
            for key in await client.keys("i:*"):
                await client.delete(key)
        live = event("live", 7)
        live.mode = gateway_pb2.MODE_NORMAL
        other = event("live", 8)
        response = await shop.stub.RecordUsage(pb.RecordUsageRequest(events=[live, other]))
        assert (response.recorded, response.duplicates) == (0, 1)
        assert [item.error for item in response.rejected] == [
            "idempotency_key: 'live' was used before with another payload (reason IDEMPOTENCY_MISMATCH)"
        ]

    async def test_each_event_has_its_own_fate(self, shop: Rig) -> None:
        now_ms = await shop.hot.now_ms()
        check = event("check")
        check.mode = gateway_pb2.MODE_CHECK_ONLY
        events = [
            event("good"),
            event("good"),
            event("good", 2),
            event(""),
            event("stranger", customer="nobody"),
            event("nothing", 0),
            event("much", MAX_QUANTITY + 1),
            event("unknown", feature="nope"),
            event("old", ms=now_ms - 36 * DAY),
            event("ahead", ms=now_ms + HOUR),
            check,
        ]
        response = await shop.stub.RecordUsage(pb.RecordUsageRequest(events=events))
        assert (response.recorded, response.duplicates) == (1, 1)
        errors = {item.idempotency_key: item.error.partition(";")[0] for item in response.rejected}
        assert errors.pop("old").startswith("event_time: ") and errors.pop("ahead").startswith("event_time: ")
        assert errors == {
            "good": "idempotency_key: 'good' was used before with another payload (reason IDEMPOTENCY_MISMATCH)",
            "": "idempotency_key: is empty",
            "stranger": "CUSTOMER_NOT_FOUND",
            "nothing": "usage[0].quantity: 0 in every line consumes nothing",
            "much": f"usage[0].quantity: {MAX_QUANTITY + 1} is outside 0..{MAX_QUANTITY}",
            "unknown": "FEATURE_NOT_FOUND",
            "check": "mode: CHECK_ONLY records nothing",
        }

    async def test_a_backfill_may_be_old_and_splits_sum_to_the_whole(self, shop: Rig) -> None:
        await shop.stub.PutRateCard(card("odd", {"input.tokens": 1}, per=3))  # A third of a nano.
        await shop.customer("amy", 1_000, rate_card="odd")
        long_ago = await shop.hot.now_ms() - 400 * DAY
        for number in range(10):
            batch = [event(f"b{number}-{n}", 1, customer="amy", ms=long_ago + n) for n in range(3)]
            name = f"import-{number}"
            response = await shop.stub.RecordUsage(pb.RecordUsageRequest(events=batch, backfill_id=name))
            assert response.recorded == 3
            assert (await shop.stub.CloseBackfill(pb.BackfillRequest(id=name))).recorded == 3
            if number % 3 == 0:  # An install in between does not bring old meters along: they are brought back.
                await shop.hot.drop((TENANT, "amy"))
        assert await shop.value("SELECT sum(amount)::bigint FROM usage_events") == 10

    @each(
        [
            (pb.RecordUsageRequest(), "events: 0 is outside 1..1000"),
            (pb.RecordUsageRequest(events=[event("e")] * 1001), "events: 1001 is outside"),
            (pb.RecordUsageRequest(events=[event("e")], backfill_id="a b"), "backfill_id: 'a b' has a character"),
        ],
    )
    async def test_bad_calls_are_refused(self, shop: Rig, request_: pb.RecordUsageRequest, problem: str) -> None:
        code, text = await refusal(shop.stub.RecordUsage(request_))
        assert (code, text[: len(problem)]) == (INVALID, problem)


class TestExplain:
    async def test_one_charge_down_to_the_event(self, shop: Rig) -> None:
        await shop.consume("bob", "input.tokens", 3_000_000, key="k")
        await shop.settled("bob")
        found = await shop.stub.Explain(pb.ExplainRequest(idempotency_key="k"))
        assert (found.event.idempotency_key, found.event.usage[0].quantity) == ("k", 3_000_000)
        assert found.decision.verdict == gateway_pb2.VERDICT_ALLOW
        assert (found.decision.consumed[0].amount_nanos, found.decision.sequence) == (9 * USD, 1)
        assert found.rate == "input.tokens: 3000000 x 3 USD per 1000000 = 9 USD (llm version 1)"
        (booked,) = found.transactions
        assert [(entry.account, entry.amount_nanos) for entry in booked.entries] == [
            ("grant:bob-1", -9 * USD),
            ("revenue:input.tokens", 9 * USD),
        ]
        assert list(found.thresholds_crossed) == [80, 90]

    async def test_an_unknown_key_is_not_found(self, shop: Rig) -> None:
        await shop.consume("bob", "input.tokens", 1, key="k")
        await shop.settled("bob")
        for request in (pb.ExplainRequest(idempotency_key="x"), pb.ExplainRequest(idempotency_key="k", customer="amy")):
            code, _ = await refusal(shop.stub.Explain(request))
            assert code is MISSING
        code, text = await refusal(shop.stub.Explain(pb.ExplainRequest()))
        assert (code, text[:25]) == (INVALID, "idempotency_key: is empty")
