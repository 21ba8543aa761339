"""gRPC calls of the command line: where the processes are, a deadline on every call, one line for every failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import click
import grpc

from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.cli import security
from gateway.cli.security import Process
from gateway.client.credentials import Metadata, Tls

GATEWAY: Final = "127.0.0.1:8080"
ADMIN: Final = "127.0.0.1:8081"
DEADLINE_S: Final = 10.0
VERIFY_DEADLINE_S: Final = 120.0  # it reads every account
EXIT_CALL_FAILED: Final = 2

_CLOSED: Final = ("socket closed", "reset by peer", "broken pipe", "secure read failed")  # after it was connected to
_TLS: Final = "--tls-ca, --tls-cert, --tls-key"

# A proxy of the environment is for the web, not for a neighbour process.
CHANNEL_OPTIONS: Final = (("grpc.enable_http_proxy", 0),)


@dataclass(frozen=True)
class Addresses:
    gateway: str = GATEWAY
    admin: str = ADMIN


class CallFailed(click.ClickException):
    """A call that a process refused or did not answer."""

    exit_code = EXIT_CALL_FAILED

    def show(self, file: object = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class Problem(click.ClickException):
    """Something that is wrong on this side: a file, a setting, a folder."""

    def show(self, file: object = None) -> None:
        click.echo(self.message, err=True)


@contextmanager
def gateway(address: str) -> Iterator[EntitlementGatewayStub]:
    with _channel(address, "gateway") as channel:
        yield EntitlementGatewayStub(channel)


@contextmanager
def admin(address: str) -> Iterator[LedgerAdminStub]:
    with _channel(address, "admin") as channel:
        yield LedgerAdminStub(channel)


@contextmanager
def _channel(address: str, what: Process) -> Iterator[grpc.Channel]:
    with channel_to(address, what) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise CallFailed(describe(error, address, what)) from None


def channel_to(address: str, what: Process) -> grpc.Channel:
    """As the command's options say: by TLS, with a token on every call. Raises UsageError: see Security."""
    given = security.current()
    metadata, tls = given.metadata(address, what), given.tls_to(address, what)
    if tls is None:
        channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    else:
        channel = grpc.secure_channel(address, tls.credentials(), options=_expecting(tls))
    return grpc.intercept_channel(channel, _Bearer(metadata)) if metadata else channel


def aio_channel_to(address: str, what: Process) -> tuple[grpc.aio.Channel, Metadata | None]:
    """The same for many calls at once, and what to send with each of them."""
    given = security.current()
    metadata, tls = given.metadata(address, what), given.tls_to(address, what)
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS), metadata
    return grpc.aio.secure_channel(address, tls.credentials(), options=_expecting(tls)), metadata


def _expecting(tls: Tls) -> list[tuple[str, str | int]]:
    name = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return [*CHANNEL_OPTIONS, *name]


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Metadata
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Bearer(grpc.UnaryUnaryClientInterceptor):
    """No call of the command line streams."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), *self._metadata)
        known = (details.credentials, details.wait_for_ready, details.compression)
        return continuation(_Details(details.method, details.timeout, metadata, *known), request)


def describe(error: grpc.RpcError, address: str, what: str) -> str:
    """'CODE: message', on one line."""
    if not isinstance(error, grpc.Call):
        return f"UNKNOWN: {type(error).__name__}"
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE and "OPENSSL_internal:" in details:
        problem = details.rpartition("OPENSSL_internal:")[2].split(":")[0]
        return f"UNAVAILABLE: the {what} at {address} and this command do not agree on TLS: {problem}"
    if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
        if any(cause in details.lower() for cause in _CLOSED):
            asked = "does one side speak TLS and the other not? Is a certificate wanted?"
            return f"UNAVAILABLE: the {what} at {address} hung up: {asked} ({_TLS})"
        return f"UNAVAILABLE: no {what} answers at {address}; is it running? (entitlement dev starts a whole stack)"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"DEADLINE_EXCEEDED: the {what} at {address} did not answer in time"
    return f"{code.name}: {details}"
