"""The `entitlement` command against processes that are spoken to by mutual TLS alone, and ask for a token."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1 import ledger_pb2
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayServicer, add_EntitlementGatewayServicer_to_server
from entitlement.v1.ledger_pb2_grpc import LedgerAdminServicer, add_LedgerAdminServicer_to_server
from gateway.cli import main
from tests.certificates import Authority

SECRET = "s3cr3t-t0k3n"


class Both(EntitlementGatewayServicer, LedgerAdminServicer):
    """Both processes, and what came with each call."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    def _note(self, context: grpc.ServicerContext) -> None:
        self.tokens.append(str(dict(context.invocation_metadata()).get("authorization", "")))

    def CheckAndConsume(self, request: Any, context: Any) -> pb.CheckAndConsumeResponse:
        self._note(context)
        return pb.CheckAndConsumeResponse(verdict=pb.VERDICT_ALLOW)

    def Examine(self, request: Any, context: Any) -> ledger_pb2.Examination:
        self._note(context)
        if self.tokens[-1] == "Bearer revoked":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "authorization: the token is not known here")
        return ledger_pb2.Examination(version="7.7", customers=3)


class Served:
    def __init__(self, folder: Path) -> None:
        self.both = Both()
        self.ours, self.theirs = Authority(folder, "ours"), Authority(folder, "theirs")
        self.client = self.ours.issue("client")
        self.token = folder / "token"
        self.token.write_text(f"{SECRET}\n")
        pair, root = self.ours.issue("server"), self.ours.certificate.read_bytes()
        files = [(pair.key.read_bytes(), pair.certificate.read_bytes())]
        self.credentials = grpc.ssl_server_credentials(files, root, require_client_auth=True)
        self.secure = self.plain = ""

    @property
    def mine(self) -> dict[str, str]:
        """The settings of a command that may call."""
        named = {"CA": self.ours.certificate, "CERT": self.client.certificate, "KEY": self.client.key}
        found = {f"ENTITLEMENT_TLS_{name}": str(path) for name, path in named.items()}
        return found | {"ENTITLEMENT_ADDRESS": self.secure, "ENTITLEMENT_ADMIN_ADDRESS": self.secure}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="cli-") as folder, ThreadPoolExecutor(8) as threads:
        made, server = Served(Path(folder)), grpc.server(threads)
        alive = health.HealthServicer()
        alive.set("", health_pb2.HealthCheckResponse.SERVING)
        add_EntitlementGatewayServicer_to_server(made.both, server)
        add_LedgerAdminServicer_to_server(made.both, server)
        health_pb2_grpc.add_HealthServicer_to_server(alive, server)
        made.secure = f"localhost:{server.add_secure_port('localhost:0', made.credentials)}"
        made.plain = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield made
        server.stop(None).wait()


def run(env: dict[str, str], *arguments: str) -> Result:
    return CliRunner(env=env).invoke(main, arguments, catch_exceptions=False)


@pytest.fixture
def cli(served: Served) -> Callable[..., Result]:
    served.both.tokens.clear()
    return lambda *arguments, **more: run(served.mine | more, *arguments)


def test_who_shows_a_certificate_is_answered(served: Served, cli: Callable[..., Result]) -> None:
    told = cli("status")
    assert told.exit_code == 0 and "version 7.7" in told.output and "healthy" in told.output
    assert cli("check", "c", "tokens", "1").output.startswith("ALLOW")
    assert "allowed 3" in cli("replay", "--generate", "3").output
    assert served.both.tokens == [""] * 5


def test_the_options_are_the_variables(served: Served) -> None:
    files = [str(path) for path in (served.ours.certificate, *served.client, served.token)]
    names = ("--tls-ca", "--tls-cert", "--tls-key", "--token-file")
    options = [part for pair in zip(names, files, strict=True) for part in pair]
    served.both.tokens.clear()
    told = run({}, "status", "--gateway", served.secure, "--admin", served.secure, *options)
    assert told.exit_code == 0 and served.both.tokens == [f"Bearer {SECRET}"]


def test_a_token_goes_with_every_call_and_is_read_anew(served: Served, cli: Callable[..., Result]) -> None:
    served.token.write_text("another")
    for arguments in (("status",), ("check", "c", "tokens", "1"), ("replay", "--generate", "2")):
        assert cli(*arguments, ENTITLEMENT_TOKEN_FILE=str(served.token)).exit_code == 0
    served.token.write_text(f"{SECRET}\n")
    assert cli("status", ENTITLEMENT_TOKEN_FILE=str(served.token)).exit_code == 0
    assert served.both.tokens == ["Bearer another"] * 4 + [f"Bearer {SECRET}"]


