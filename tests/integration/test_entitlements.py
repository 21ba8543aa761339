"""What a customer has or has not, and what a subject under it may use: answered by the same call."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from entitlement.v1 import gateway_pb2 as gw
from entitlement.v1 import ledger_pb2 as pb
from gateway.cli.stack import DevStack
from gateway.client import Client, Reason
from tests.stacks import ALLOW, DEADLINE_S, DENY, Site, consume_request, price_of, until


@pytest.fixture
async def features(at: Site) -> AsyncIterator[Site]:
    put = at.admin.PutFeature
    await put(pb.Feature(key="sso", kind=pb.Feature.BOOLEAN), timeout=DEADLINE_S)
    await put(pb.Feature(key="retention", kind=pb.Feature.STATIC, value='{"days":90}'), timeout=DEADLINE_S)
    yield at


async def customer(at: Site, *entitled: str, grant: int = 10**12) -> str:
    """On the plan, with these features alone; without any: all of them. The gateways know the features."""
    name = await at.customer(grant, contract=pb.Contract(billing=pb.Contract.PREPAID, entitled_features=entitled))

    async def known() -> gw.CheckAndConsumeResponse:
        return await at.ask(consume_request(name, ("sso", 1, ""), mode=gw.MODE_CHECK_ONLY))

    await until(known, lambda answer: answer.reason != gw.REASON_FEATURE_NOT_FOUND, "the catalogue")
    return name


async def test_a_boolean_feature_is_allowed_or_not_and_nothing_is_counted(features: Site) -> None:
    has, has_not = await customer(features, "calls", "sso"), await customer(features, "calls")
    answer = await features.consume(has, ("sso", 1, ""))
    assert (answer.verdict, [(c.feature, c.amount_nanos) for c in answer.consumed]) == (ALLOW, [("sso", 0)])
    denied = await features.consume(has_not, ("sso", 1, ""))
    assert (denied.verdict, denied.reason, denied.failed_feature) == (DENY, gw.REASON_NO_ENTITLEMENT, "sso")
    assert (await features.balance(has)).sequence == 0, "asking leaves nothing in the journal"


async def test_a_static_feature_hands_out_its_value(features: Site) -> None:
    has, has_not = await customer(features, "calls", "retention"), await customer(features, "calls")
    (consumed,) = (await features.consume(has, ("retention", 1, ""))).consumed
    assert (consumed.feature, consumed.value, consumed.amount_nanos) == ("retention", '{"days":90}', 0)
    denied = await features.consume(has_not, ("retention", 1, ""))
    assert denied.verdict == DENY and not denied.consumed


async def test_beside_usage_they_are_part_of_all_or_nothing(features: Site) -> None:
    has, has_not = await customer(features, "calls", "sso"), await customer(features, "calls")
    answer = await features.consume(has, ("calls", 3, ""), ("sso", 1, ""))
    assert (answer.verdict, [c.amount_nanos for c in answer.consumed]) == (ALLOW, [price_of(1, 3), 0])
    denied = await features.consume(has_not, ("calls", 3, ""), ("sso", 1, ""))
    assert (denied.verdict, denied.reason) == (DENY, gw.REASON_NO_ENTITLEMENT)
    assert (await features.balance(has_not)).available_nanos == 10**12
    assert (await features.verified(has)).total_nanos == price_of(1, 3)


async def test_a_value_that_changes_is_handed_out_at_once(features: Site) -> None:
    has = await customer(features)
    changed = pb.Feature(key="retention", kind=pb.Feature.STATIC, value='{"days":365}')
    await features.admin.PutFeature(changed, timeout=DEADLINE_S)

    async def value() -> str:
        return (await features.consume(has, ("retention", 1, ""))).consumed[0].value

    await until(value, lambda found: found == '{"days":365}', "the new value")
    await features.admin.PutFeature(
        pb.Feature(key="retention", kind=pb.Feature.STATIC, value='{"days":90}'), timeout=DEADLINE_S
    )
    await until(value, lambda found: found == '{"days":90}', "the old value again")


async def test_a_subject_is_held_to_its_limit_and_its_customer_goes_on(features: Site, stack: DevStack) -> None:
    name = await customer(features)
    limit = price_of(1, 10)
    subjects = [pb.Subject(id="key-1", limit_nanos=limit, period=pb.DAY), pb.Subject(id="key-2")]
    await features.admin.PutCustomer(pb.Customer(id=name, subjects=subjects), timeout=DEADLINE_S)
    async with Client(stack.gateway) as client:

        async def limited() -> bool:
            return (await client.balance(name, subject="key-1")).subject is not None

        await until(limited, bool, "the limit")
        assert (await client.check_and_consume(name, "calls", 10, subject="key-1")).allowed
        denied = await client.check_and_consume(name, "calls", 1, subject="key-1")
        assert (denied.allowed, denied.reason) == (False, Reason.SUBJECT_LIMIT_REACHED)
        assert (await client.check_and_consume(name, "calls", 10, subject="key-2")).allowed
        found = (await client.balance(name, subject="key-1")).subject
        assert found is not None and (found.used_nanos, found.limit_nanos) == (limit, limit)
        assert (await client.balance(name, subject="key-2")).subject is None
        raised = [pb.Subject(id="key-1", limit_nanos=2 * limit, period=pb.DAY)]
        await features.admin.PutCustomer(pb.Customer(id=name, subjects=raised), timeout=DEADLINE_S)

        async def raised_limit() -> int:
            found = (await client.balance(name, subject="key-1")).subject
            return found.limit_nanos if found else 0

        await until(raised_limit, lambda found: found == 2 * limit, "the raised limit")
        found = (await client.balance(name, subject="key-1")).subject
        assert found is not None and found.used_nanos == limit
        assert (await client.check_and_consume(name, "calls", 1, subject="key-1")).allowed


async def test_a_limit_that_comes_later_counts_what_its_window_has_used(features: Site) -> None:
    name = await customer(features)
    request = consume_request(name, ("calls", 8, ""))
    request.subject = "late"
    used = sum(c.amount_nanos for c in (await features.ask(request)).consumed)
    await features.verified(name)
    subject = pb.Subject(id="late", limit_nanos=used + 1, period=pb.MONTH)
    await features.admin.PutCustomer(pb.Customer(id=name, subjects=[subject]), timeout=DEADLINE_S)

    async def limit() -> gw.SubjectLimit:
        asked = gw.GetBalanceRequest(customer=name, subject="late")
        return (await features.gateway.GetBalance(asked, timeout=DEADLINE_S)).balance.subject

    found = await until(limit, lambda found: found.limit_nanos == used + 1, "the limit")
    assert found.used_nanos == used
    again = consume_request(name, ("calls", 1, ""))
    again.subject = "late"
    assert (await features.ask(again)).reason == gw.REASON_SUBJECT_LIMIT_REACHED
