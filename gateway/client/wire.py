"""The gateway's methods on one gRPC channel: bytes out, messages in, every foreign error translated here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import cache
from pathlib import Path

import grpc
import msgspec
from google.protobuf.message import DecodeError

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.errors import ClientClosed, EntitlementCallError, call_error

_SERVICE = "/entitlement.v1.EntitlementGateway/"
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.enable_retries", 0),  # The lane retries; grpc's own costs CPU on every call.
    ("grpc.enable_http_proxy", 0),  # A proxy of the environment is for the web.
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # grpc's least. Its default of 1 s would outlast a call's retries.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # On Linux this also sets TCP_USER_TIMEOUT: data that a peer has not acknowledged within keepalive_timeout ends the
    # connection. Pings of an idle connection more often than every five minutes are refused by grpc servers' defaults.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 16_777_216),
)


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


Token = str | Callable[[], str]  # a callable is asked for every call: for tokens that rotate


class Wire:
    """A channel to one target. Belongs to the event loop it was made on."""

    def __init__(self, target: str, *, token: Token | None, tls: Tls | None, options: Sequence[tuple[str, str | int]]):
        check_target(target, token, tls)
        self._token = token
        self._closed = False
        channel_options = [*_OPTIONS]
        if target.startswith("unix:"):
            channel_options.append(("grpc.default_authority", "localhost"))
        if tls is not None and tls.server_name is not None:
            channel_options.append(("grpc.ssl_target_name_override", tls.server_name))
        channel_options.extend(options)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=channel_options)
        else:
            self._channel = grpc.aio.secure_channel(target, tls.credentials(), options=channel_options)
        # Requests are bytes already, and answers are parsed here, where a bad one can be translated: no serializers.
        unary, stream = self._channel.unary_unary, self._channel.unary_stream
        self._one: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = unary(f"{_SERVICE}CheckAndConsume")
        self._many: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = unary(f"{_SERVICE}CheckAndConsumeBatch")
        self._balance: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = unary(f"{_SERVICE}GetBalance")
        self._watch: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = stream(f"{_SERVICE}WatchBalance")

    async def close(self) -> None:
        self._closed = True
        await self._channel.close()

    async def decide(self, requests: Sequence[bytes], timeout_s: float) -> Sequence[pb.CheckAndConsumeResponse]:
        """An answer for each encoded request, in order. Raises EntitlementCallError when none has one."""
        try:
            if len(requests) == 1:
                data = await self._one(requests[0], timeout=timeout_s, metadata=self._metadata())
                return (pb.CheckAndConsumeResponse.FromString(data),)
            batch = b"".join([part for request in requests for part in (_head(len(request)), request)])
            data = await self._many(batch, timeout=timeout_s, metadata=self._metadata())
            responses = pb.CheckAndConsumeBatchResponse.FromString(data).responses
        except (grpc.aio.AioRpcError, DecodeError) as error:
            raise _translated(error) from None
        if len(responses) != len(requests):
            raise call_error(grpc.StatusCode.INTERNAL, f"{len(responses)} answers to {len(requests)} requests")
        return responses

    async def balance(self, request: bytes, timeout_s: float) -> pb.GetBalanceResponse:
        try:
            data = await self._balance(request, timeout=timeout_s, metadata=self._metadata())
            return pb.GetBalanceResponse.FromString(data)
        except (grpc.aio.AioRpcError, DecodeError) as error:
            raise _translated(error) from None
        except asyncio.CancelledError:
            self._check_open()
            raise

    async def watch(self, request: bytes, first_within_s: float) -> AsyncGenerator[pb.GetBalanceResponse]:
        """Every answer of one stream. Ends when the gateway ends it; leaving the iteration cancels the call."""
        call = self._watch(request, metadata=self._metadata())
        try:
            data = await asyncio.wait_for(call.read(), first_within_s)
            while isinstance(data, bytes):
                yield pb.GetBalanceResponse.FromString(data)
                data = await call.read()
        except TimeoutError:
            message = f"no answer within {first_within_s * 1000:.0f} ms"
            raise call_error(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None
        except (grpc.aio.AioRpcError, DecodeError) as error:
            raise _translated(error) from None
        except asyncio.CancelledError:
            self._check_open()
            raise
        finally:
            call.cancel()

    def _check_open(self) -> None:
        """Closing a channel cancels its calls, which looks like a cancelled caller and is not one."""
        task = asyncio.current_task()
        if self._closed and (task is None or not task.cancelling()):
            raise ClientClosed from None

    def _metadata(self) -> grpc.aio.Metadata | None:
        if self._token is None:
            return None
        token = self._token if isinstance(self._token, str) else self._token()
        return grpc.aio.Metadata(("authorization", f"Bearer {token}"))


def check_target(target: str, token: Token | None, tls: Tls | None) -> None:
    """Raises ValueError for what is not an address, and for a token that would travel in plain text."""
    if target.startswith("unix:"):
        return
    host, colon, port = target.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit() and 0 < int(port) <= 65_535):
        raise ValueError(f"{target!r} is neither unix:/path nor host:port")
    if token is not None and tls is None and host not in _LOOPBACK:
        raise ValueError(f"a token for {target!r} would leave this machine in plain text: give tls")


@cache
def _head(size: int) -> bytes:
    """What stands before an element of field 1 (a length-delimited message) of a batch: its tag and its size."""
    head = bytearray(b"\x0a")
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head)


def _translated(error: grpc.aio.AioRpcError | DecodeError) -> EntitlementCallError:
    if isinstance(error, grpc.aio.AioRpcError):
        return call_error(error.code(), error.details() or "")
    return call_error(grpc.StatusCode.INTERNAL, "the answer does not decode")


def _read(file: str | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()
