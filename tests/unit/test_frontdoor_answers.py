"""What HTTP is told of every decision, and how descriptors become calls: pure, on a desk whose decisions are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NoReturn

import grpc
import msgspec
import pytest
from google.protobuf.wrappers_pb2 import UInt64Value

from entitlement.account import Account, HotGrant
from entitlement.decision import Charged, Consume, Decision, Mode, QuotaState, Reason, Verdict
from entitlement.errors import (
    CorruptRecord,
    EntitlementError,
    IdempotencyMismatch,
    InvalidArgument,
    Overloaded,
    Unavailable,
)
from entitlement.v1 import gateway_pb2
from gateway.denials import Denials
from gateway.frontdoor import statuses
from gateway.frontdoor.asking import Refused
from gateway.frontdoor.authorization import Attributes, AuthorizationService
from gateway.frontdoor.desk import Answer, Desk
from gateway.frontdoor.mapping import read
from gateway.frontdoor.ratelimit import RateLimitService
from gateway.frontdoor.v3 import external_auth_pb2, http_status_pb2, rls_pb2
from gateway.store.protocol import Sight
from tests.hot_stores import account

NOW_MS = 1_000_000
ALLOWED = Decision(
    *(Verdict.ALLOW, Reason.NONE, -1, False, 1, 2, "USD", 90, 0, 10, 0, 0, "1", (Charged(1, 10),), (), False)
)
MAPPING = """
requests:
  rules: [{match: {path_prefix: /dry}, customer: bob, feature: tokens, shadow: true}, {customer: bob, feature: tokens}]
descriptors:
  defaults: {customer: {descriptor: customer}, feature: {descriptor: feature, default: tokens}}
  rules:
    - {match: {entries: {free: "*"}}, skip: true}
    - {match: {entries: {dry: "*"}}, shadow: true}
    - {match: {domain: api}}
