"""Who a client is, and to whom it tells that: TLS, and a bearer token that does not travel in plain text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc
import msgspec

from gateway.client.errors import call_error

MAX_TOKEN_BYTES: Final = 16_384  # no server of ours takes more metadata
_LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
_TOKEN: Final = re.compile(r"[!-~]+")

Token = str | Callable[[], str]
Metadata = tuple[tuple[str, str], ...]


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


class TokenFile(msgspec.Struct, frozen=True):
    """A token in a file, read anew each time it is asked for: whoever renews it replaces the file."""

    path: str

    def __call__(self) -> str:
        with Path(self.path).open() as file:
            return file.read(MAX_TOKEN_BYTES + 1).strip()


def chosen(token: Token | None, token_file: str | Path | None) -> Token | None:
    """Raises ValueError where both are given."""
    if token_file is None:
        return token
    if token is not None:
        raise ValueError("token and token_file: give one of them")
    return TokenFile(str(token_file))


def check_private(target: str, token: Token | None, tls: Tls | None) -> None:
    """Raises ValueError for a token that would leave this machine in plain text."""
    if token is None or tls is not None or target.startswith("unix:"):
        return
    if target.rpartition(":")[0] not in _LOOPBACK:
        raise ValueError(f"a token for {target!r} would leave this machine in plain text: give tls, or say insecure")


def bearer(token: Token) -> Metadata:
    """Raises Unauthenticated when there is no token to send. No error shows it."""
    try:
        text = token if isinstance(token, str) else token()
    except Exception as error:  # The application's own code; its error becomes the calls' own.
        raise call_error(grpc.StatusCode.UNAUTHENTICATED, f"token: {type(error).__name__}") from error
    if not _TOKEN.fullmatch(text):
        raise call_error(grpc.StatusCode.UNAUTHENTICATED, "token: is empty or has a space or a non-ASCII character")
    if len(text) > MAX_TOKEN_BYTES:
        raise call_error(grpc.StatusCode.UNAUTHENTICATED, f"token: is longer than {MAX_TOKEN_BYTES} bytes")
    return (("authorization", f"Bearer {text}"),)


def _read(file: str | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()
