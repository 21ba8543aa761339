"""How a command reaches the two processes: in plain text, or by TLS, with or without a token. Options of every command
that calls one; each has its variable of the environment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Final, Literal, cast

import click
import msgspec

from gateway.client.credentials import Metadata, Tls, TokenFile, bearer, check_private
from gateway.client.errors import EntitlementCallError

Process = Literal["gateway", "admin"]
_FILE: Final = click.Path(exists=True, dir_okay=False, readable=True)


class Security(msgspec.Struct, frozen=True):
    """`plain`: processes that are spoken to in plain text all the same."""

    tls: Tls | None = None
    token: TokenFile | None = None
    insecure: bool = False
    plain: tuple[str, ...] = ()

    def tls_to(self, address: str, what: Process) -> Tls | None:
        """None: in plain text, as on every Unix socket."""
        return None if address.startswith("unix:") or what in self.plain else self.tls

    def metadata(self, address: str, what: Process) -> Metadata | None:
        """Raises UsageError for a token that cannot be read, or would travel in plain text: nothing was sent."""
        if self.token is None:
            return None
        try:
            if not self.insecure:
                check_private(address, self.token, self.tls_to(address, what))
            return bearer(self.token)
        except ValueError as error:
            raise click.UsageError(f"--token-file: {error}") from None
        except EntitlementCallError as error:
            raise click.UsageError(f"--token-file {self.token.path}: {error.message}") from None


_NOW: ContextVar[Security | None] = ContextVar("security", default=None)  # of the command that runs


def current() -> Security:
    return _NOW.get() or Security()


@contextmanager
def applied(security: Security) -> Iterator[None]:
    before = _NOW.set(security)
    try:
        yield
    finally:
        _NOW.reset(before)


def secured(command: Callable[..., object]) -> Callable[..., object]:
    """Adds the options, once, and has them apply while the command runs."""
    if hasattr(command, "security_applies"):
        return command

    @functools.wraps(command)
    def run(*arguments: object, **given: object) -> object:
        mine = {name: given.pop(name) for name in OPTIONS}
        with applied(_security(mine)):
            return command(*arguments, **given)

    run.security_applies = True  # type: ignore[attr-defined]
    wrapped: Callable[..., object] = run
    for option in reversed(OPTIONS.values()):
        wrapped = option(wrapped)
    return wrapped


def _security(given: dict[str, object]) -> Security:
    files = [cast("str | None", given[name]) for name in ("tls_ca", "tls_cert", "tls_key", "tls_server_name")]
    ca, certificate, key, name = files
    if (certificate is None) != (key is None):
        raise click.UsageError("--tls-cert and --tls-key go together: give both or neither.")
    wanted = given["tls"] or any(file is not None for file in files)
    path = cast("str | None", given["token_file"])
    return Security(
        tls=Tls(ca, certificate, key, name) if wanted else None,
        token=TokenFile(str(Path(path))) if path else None,
        insecure=bool(given["insecure"]),
        plain=cast("tuple[str, ...]", given["plain"]),
    )


OPTIONS: Final = {
    "tls": click.option("--tls", is_flag=True, envvar="ENTITLEMENT_TLS", help="TLS, trusting the system's roots."),
    "tls_ca": click.option(
        "--tls-ca", type=_FILE, envvar="ENTITLEMENT_TLS_CA", help="TLS, trusting this PEM file instead."
    ),
    "tls_cert": click.option(
        "--tls-cert", type=_FILE, envvar="ENTITLEMENT_TLS_CERT", help="Who we are (mTLS): a PEM file."
    ),
    "tls_key": click.option("--tls-key", type=_FILE, envvar="ENTITLEMENT_TLS_KEY", help="Its key."),
    "tls_server_name": click.option(
        "--tls-server-name",
        envvar="ENTITLEMENT_TLS_SERVER_NAME",
        help="Expected in the server's certificate, instead of the address's host.",
    ),
    "plain": click.option(
        "--plain",
        type=click.Choice(["gateway", "admin"]),
        multiple=True,
        envvar="ENTITLEMENT_PLAIN",
        help="Reached in plain text although the other is not.",
    ),
    "token_file": click.option(
        "--token-file", type=_FILE, envvar="ENTITLEMENT_TOKEN_FILE", help="A file with a bearer token to send."
    ),
    "insecure": click.option(
        "--insecure", is_flag=True, envvar="ENTITLEMENT_INSECURE", help="Send the token in plain text, anywhere."
    ),
}
