"""What both clients can be told, checked once."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from gateway.client.backoff import Backoff
from gateway.client.credentials import Metadata, Tls, Token, bearer, check_private
from gateway.client.tracing import caller
from gateway.client.values import random_key

MAX_BATCH = 1_000  # requests: a gateway's own limit
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
    insecure: bool = False

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
        if not self.insecure:
            check_private(self.target, self.token, self.tls)

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

    def metadata(self) -> Metadata | None:
        """Raises Unauthenticated when there is no token to send: nothing was sent."""
        return None if self.token is None else bearer(self.token)


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is outside {low}..{high}")
