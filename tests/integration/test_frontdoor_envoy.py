"""A real Envoy in front of a real upstream asks the gateway, on both of its transports: what passes is charged to the
nano, and what does not has the status that its reason has.
"""

from __future__ import annotations

import http.client
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import grpc
import pytest

from entitlement.account import HotGrant, Quota, Status, SubjectLimit
from entitlement.periods import Recurrence
from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.frontdoor_envoy import MAPPING, FrontEnvoy, Upstream, front, put
from tests.gateway_process import CREDIT, GatewayProcess, installed, prepare
from tests.gateway_rig import CHANNEL
from tests.hot_stores import IMAGES, account
from tests.servers import DEADLINE_S, ValkeyProcess
from tests.stacks import TRANSPORTS

AVAILABLE, CHARGED = "x-entitlement-available-nanos", "x-entitlement-charged-nanos"


@pytest.fixture(scope="module", params=TRANSPORTS)
def gateway(
    request: pytest.FixtureRequest, valkey_server: ValkeyProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    installed("envoy")
    prepare(valkey_server.url)
    file = tmp_path_factory.mktemp("front") / "mapping.yaml"
    file.write_text(MAPPING)
    with GatewayProcess(request.param, valkey_server.url, frontdoor=file) as process:
        yield process


@pytest.fixture(scope="module")
def doors(gateway: GatewayProcess) -> Iterator[tuple[FrontEnvoy, Upstream]]:
    with front(gateway.address) as made:
        yield made


@pytest.fixture
def proxy(doors: tuple[FrontEnvoy, Upstream]) -> FrontEnvoy:
    return doors[0]


@pytest.fixture
def upstream(doors: tuple[FrontEnvoy, Upstream]) -> Upstream:
    return doors[1]


Customer = Callable[..., str]


@pytest.fixture
def customer(valkey_server: ValkeyProcess) -> Customer:
    """Makes one with so many nanos."""

    def make(nanos: int = CREDIT, **more: object) -> str:
        name = f"cust-{uuid.uuid4().hex[:12]}"
        put(valkey_server.url, account(*([HotGrant(1, nanos)] if nanos else []), **more), name)
        return name

    return make


@pytest.fixture
def balance(gateway: GatewayProcess) -> Iterator[Callable[[str], int]]:
    with grpc.insecure_channel(gateway.address, options=CHANNEL) as channel:
        stub = EntitlementGatewayStub(channel)

        def available(customer: str) -> int:
            return stub.GetBalance(pb.GetBalanceRequest(customer=customer), timeout=DEADLINE_S).balance.available_nanos

        yield available


Balance = Callable[[str], int]


def test_what_passes_is_charged_and_told_on_both_sides(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(1_000)
    answer = proxy.get("/v1/chat?x=1", x_customer=who)
    assert answer.status == 200
    assert balance(who) == 999
    for told in (answer.headers, answer.upstream):
        assert (told[AVAILABLE], told[CHARGED], told["x-entitlement-credit-type"]) == ("999", "1", "USD")


def test_the_cost_and_the_dimensions_come_from_headers(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(1_000)
    answer = proxy.get("/v1/chat", "POST", x_customer=who, x_cost="25", x_model="m3")
    assert answer.headers[CHARGED] == "75"
    assert balance(who) == 925


def test_the_feature_and_cost_come_from_the_route(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(10_000)
    assert proxy.get("/route/x", x_customer=who).headers[CHARGED] == "3000"
    assert balance(who) == 7_000


def test_what_a_client_makes_up_does_not_reach_the_upstream(proxy: FrontEnvoy, customer: Customer) -> None:
    made_up = {"x_entitlement_available_nanos": "9", "x_entitlement_shadow": "x", "x_entitlement_reason": "y"}
    told = proxy.get("/v1/chat", x_customer=customer(1_000), **made_up).upstream
    assert told[AVAILABLE] == "999"
    assert "x-entitlement-shadow" not in told and "x-entitlement-reason" not in told
    assert not [name for name in proxy.get("/healthz", **made_up).upstream if name.startswith("x-entitlement")]


def test_no_credit_is_402_with_a_body(
    proxy: FrontEnvoy, upstream: Upstream, customer: Customer, balance: Balance
) -> None:
    who, before = customer(10), upstream.requests
    answer = proxy.get("/v1/chat", x_customer=who, x_cost="11")
    assert answer.status == 402
    assert answer.headers["content-type"] == "application/json"
    assert answer.error == {
        "code": "payment_required",
        "reason": "INSUFFICIENT_CREDITS",
        "message": "the credit does not cover this request",
        "status": 402,
        "feature": "tokens",
    }
    assert (answer.headers["x-entitlement-reason"], answer.headers[AVAILABLE]) == ("INSUFFICIENT_CREDITS", "10")
    assert "retry-after" not in answer.headers
    assert (upstream.requests, balance(who)) == (before, 10)
    assert proxy.get("/v1/chat", x_customer=who, x_cost="10").status == 200


@pytest.mark.parametrize(
    ("more", "headers", "status", "reason"),
    [
        ({"status": Status.SUSPENDED}, {}, 403, "CUSTOMER_SUSPENDED"),
        ({"entitled": ("images",)}, {}, 403, "NO_ENTITLEMENT"),
        ({}, {"x_feature": "nope"}, 403, "FEATURE_NOT_FOUND"),
        ({}, {"x_feature": "unpriced"}, 403, "PRICE_UNKNOWN"),
    ],
)
def test_what_is_not_sold_is_403(
    proxy: FrontEnvoy, customer: Customer, more: dict, headers: dict, status: int, reason: str
) -> None:
    answer = proxy.get("/what", x_customer=customer(**more), **({"x_feature": "tokens"} | headers))
    assert (answer.status, answer.error["reason"]) == (status, reason)


def test_a_quota_is_told_and_429_when_it_is_used_up(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(10**6, quotas=[Quota(IMAGES, 3, False, Recurrence.DAY)])
    answer = proxy.get("/images", x_customer=who, x_cost="2")
    assert (answer.headers["x-ratelimit-limit"], answer.headers["x-ratelimit-remaining"]) == ("3", "1")
    answer = proxy.get("/images", x_customer=who, x_cost="2")
    assert (answer.status, answer.error["reason"]) == (429, "USAGE_LIMIT_REACHED")
    assert answer.headers["x-ratelimit-remaining"] == "1"
    assert 0 < int(answer.headers["retry-after"]) <= 86_400
    assert answer.headers["x-ratelimit-reset"] == answer.headers["retry-after"]
    assert balance(who) == 10**6 - 2_000


def test_a_subjects_limit_is_429(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(subjects=[SubjectLimit("key-1", 5, Recurrence.DAY)])
    assert proxy.get("/v1", x_customer=who, x_subject="key-1", x_cost="4").status == 200
    answer = proxy.get("/v1", x_customer=who, x_subject="key-1", x_cost="4")
    assert (answer.status, answer.error["reason"]) == (429, "SUBJECT_LIMIT_REACHED")
    assert (answer.headers["x-ratelimit-limit"], answer.headers["x-ratelimit-remaining"]) == ("5", "1")
    assert 0 < int(answer.headers["retry-after"]) <= 86_400
    assert proxy.get("/v1", x_customer=who, x_subject="key-2", x_cost="4").status == 200
    assert balance(who) == CREDIT - 8


def test_a_missing_header_is_never_a_free_request(proxy: FrontEnvoy, upstream: Upstream) -> None:
    before = upstream.requests
    answer = proxy.get("/v1/chat")
    assert (answer.status, answer.error["reason"]) == (403, "MISSING")
    assert answer.error["message"] == "customer: header x-customer is missing"
    assert upstream.requests == before


def test_a_header_that_is_there_twice_names_nobody(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who, other = customer(10), customer(10)
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=DEADLINE_S)
    try:
        connection.putrequest("GET", "/v1")
        for name in (who, other):
            connection.putheader("x-customer", name)
        connection.endheaders()
        assert connection.getresponse().status == 400
    finally:
        connection.close()
    assert (balance(who), balance(other)) == (10, 10)


def test_a_missing_header_passes_where_the_mapping_says_so(
    proxy: FrontEnvoy, customer: Customer, balance: Balance
) -> None:
    assert proxy.get("/open").status == 200
    who = customer(10)
    assert proxy.get("/open", x_customer=who).status == 200
    assert balance(who) == 9


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({"x_cost": "1e3"}, "quantity: header x-cost: '1e3' is not a plain decimal integer"),
        ({"x_cost": "0"}, "quantity: header x-cost: 0 is outside 1..1000000000000000"),
        ({"x_cost": "-5"}, "quantity: header x-cost: -5 is outside 0..1000000000000000"),
        ({"x_customer": "a b"}, "customer: header x-customer: 'a b' has a character outside"),
        ({"x_model": "a|b"}, "dimensions[model]: header x-model: 'a|b' has a character outside"),
    ],
)
def test_a_bad_value_is_400_and_named(proxy: FrontEnvoy, customer: Customer, headers: dict, problem: str) -> None:
    answer = proxy.get("/v1/chat", **({"x_customer": customer()} | headers))
    assert (answer.status, answer.error["reason"]) == (400, "INVALID_ARGUMENT")
    assert str(answer.error["message"]).startswith(problem)


@pytest.mark.parametrize("path", ["//v1/chat", "/healthz/../v1/chat", "/healthz/%2e%2e/v1/chat", "/healthz%2f..%2fv1"])
def test_a_path_that_can_be_read_in_two_ways_is_refused(proxy: FrontEnvoy, customer: Customer, path: str) -> None:
    answer = proxy.get(path, x_customer=customer())
    assert (answer.status, answer.error["reason"]) == (400, "AMBIGUOUS_PATH")


def test_an_escaped_letter_is_the_letter(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(10)
    assert proxy.get("/%761/chat", x_customer=who).status == 200
    assert balance(who) == 9


def test_what_no_rule_matches_is_denied(proxy: FrontEnvoy, customer: Customer) -> None:
    answer = proxy.get("/v10/chat", x_customer=customer())
    assert (answer.status, answer.error["reason"]) == (403, "NO_RULE")


def test_a_skipped_path_asks_nobody(proxy: FrontEnvoy) -> None:
    assert proxy.get("/healthz").status == 200


def test_shadow_never_denies_and_says_what_it_would_have_done(
    proxy: FrontEnvoy, customer: Customer, balance: Balance
) -> None:
    who = customer(10)
    answer = proxy.get("/shadow", x_customer=who, x_cost="11")
    assert (answer.status, answer.headers["x-entitlement-shadow"]) == (200, "INSUFFICIENT_CREDITS")
    assert answer.upstream["x-entitlement-shadow"] == "INSUFFICIENT_CREDITS"
    assert balance(who) == 10
    assert proxy.get("/shadow").headers["x-entitlement-shadow"] == "MISSING"
    answer = proxy.get("/shadow", x_customer=who, x_cost="3")
    assert (answer.headers["x-entitlement-shadow"], balance(who)) == (None, 7)


def test_a_check_decides_and_charges_nothing(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(10)
    answer = proxy.get("/look", x_customer=who, x_cost="10")
    assert (answer.status, answer.headers[CHARGED], answer.headers[AVAILABLE]) == (200, None, "10")
    assert proxy.get("/look", x_customer=who, x_cost="11").status == 402
    assert balance(who) == 10


def test_a_request_that_comes_again_is_charged_once(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who, key = customer(10), uuid.uuid4().hex
    first = proxy.get("/v1", x_customer=who, x_request_id=key)
    again = proxy.get("/v1", x_customer=who, x_request_id=key)
    assert (first.headers["x-entitlement-replayed"], again.headers["x-entitlement-replayed"]) == (None, "true")
    assert (again.status, balance(who)) == (200, 9)
    other = proxy.get("/v1", x_customer=who, x_request_id=key, x_cost="2")
    assert (other.status, other.error["reason"]) == (409, "IDEMPOTENCY_MISMATCH")


def test_a_key_passes_once_where_the_mapping_says_so(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who, key = customer(10), uuid.uuid4().hex
    assert proxy.get("/once", x_customer=who, x_key=key).status == 200
    again = proxy.get("/once", x_customer=who, x_key=key)
    assert (again.status, again.error["reason"]) == (409, "REPLAYED")
    assert balance(who) == 9


def test_envoy_makes_a_key_where_the_client_has_none(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(10)
    keys = {proxy.get("/v1", x_customer=who).upstream["x-request-id"] for _ in range(3)}
    assert (len(keys), balance(who)) == (3, 7)


# The ratelimit filter.


def test_hits_are_the_quantity(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(100)
    answer = proxy.get("/limited", x_customer=who, x_cost="7")
    assert (answer.status, answer.headers[CHARGED], answer.headers[AVAILABLE]) == (200, "7", "93")
    assert balance(who) == 93


def test_descriptors_of_one_customer_are_one_call(proxy: FrontEnvoy, customer: Customer, balance: Balance) -> None:
    who = customer(3_000)
    answer = proxy.get("/limited", x_customer=who, x_cost="7", x_what="images")  # and two images, at 1,000
    assert (answer.status, answer.headers[CHARGED]) == (200, "2007")
    answer = proxy.get("/limited", x_customer=who, x_cost="7", x_what="images")
    assert (answer.status, answer.error["reason"]) == (429, "INSUFFICIENT_CREDITS")
    assert (answer.headers["x-entitlement-status"], answer.error["feature"]) == ("402", IMAGES)
    assert balance(who) == 993


def test_over_the_limit_is_429_with_its_headers(proxy: FrontEnvoy, customer: Customer) -> None:
    who = customer(quotas=[Quota("tokens", 5, False, Recurrence.DAY)])
    answer = proxy.get("/limited", x_customer=who, x_cost="3")
    assert (answer.headers["x-ratelimit-limit"], answer.headers["x-ratelimit-remaining"]) == ("5", "2")
    answer = proxy.get("/limited", x_customer=who, x_cost="3")
    assert (answer.status, answer.error["reason"]) == (429, "USAGE_LIMIT_REACHED")
    assert answer.headers["x-ratelimit-remaining"] == "2" and int(answer.headers["x-ratelimit-reset"]) > 0
    assert answer.headers["content-type"] == "application/json"


def test_what_envoy_cannot_describe_it_does_not_ask_about(
    proxy: FrontEnvoy, customer: Customer, balance: Balance
) -> None:
    """The page on front doors warns of it: no mapping can help here, and ext_authz has no such gap."""
    who = customer(10)
    for headers in ({"x_cost": "1"}, {"x_customer": who}, {"x_customer": who, "x_cost": "many"}):
        answer = proxy.get("/limited", **headers)
        assert (answer.status, answer.headers[CHARGED]) == (200, None), headers
    assert balance(who) == 10


def test_what_was_used_is_charged_when_the_answer_has_ended(
    proxy: FrontEnvoy, customer: Customer, balance: Balance
) -> None:
    who = customer(100)
    answer = proxy.get("/done", x_customer=who, x_answer_tokens="130")
    assert answer.status == 200
    assert until(lambda: balance(who), -30) == -30  # It has happened: it is recorded beyond the credit.
    assert proxy.get("/done", x_customer=who, x_answer_tokens="0").status == 200
    assert proxy.get("/limited", x_customer=who, x_cost="1").status == 429


def until(look: Callable[[], int], wanted: int) -> int:
    """Envoy asks after it has answered, and tells nobody."""
    deadline = monotonic() + DEADLINE_S
    while (found := look()) != wanted and monotonic() < deadline:
        sleep(0.02)
    return found


# Without a gateway, or without its hot store.


@pytest.mark.parametrize("lenient", [False, True])
def test_without_a_gateway_envoy_decides(gateway: GatewayProcess, lenient: bool) -> None:
    with front(f"unix:{gateway.folder}/nobody.sock", lenient=lenient) as (proxy, upstream):
        answer = proxy.get("/v1", x_customer="bob")
        assert answer.status == (200 if lenient else 503)
        assert proxy.get("/limited", x_customer="bob", x_cost="1").status == (200 if lenient else 500)
        assert upstream.requests == (2 if lenient else 0)
        if lenient:
            assert answer.upstream["x-envoy-auth-failure-mode-allowed"] == "true"


@pytest.mark.parametrize("lenient", [False, True])
def test_without_the_hot_store_the_contract_decides(tmp_path: Path, lenient: bool) -> None:
    installed("envoy")
    file = tmp_path / "mapping.yaml"
    file.write_text(MAPPING)
    with ValkeyProcess() as valkey:
        prepare(valkey.url)
        settings = {"frontdoor": file, "redis_timeout_ms": 200}
        with (
            GatewayProcess("grpcio", valkey.url, **settings) as process,
            front(process.address, lenient=lenient) as (proxy, upstream),
        ):
            assert proxy.get("/v1", x_customer="bob").status == 200
            valkey.pause()
            try:
                answer = proxy.get("/v1", x_customer="bob")
                assert (answer.status, answer.error["reason"]) == (503, "UNAVAILABLE")
                assert answer.headers["retry-after"] == "1"
                assert proxy.get("/shadow", x_customer="bob").headers["x-entitlement-shadow"] == "UNAVAILABLE"
                limited = proxy.get("/limited", x_customer="bob", x_cost="1")
                assert limited.status == (200 if lenient else 500)  # It was told UNAVAILABLE.
                assert upstream.requests == (3 if lenient else 2)
            finally:
                valkey.resume()