def test_who_is_not_let_in_is_told_so_and_not_to_start_ledger_sync(served: Served, cli: Callable[..., Result]) -> None:
    file = served.token.with_name("revoked")
    file.write_text("revoked")
    told = cli("status", ENTITLEMENT_TOKEN_FILE=str(file))
    assert told.exit_code == 1 and "UNAUTHENTICATED: authorization: the token is not known here" in told.output
    assert "fix: give --token-file" in told.output and "start it" not in told.output


@pytest.mark.parametrize("wrong", ["nobody's", "another authority's", "none"])
def test_who_does_not_agree_on_tls_is_not_answered(served: Served, cli: Callable[..., Result], wrong: str) -> None:
    changed = {
        "nobody's": {"ENTITLEMENT_TLS_CERT": "", "ENTITLEMENT_TLS_KEY": ""},
        "another authority's": {"ENTITLEMENT_TLS_CA": str(served.theirs.certificate)},
        "none": dict.fromkeys(("ENTITLEMENT_TLS_CA", "ENTITLEMENT_TLS_CERT", "ENTITLEMENT_TLS_KEY"), ""),
    }[wrong]
    told = cli("check", "c", "tokens", "1", **changed)
    assert told.exit_code == 2 and told.stderr.startswith("error: UNAVAILABLE: ")
    assert ("do not agree on TLS: CERTIFICATE_VERIFY_FAILED" in told.stderr) == (wrong == "another authority's")
    assert ("does one side speak TLS and the other not?" in told.stderr) == (wrong != "another authority's")
    assert "is it running?" not in told.stderr and told.stderr.count("\n") == 1
    assert served.both.tokens == []


def test_a_token_does_not_leave_in_plain_text(served: Served) -> None:
    env = {"ENTITLEMENT_TOKEN_FILE": str(served.token), "ENTITLEMENT_ADMIN_ADDRESS": served.plain}
    served.both.tokens.clear()
    for command in (("status",), ("check", "c", "tokens", "1"), ("replay", "--generate", "1")):
        told = run(env, *command, "--gateway", "gateway.example:8080")
        assert told.exit_code == 2 and SECRET not in told.output
        assert "'gateway.example:8080' would leave this machine in plain text: give tls, or say insecure" in told.stderr
    assert run(env, "status", "--gateway", served.plain).exit_code == 0  # On this machine it may.
    assert set(served.both.tokens) == {f"Bearer {SECRET}"}


def test_one_of_the_two_may_be_spoken_to_in_plain_text(served: Served, cli: Callable[..., Result]) -> None:
    assert cli("status", "--admin", served.plain).exit_code == 1
    assert cli("status", "--admin", served.plain, "--plain", "admin").exit_code == 0
    refused = cli("status", "--admin", "10.0.0.1:1", "--plain", "admin", ENTITLEMENT_TOKEN_FILE=str(served.token))
    assert refused.exit_code == 2 and "plain text" in refused.stderr


@pytest.mark.parametrize(
    ("content", "problem"), [("", "is empty"), ("two words", "has a space"), ("x" * 20_000, "is longer than 16384")]
)
def test_a_token_that_is_none_is_named_and_not_shown(
    served: Served, cli: Callable[..., Result], tmp_path: Path, content: str, problem: str
) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    told = cli("check", "c", "tokens", "1", ENTITLEMENT_TOKEN_FILE=str(file))
    assert told.exit_code == 2 and problem in told.stderr and f"--token-file {file}" in told.stderr
    assert not content or content not in told.stderr
    assert served.both.tokens == []


def test_a_certificate_needs_its_key(served: Served, cli: Callable[..., Result]) -> None:
    told = cli("status", ENTITLEMENT_TLS_KEY="")
    assert told.exit_code == 2 and "--tls-cert and --tls-key go together" in told.stderr


def test_a_file_may_say_it_once_for_all_commands(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "entitlement.yaml"
    certificate, key = served.client
    file.write_text(
        f"{{gateway: '{served.secure}', admin: '{served.secure}', tls_ca: {served.ours.certificate},"
        f" tls_cert: {certificate}, tls_key: {key}, token_file: {served.token}}}"
    )
    served.both.tokens.clear()
    assert run({"ENTITLEMENT_CONFIG": str(file)}, "status").exit_code == 0
    assert run({}, "--config", str(file), "check", "c", "tokens", "1").exit_code == 0
    assert served.both.tokens == [f"Bearer {SECRET}"] * 2
    before = {"ENTITLEMENT_CONFIG": str(file), "ENTITLEMENT_TLS_CA": str(served.theirs.certificate)}
    assert run(before, "check", "c", "tokens", "1").exit_code == 2  # The environment comes first.


@pytest.mark.parametrize(
    ("content", "problem"),
    [("tls_cert_file: x", "unknown field"), ("tls: maybe", "Expected `bool`"), ("[", "while parsing")],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "entitlement.yaml"
    file.write_text(content)
    told = run({}, "--config", str(file), "status")
    assert told.exit_code == 2 and str(file) in told.stderr and problem in told.stderr
