"""curl as a client: unary methods as JSON over HTTP POST, on the port that serves gRPC. Only Envoy serves it."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.gateway_process import CREDIT, GatewayProcess, asked, installed, prepare
from tests.gateway_rig import CHANNEL, SERVICE
from tests.hot_stores import CUSTOMER, TOKENS
from tests.servers import DEADLINE_S, ValkeyProcess

CONSUME = SERVICE + "CheckAndConsume"
JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    status: int
    body: dict
    headers: http.client.HTTPMessage


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=DEADLINE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Curl:
    """One keep-alive connection, so that every answer leaves it usable."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self.connection = connection

    def __call__(
        self,
        body: object = None,
        *,
        path: str = CONSUME,
        method: str = "POST",
        headers: dict[str, str] = JSON,
        chunked: bool = False,
    ) -> Answer:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = (data[at : at + 1_000] for at in range(0, len(data), 1_000)) if chunked and data else data
        self.connection.request(method, path, sent, headers, encode_chunked=chunked)
        response = self.connection.getresponse()
        text = response.read()
        assert response.headers["content-type"] == "application/json", text
        return Answer(response.status, json.loads(text) if text else {}, response.headers)


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[GatewayProcess]:
    installed("envoy")
    prepare(valkey_server.url)
    with GatewayProcess("envoy", valkey_server.url) as process:
        yield process
        process.terminate()
        assert process.exit_code() == 0
        assert "Traceback" not in process.output, process.output


@pytest.fixture(params=["tcp", "unix"])
def curl(gateway: GatewayProcess, request: pytest.FixtureRequest) -> Iterator[Curl]:
    if request.param == "unix":
        connection: http.client.HTTPConnection = UnixConnection(gateway.path)
    else:
        host, port = gateway.address.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_S)
    yield Curl(connection)
    connection.close()


def request(key: str, quantity: object = 1, **more: object) -> dict[str, object]:
    usage = [{"feature": TOKENS, "quantity": quantity}]
    return {"idempotencyKey": key, "customer": CUSTOMER, "usage": usage} | more


def fresh() -> str:
    return asked().idempotency_key


def test_a_decision_and_its_replay(curl: Curl) -> None:
    key = fresh()
    first = curl(request(key, "7"))
    assert first.status == 200
    assert (first.body["verdict"], first.body["idempotencyKey"]) == ("VERDICT_ALLOW", key)
    assert first.body["consumed"] == [{"feature": TOKENS, "quantity": "7", "amountNanos": "7", "rateCardVersion": "1"}]
    again = curl(request(key, 7))
    assert again.status == 200 and again.body.pop("replayed") is True
    assert again.body == first.body


def test_grpc_on_the_same_port_gives_the_same_answer(curl: Curl, gateway: GatewayProcess) -> None:
    key = fresh()
    answer = curl({"idempotency_key": key, "customer": CUSTOMER, "usage": [{"feature": TOKENS, "quantity": 3}]}).body
    with grpc.insecure_channel(gateway.address, options=CHANNEL) as channel:
        replay = EntitlementGatewayStub(channel).CheckAndConsume(asked(key, quantity=3), timeout=DEADLINE_S)
    assert replay.replayed
    assert f"{replay.balance.available_nanos}" == answer["balance"]["availableNanos"]


def test_a_batch_and_a_balance(curl: Curl) -> None:
    answer = curl({"requests": [request(fresh()), request("", 1)]}, path=SERVICE + "CheckAndConsumeBatch")
    decided, refused = answer.body["responses"]
    assert decided["verdict"] == "VERDICT_ALLOW"
    assert refused["error"]["code"] == 3
    balance = curl({"customer": CUSTOMER}, path=SERVICE + "GetBalance").body["balance"]
    assert 0 < int(balance["availableNanos"]) < CREDIT


def test_a_denial_is_an_answer(curl: Curl) -> None:
    usage = [{"feature": "nope", "quantity": 1}]
    answer = curl({"idempotencyKey": fresh(), "customer": CUSTOMER, "usage": usage})
    assert (answer.status, answer.body["verdict"]) == (200, "VERDICT_DENY")
    assert answer.body["reason"] == "REASON_FEATURE_NOT_FOUND"


def test_health(curl: Curl) -> None:
    assert curl({}, path="/grpc.health.v1.Health/Check").body == {"status": "SERVING"}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (request(""), "idempotency_key: is empty"),
        (request("k", -1), "usage[0].quantity: -1 is outside"),
        (request("k", 1.5), "body: "),
        (request("k", customer=5), "body: "),
        ({"nope": 1}, "body: "),
        (b"{", "body: "),
        (b"[]", "body: expected a JSON object"),
        (b"\xff\xfe", "body: expected a JSON object"),
        (b"{" * 100_000, "body: "),
    ],
)
def test_an_invalid_argument_is_400(curl: Curl, body: object, problem: str) -> None:
    answer = curl(body)
    assert (answer.status, answer.body["code"]) == (400, "invalid_argument")
    assert problem in answer.body["message"] and len(answer.body["message"]) < 1_000
    assert curl(request(fresh())).status == 200


def test_the_same_key_with_another_request_is_409(curl: Curl) -> None:
    key = fresh()
    assert curl(request(key, 1)).status == 200
    answer = curl(request(key, 2))
    assert (answer.status, answer.body["code"]) == (409, "already_exists")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_405(curl: Curl, method: str) -> None:
    answer = curl(method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


def test_unknown_paths_are_404(curl: Curl) -> None:
    for path in ("/", "/nope", "/entitlement.v1.Nope/Nope", SERVICE + "Nope", SERVICE + "CheckAndConsumeStream"):
        assert curl({}, path=path).status == 404, path


@pytest.mark.parametrize("content", ["text/plain", "application/x-www-form-urlencoded", "application/grpc-web", ""])
def test_other_content_types_are_415(curl: Curl, content: str) -> None:
    assert curl(request(fresh()), headers={"Content-Type": content}).status == 415


def test_a_body_over_the_limit_is_413(curl: Curl) -> None:
    answer = curl(b'{"customer": "' + b"x" * 4_194_304 + b'"}')
    assert (answer.status, answer.body["code"]) == (413, "resource_exhausted")
    with suppress(ConnectionError):  # It is refused before all of it was sent: who reads only then may miss why.
        assert curl(b'{"customer": "' + b"x" * 9_000_000 + b'"}').status == 413


def test_a_body_in_chunks(curl: Curl) -> None:
    answer = curl(
        {"requests": [request(fresh()) for _ in range(200)]}, path=SERVICE + "CheckAndConsumeBatch", chunked=True
    )
    assert len(answer.body["responses"]) == 200


def test_nothing_is_said_of_what_serves(curl: Curl) -> None:
    assert not {name.lower() for name in curl(request(fresh())).headers} & {
        "server",
        "x-powered-by",
        "x-envoy-upstream-service-time",
    }


def test_curl_itself(gateway: GatewayProcess) -> None:
    if not (curl := shutil.which("curl")):
        pytest.skip("curl is not installed")
    argv = [curl, "-sS", "-m", "10", "-H", "Content-Type: application/json", "-d", json.dumps(request(fresh()))]
    for more in (
        [f"http://{gateway.address}{CONSUME}"],
        ["--unix-socket", str(gateway.path), f"http://gateway{CONSUME}"],
    ):
        done = subprocess.run([*argv, *more], capture_output=True, text=True, timeout=DEADLINE_S, check=True)
        assert json.loads(done.stdout)["verdict"] == "VERDICT_ALLOW"
