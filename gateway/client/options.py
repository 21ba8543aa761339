"""What both clients can be told, checked once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import grpc
import msgspec

from gateway.client.backoff import Backoff
from gateway.client.errors import call_error
from gateway.client.tracing import caller
from gateway.client.values import random_key

MAX_BATCH = 1_000  # requests: a gateway's own limit
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_CHANNEL: tuple[tuple[str, str | int], ...] = (
    ("grpc.enable_retries", 0),  # The client retries; grpc's own costs CPU on every call.
    ("grpc.enable_http_proxy", 0),  # A proxy of the environment is for the web.
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # grpc's least. Its default of 1 s would outlast a call's retries.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # On Linux this sets TCP_USER_TIMEOUT too: data that the peer has not acknowledged within keepalive_timeout ends the
    # connection. A grpc server refuses, by default, to be pinged more often than every five minutes while it is silent.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 16_777_216),
)

Token = str | Callable[[], str]
_TOKEN = re.compile(r"[!-~]+")


class Tls(msgspec.Struct, frozen=True):
    """PEM files, read when the client starts. Without `ca_file` the system's roots are trusted.

    `certificate_file` and `key_file`, given together, are this client's own identity (mTLS).
    """

    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None  # expected in the server's certificate instead of the target's host

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(_read(self.ca_file), _read(self.key_file), _read(self.certificate_file))


class Options(msgspec.Struct, frozen=True):
    """The parameters of Client and SyncClient; Client says what each is for."""

    target: str
    timeout_ms: int
    token: Token | None
    tls: Tls | None
    max_batch: int
    max_in_flight: int
    pipeline: int
    channel_options: tuple[tuple[str, str | int], ...]
    backoff: Backoff
    new_key: Callable[[], str] = random_key
    traceparent: Callable[[], str] = msgspec.field(default_factory=caller)  # of whoever calls

    def __post_init__(self) -> None:
        """Raises ValueError for what is out of bounds, and for a token that would travel in plain text."""
        _within("timeout_ms", self.timeout_ms, 1, 3_600_000)
        _within("max_batch", self.max_batch, 1, MAX_BATCH)
        _within("max_in_flight", self.max_in_flight, 1, 1_000_000)
        _within("pipeline", self.pipeline, 1, 32)
        if self.target.startswith("unix:"):
            return
        host, colon, port = self.target.rpartition(":")
        if not colon or not host or not (port.isascii() and port.isdigit() and 0 < int(port) <= 65_535):
            raise ValueError(f"{self.target!r} is neither unix:/path nor host:port")
        if self.token is not None and self.tls is None and host not in _LOOPBACK:
            raise ValueError(f"a token for {self.target!r} would leave this machine in plain text: give tls")

    def __repr__(self) -> str:
        """Without what may hold a secret."""
        return f"Options(target={self.target!r}, ...)"

    @property
    def timeout_s(self) -> float:
        return self.timeout_ms / 1000

    def key(self, given: str | None) -> str:
        """A key of the caller's, or one that is made."""
        return self.new_key() if given is None else given

    def channel(self) -> list[tuple[str, str | int]]:
        """Options of the gRPC channel; a later one wins."""
        options = list(_CHANNEL)
        if self.target.startswith("unix:"):
            options.append(("grpc.default_authority", "localhost"))  # A path is not a valid one.
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return [*options, *self.channel_options]

    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """Raises Unauthenticated when there is no token to send: nothing was sent."""
        if self.token is None:
            return None
        try:
            token = self.token if isinstance(self.token, str) else self.token()
        except Exception as error:  # The application's own code; its error becomes the calls' own.
            raise call_error(grpc.StatusCode.UNAUTHENTICATED, f"token: {type(error).__name__}") from error
        if not _TOKEN.fullmatch(token):
            raise call_error(grpc.StatusCode.UNAUTHENTICATED, "token: is empty or has a space or a non-ASCII character")
        return (("authorization", f"Bearer {token}"),)


def _read(file: str | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is outside {low}..{high}")