"""
RULES = read(MAPPING.encode())
OK, OVER, UNASKED = 1, 2, 0
Decide = Callable[[Consume], Decision]


class Gateway:
    """Decides as it is told, and remembers what it was asked."""

    def __init__(self, decide: Decide | Decision | EntitlementError) -> None:
        self._decide = decide
        self.asked: list[Consume] = []
        self.account: Account | None = account(HotGrant(1, 5))
        self.denials = Denials()
        self.desk = Desk(self, self, self.denials, "acme", lambda: NOW_MS)  # type: ignore[arg-type]

    async def admit(self, request: Consume) -> Decision:
        self.asked.append(request)
        if isinstance(self._decide, EntitlementError):
            raise self._decide
        return self._decide if isinstance(self._decide, Decision) else self._decide(request)

    async def read(self, tenant: str, customer: str) -> Sight:
        return Sight(self.account, False, NOW_MS)

    async def check(self, path: str = "/x", key: str = "k-1") -> external_auth_pb2.CheckResponse:
        assert RULES.requests is not None
        request = external_auth_pb2.CheckRequest()
        request.attributes.request.http.path = path
        request.attributes.request.http.headers["x-request-id"] = key
        return await AuthorizationService(self.desk, RULES.requests).check(request, None)  # type: ignore[arg-type]

    async def limit(
        self, *descriptors: dict[str, str], domain: str = "api", hits: int = 0
    ) -> rls_pb2.RateLimitResponse:
        assert RULES.descriptors is not None
        request = rls_pb2.RateLimitRequest(domain=domain, hits_addend=hits)
        for entries in descriptors:
            descriptor = request.descriptors.add()
            for key, value in entries.items():
                if key == "hits":
                    descriptor.hits_addend.CopyFrom(UInt64Value(value=int(value)))
                else:
                    descriptor.entries.add(key=key, value=value)
        service = RateLimitService(self.desk, RULES.descriptors, lambda: NOW_MS)
        return await service.should_rate_limit(request, Context())  # type: ignore[arg-type]


class Aborted(Exception):
    pass


class Context:
    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise Aborted(code, details)


def denied(reason: Reason, line: int = 0) -> Decision:
    return msgspec.structs.replace(ALLOWED, verdict=Verdict.DENY, reason=reason, failed_line=line, charged=())


def of(customer: str, **more: str) -> dict[str, str]:
    return {"customer": customer, "request_id": "r-1"} | more


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.name)
async def test_every_reason_has_its_status(reason: Reason) -> None:
    assert statuses.STATUS.keys() == set(Reason) and statuses.MESSAGE.keys() == set(Reason) - {Reason.NONE}
    status = statuses.STATUS[reason]
    money, rate = {Reason.INSUFFICIENT_CREDITS, Reason.ARREARS_GATE}, {Reason.USAGE_LIMIT_REACHED}
    later = {Reason.ACCOUNT_FROZEN, Reason.DEGRADED_DENY}
    assert (status == 402) == (reason in money)
    assert (status == 429) == (reason in rate | {Reason.SUBJECT_LIMIT_REACHED})
    assert (status == 503) == (reason in later)
    assert (status == 200) == (reason is Reason.NONE)
    if reason:
        answer = await Gateway(denied(reason)).check()
        assert (answer.status.code, answer.denied_response.status.code) == (7, status)
        error = json.loads(answer.denied_response.body)["error"]
        assert error == {
            "code": statuses.CODE[status],
            "reason": reason.name,
            "message": statuses.MESSAGE[reason],
            "status": status,
            "feature": "tokens",
        }
        headers = {option.header.key: option.header.value for option in answer.denied_response.headers}
        assert headers["content-type"] == "application/json"
        assert headers.get("retry-after") == ("1" if reason in later else None)
        assert status in http_status_pb2.StatusCode.values()


def test_every_status_that_is_answered_has_a_word() -> None:
    told = {*statuses.STATUS.values(), *(status for status, _ in statuses.ERRORS.values()), 400, 403, 409} - {200}
    assert told <= statuses.CODE.keys()
    assert {name.removeprefix("REASON_") for name in gateway_pb2.Reason.keys()} >= {  # noqa: SIM118 - not a dict
        reason.name for reason in Reason if reason
    }


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (InvalidArgument("usage", "is wrong"), 400, "INVALID_ARGUMENT"),
        (IdempotencyMismatch("k"), 409, "IDEMPOTENCY_MISMATCH"),
        (Overloaded("full"), 503, "OVERLOADED"),
        (Unavailable("away"), 503, "UNAVAILABLE"),
        (CorruptRecord("x"), 500, "CORRUPT_RECORD"),
    ],
)
async def test_an_error_denies_with_its_status(error: EntitlementError, status: int, reason: str) -> None:
    answer = (await Gateway(error).check()).denied_response
    assert (answer.status.code, json.loads(answer.body)["error"]["reason"]) == (status, reason)
    retry = [option.header.value for option in answer.headers if option.header.key == "retry-after"]
    assert retry == (["1"] if status == 503 else [])
    passed = await Gateway(error).check("/dry")
    assert {option.header.key: option.header.value for option in passed.ok_response.headers} == {
        "x-entitlement-shadow": reason
    }


async def test_a_denial_is_noted_as_the_service_notes_it_and_one_in_shadow_is_not() -> None:
    gateway = Gateway(denied(Reason.INSUFFICIENT_CREDITS))
    await gateway.check("/dry")
    assert gateway.denials.take() == []
    await gateway.check()
    assert gateway.denials.take() == [("acme", "bob")]


async def test_what_the_failure_policy_grants_says_so_and_tells_no_balance() -> None:
    degraded = msgspec.structs.replace(ALLOWED, degraded=True, credit_type="", available=0)
    told = {option.header.key: option.header.value for option in (await Gateway(degraded).check()).ok_response.headers}
    assert told == {"x-entitlement-charged-nanos": "10", "x-entitlement-degraded": "true"}


async def test_a_limit_that_never_ends_has_no_time() -> None:
    decision = msgspec.structs.replace(ALLOWED, quotas=(QuotaState("tokens", 7, 5, 0, True),))
    told = {option.header.key: option.header.value for option in (await Gateway(decision).check()).ok_response.headers}
    assert (told["x-ratelimit-limit"], told["x-ratelimit-remaining"]) == ("5", "0")
    assert "x-ratelimit-reset" not in told


async def test_a_limit_that_the_store_does_not_tell_is_denied_all_the_same() -> None:
    gateway = Gateway(denied(Reason.USAGE_LIMIT_REACHED))
    for found in (None, account(HotGrant(1, 5))):
        gateway.account = found
        answer = (await gateway.check()).denied_response
        assert answer.status.code == 429
        assert "retry-after" not in {option.header.key for option in answer.headers}


def test_numbers_of_metadata_are_whole_or_refused() -> None:
    request = external_auth_pb2.CheckRequest()
    fields = request.attributes.metadata_context.filter_metadata["jwt"]
    fields.update({"payload": {"sub": "cust-1", "n": 7, "half": 1.5, "big": 2.0**60, "yes": True, "list": [1]}})
    request.attributes.route_metadata_context.filter_metadata["route"].update({"plan": "pro"})
    facts = Attributes(request.attributes)
    found = {
        name: facts.metadata(("jwt", "payload", name)) for name in ("sub", "n", "half", "big", "yes", "list", "no")
    }
    big = f"{2.0**60!r}"
    assert found == {"sub": "cust-1", "n": "7", "half": "1.5", "big": big, "yes": "true", "list": "", "no": ""}
    assert facts.metadata(("route", "plan")) == "pro"
    assert facts.metadata(("nobody", "plan")) == facts.metadata(("jwt", "sub", "deeper")) == ""
    assert "nobody" not in request.attributes.metadata_context.filter_metadata  # Looking adds nothing.


# Descriptors.


async def test_descriptors_of_one_customer_are_one_call() -> None:
    gateway = Gateway(ALLOWED)
    answer = await gateway.limit(of("bob"), of("bob", feature="images", hits="7"), hits=3)
    (request,) = gateway.asked
    assert [(line.feature, line.quantity) for line in request.lines] == [("tokens", 3), ("images", 7)]
    assert (request.key, request.customer, request.mode) == ("r-1", "bob", Mode.NORMAL)
    assert (answer.overall_code, [status.code for status in answer.statuses]) == (OK, [OK, OK])


async def test_descriptors_of_two_customers_are_two_calls_with_a_key_each() -> None:
    gateway = Gateway(ALLOWED)
    await gateway.limit(of("bob"), of("eve"), of("bob"))
    assert [(each.customer, each.key, len(each.lines)) for each in gateway.asked] == [
        ("bob", "r-1", 2),
        ("eve", "r-1/2", 1),
    ]


async def test_after_a_denial_nobody_else_is_asked() -> None:
    gateway = Gateway(lambda asked: denied(Reason.INSUFFICIENT_CREDITS) if asked.customer == "eve" else ALLOWED)
    answer = await gateway.limit(of("bob"), of("eve"), of("joe"))
    assert [each.customer for each in gateway.asked] == ["bob", "eve"]
    assert (answer.overall_code, [status.code for status in answer.statuses]) == (OVER, [OK, OVER, UNASKED])
    assert json.loads(answer.raw_body)["error"]["reason"] == "INSUFFICIENT_CREDITS"


async def test_the_line_that_failed_is_the_one_that_is_over() -> None:
    answer = await Gateway(denied(Reason.USAGE_LIMIT_REACHED, line=1)).limit(of("bob"), of("bob", feature="images"))
    assert [status.code for status in answer.statuses] == [OK, OVER]


async def test_what_is_missing_is_over_and_nobody_is_asked() -> None:
    gateway = Gateway(ALLOWED)
    answer = await gateway.limit(of("bob"), {"customer": "eve"})
    assert (answer.overall_code, gateway.asked) == (OVER, [])
    message = json.loads(answer.raw_body)["error"]["message"]
    assert message == "key: descriptor entry request_id is missing"


@pytest.mark.parametrize("domain", ["other", ""])
async def test_what_no_rule_matches_is_over(domain: str) -> None:
    answer = await Gateway(ALLOWED).limit(of("bob"), domain=domain)
    assert (answer.overall_code, json.loads(answer.raw_body)["error"]["reason"]) == (OVER, "NO_RULE")


async def test_no_descriptor_is_no_free_request() -> None:
    assert (await Gateway(ALLOWED).limit()).overall_code == OVER


async def test_a_skipped_descriptor_passes_and_one_in_shadow_too() -> None:
    gateway = Gateway(denied(Reason.ARREARS_GATE))
    assert (await gateway.limit({"free": "x"})).overall_code == OK
    assert gateway.asked == []
    answer = await gateway.limit(of("bob", dry="x"))
    assert (answer.overall_code, [status.code for status in answer.statuses]) == (OK, [OK])
    assert ("x-entitlement-shadow", "ARREARS_GATE") in [(h.key, h.value) for h in answer.response_headers_to_add]
    missing = await gateway.limit({"dry": "x", "customer": "bob"})
    assert [(h.key, h.value) for h in missing.response_headers_to_add] == [("x-entitlement-shadow", "MISSING")]


@pytest.mark.parametrize("error", [Unavailable("away"), Overloaded("full")])
async def test_what_nobody_can_decide_is_left_to_envoys_failure_mode(error: EntitlementError) -> None:
    with pytest.raises(Aborted) as aborted:
        await Gateway(error).limit(of("bob"))
    assert aborted.value.args == (grpc.StatusCode.UNAVAILABLE, str(error))
    assert (await Gateway(error).limit(of("bob", dry="x"))).overall_code == OK


@pytest.mark.parametrize("error", [IdempotencyMismatch("k"), InvalidArgument("usage", "is wrong")])
async def test_a_call_that_is_wrong_is_over_and_not_left_to_a_lenient_envoy(error: EntitlementError) -> None:
    assert (await Gateway(error).limit(of("bob"))).overall_code == OVER


async def test_a_quota_is_told_of_its_descriptor() -> None:
    quota = QuotaState("images", 4, 10, NOW_MS + 2_500, False)
    answer = await Gateway(msgspec.structs.replace(ALLOWED, quotas=(quota,))).limit(
        of("bob"), of("bob", feature="images")
    )
    plain, limited = answer.statuses
    assert not plain.HasField("current_limit")
    assert (limited.current_limit.requests_per_unit, limited.limit_remaining) == (10, 6)
    assert limited.duration_until_reset.seconds == 3


async def test_limits_beyond_the_protocol_are_its_largest() -> None:
    quota = QuotaState("tokens", 0, 10**15, 0, False)
    status = (await Gateway(msgspec.structs.replace(ALLOWED, quotas=(quota,))).limit(of("bob"))).statuses[0]
    assert (status.current_limit.requests_per_unit, status.limit_remaining) == (2**32 - 1, 2**32 - 1)


async def test_more_lines_than_a_call_may_have_are_refused_whole() -> None:
    gateway = Gateway(ALLOWED)
    answer = await gateway.limit(*[of("bob") for _ in range(17)])
    assert (answer.overall_code, gateway.asked) == (OVER, [])
    assert "usage: has 17 lines; expected 1..16" in json.loads(answer.raw_body)["error"]["message"]


async def test_an_answer_is_one_value_for_every_door() -> None:
    desk = Gateway(ALLOWED).desk
    refused = await desk.answer(Refused(403, "MISSING", "header x is missing"))
    assert isinstance(refused, Answer) and not refused.passes
    assert refused.headers == (("x-entitlement-reason", "MISSING"), ("x-entitlement-status", "403"))
