"""gRPC calls of the command line: where the processes are, a deadline on every call, one line for every failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import click
import grpc

from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub

GATEWAY: Final = "127.0.0.1:8080"
ADMIN: Final = "127.0.0.1:8081"
DEADLINE_S: Final = 10.0
VERIFY_DEADLINE_S: Final = 120.0  # it reads every account
EXIT_CALL_FAILED: Final = 2

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
def _channel(address: str, what: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise CallFailed(describe(error, address, what)) from None


def describe(error: grpc.RpcError, address: str, what: str) -> str:
    """'CODE: message', on one line."""
    if not isinstance(error, grpc.Call):
        return f"UNKNOWN: {type(error).__name__}"
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
        return f"UNAVAILABLE: no {what} answers at {address}; is it running? (entitlement dev starts a whole stack)"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"DEADLINE_EXCEEDED: the {what} at {address} did not answer in time"
    return f"{code.name}: {details}"
