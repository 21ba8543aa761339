"""TLS and mutual TLS on both transports: who shows the right certificate is served, nobody else is."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from gateway.transport.frames import frame
from tests.certificates import Authority, Pair
from tests.gateway_process import GatewayProcess, asked, installed, prepare
from tests.gateway_rig import CHANNEL, SERVICE
from tests.http2 import Closed, Connection
from tests.servers import DEADLINE_S, ServerError, ValkeyProcess


class Pki:
    def __init__(self, folder: Path) -> None:
        self.ours, self.theirs = Authority(folder, "ours"), Authority(folder, "theirs")
        self.server, self.client = self.ours.issue("server"), self.ours.issue("client")
        self.stranger, self.impostor = self.theirs.issue("client"), self.theirs.issue("server")


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    with tempfile.TemporaryDirectory(prefix="pki-") as folder:
        yield Pki(Path(folder))


@pytest.fixture(scope="module", params=["tls", "mtls"])
def gateway(
    transport: str, valkey_server: ValkeyProcess, pki: Pki, request: pytest.FixtureRequest
) -> Iterator[GatewayProcess]:
    installed(transport)
    prepare(valkey_server.url)
    settings: dict[str, object] = {"tls_cert": pki.server.certificate, "tls_key": pki.server.key}
    if request.param == "mtls":
        settings["tls_client_ca"] = pki.ours.certificate
    with GatewayProcess(transport, valkey_server.url, **settings) as process:
        process.mutual = request.param == "mtls"  # type: ignore[attr-defined]
        yield process


def consume(address: str, authority: Authority, pair: Pair | None = None) -> pb.CheckAndConsumeResponse:
    """A decision, by a client that trusts an authority and shows a certificate. An error is raised quickly."""
    shown = (pair.key.read_bytes(), pair.certificate.read_bytes()) if pair else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *shown)
    with grpc.secure_channel(address, credentials, options=CHANNEL) as channel:
        return EntitlementGatewayStub(channel).CheckAndConsume(asked(), timeout=DEADLINE_S)


def refused(address: str, authority: Authority, pair: Pair | None = None) -> None:
    with pytest.raises(grpc.RpcError) as error:
        consume(address, authority, pair)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def test_who_shows_the_right_certificate_is_served(gateway: GatewayProcess, pki: Pki) -> None:
    assert consume(gateway.address, pki.ours, pki.client).verdict == pb.VERDICT_ALLOW


def test_who_shows_none_is_served_only_where_none_is_asked_for(gateway: GatewayProcess, pki: Pki) -> None:
    if gateway.mutual:  # type: ignore[attr-defined]
        refused(gateway.address, pki.ours)
    else:
        assert consume(gateway.address, pki.ours).verdict == pb.VERDICT_ALLOW


def test_a_certificate_of_another_authority_is_refused(gateway: GatewayProcess, pki: Pki) -> None:
    if gateway.mutual:  # type: ignore[attr-defined]
        refused(gateway.address, pki.ours, pki.stranger)
    assert consume(gateway.address, pki.ours, pki.client).verdict == pb.VERDICT_ALLOW


def test_a_client_that_trusts_another_authority_refuses_the_server(gateway: GatewayProcess, pki: Pki) -> None:
    refused(gateway.address, pki.theirs, pki.client)


def test_the_command_line_says_that_a_certificate_is_wanted(gateway: GatewayProcess, pki: Pki) -> None:
    """In one line, to which grpc's core adds none."""
    if not gateway.mutual:  # type: ignore[attr-defined]
        pytest.skip("of this gateway: no certificate is wanted")
    argv = [sys.executable, "-m", "gateway.cli", "balance", "c", "--gateway", gateway.address, "--tls-ca"]
    env = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    told = subprocess.run(
        [*argv, pki.ours.certificate], env=env, check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert told.returncode == 2 and told.stderr.count("\n") == 1
    assert "hung up: " in told.stderr and "Is a certificate wanted?" in told.stderr


def test_the_certificate_is_the_configured_one(gateway: GatewayProcess, pki: Pki) -> None:
    context = ssl.create_default_context(cafile=str(pki.ours.certificate))
    context.load_cert_chain(pki.client.certificate, pki.client.key)
    context.set_alpn_protocols(["h2"])
    host, port = gateway.address.split(":")
    with (
        socket.create_connection((host, int(port)), DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        assert ssl.DER_cert_to_PEM_cert(sock.getpeercert(binary_form=True) or b"") in pki.server.certificate.read_text()
        assert sock.selected_alpn_protocol() == "h2"
        assert sock.version() in ("TLSv1.2", "TLSv1.3")


def test_plaintext_is_refused_on_tcp_and_served_on_the_unix_socket(gateway: GatewayProcess) -> None:
    with Connection(gateway.address, timeout=DEADLINE_S) as connection:
        try:
            ended = connection.outcome(connection.request(SERVICE + "CheckAndConsume", frame(b"")))
        except Closed:
            ended = {"closed": ""}
        assert "closed" in ended
    with grpc.insecure_channel(f"unix:{gateway.path}", options=CHANNEL) as channel:
        answer = EntitlementGatewayStub(channel).CheckAndConsume(asked(), timeout=DEADLINE_S)
    assert answer.verdict == pb.VERDICT_ALLOW


@pytest.mark.parametrize("wrong", ["no file", "no certificate", "another key", "no authority"])
def test_files_that_do_not_fit_are_refused_at_the_start(
    transport: str, valkey_server: ValkeyProcess, pki: Pki, tmp_path: Path, wrong: str
) -> None:
    installed(transport)
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    settings = {"tls_cert": pki.server.certificate, "tls_key": pki.server.key, "tls_client_ca": pki.ours.certificate}
    changed, problem = {
        "no file": ({"tls_cert": tmp_path / "nope.pem"}, "tls_cert: and tls_key cannot be used together: No such file"),
        "no certificate": ({"tls_cert": empty}, "tls_cert: and tls_key cannot be used together: "),
        "another key": ({"tls_key": pki.client.key}, "tls_cert: and tls_key cannot be used together: KEY_VALUES_MISM"),
        "no authority": ({"tls_client_ca": empty}, "tls_client_ca: cannot be used: "),
    }[wrong]
    with pytest.raises(ServerError) as error:
        GatewayProcess(transport, valkey_server.url, **(settings | changed)).stop()
    assert "Traceback" not in str(error.value)
    assert f"gateway: {problem}" in str(error.value)


def test_sockets_are_for_the_owner_and_the_group(gateway: GatewayProcess) -> None:
    assert oct(gateway.path.stat().st_mode & 0o777) == "0o660"
    assert os.access(gateway.path, os.W_OK)
