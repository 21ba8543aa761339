"""Where Redis is and how it is spoken to: one server, whichever of several the sentinels name, or a cluster. Pure.

redis://[user:password@]host[:port][/db]                      one server; rediss:// with TLS
unix:///path                                                  one server on this machine
redis+sentinel://[user:password@]host[:port],.../master[/db]  the primary that sentinels know by that name
redis+cluster://[user:password@]host[:port],...               a cluster; any of its nodes will do to find the others
rediss+sentinel://, rediss+cluster://                         with TLS, for sentinels and nodes alike
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from entitlement.errors import InvalidArgument

PORT: Final = 6379
SENTINEL_PORT: Final = 26379
EXPECTED: Final = (
    "redis://[user:password@]host[:port][/db], rediss://... or unix:///path, "
    "redis+sentinel://host[:port],host[:port]/master[/db], redis+cluster://host[:port],host[:port] "
    "(with TLS: rediss+sentinel://, rediss+cluster://)"
)

_LOOPBACK: Final = ("localhost", "::1")
_THIS_MACHINE: Final = re.compile(r"127(?:\.[0-9]{1,3}){3}", re.ASCII)  # 127.example.com is another one.


class Shape(Enum):
    """What the address leads to."""

    ONE = "one"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


_SHAPES: Final = {
    "redis": (Shape.ONE, False),
    "rediss": (Shape.ONE, True),
    "redis+sentinel": (Shape.SENTINEL, False),
    "rediss+sentinel": (Shape.SENTINEL, True),
    "redis+cluster": (Shape.CLUSTER, False),
    "rediss+cluster": (Shape.CLUSTER, True),
}


class Files(msgspec.Struct, frozen=True):
    """PEM files, and one that holds the password. Each new connection reads them anew."""

    ca: str = ""
    certificate: str = ""
    key: str = ""
    password: str = ""


class Endpoint(msgspec.Struct, frozen=True):
    """Where Redis is. The password is kept out of every text made of this value."""

    host: str = ""
    port: int = PORT
    path: str = ""  # of a Unix socket; then host and port do not count
    username: str = ""
    password: str = ""
    database: int = 0
    tls: bool = False
    shape: Shape = Shape.ONE
    hosts: tuple[tuple[str, int], ...] = ()  # of sentinels, or nodes of the cluster
    master: str = ""  # by which name sentinels know the primary
    files: Files = Files()

    @classmethod
    def parse(cls, url: str, field: str = "redis_url", files: Files | None = None) -> Endpoint:
        """Raises InvalidArgument, which names the setting and what is expected, and nothing of the URL."""
        try:
            parts = urlsplit(url)
            if parts.scheme in ("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"):
                found = _several(parts)
            else:
                found = _one(parts)
        except ValueError:  # Its text may hold what was meant to be the password.
            raise InvalidArgument(field, f"expected {EXPECTED}") from None
        return found.given(files, field) if files else found

    def given(self, files: Files, field: str = "redis_url") -> Endpoint:
        """With these files."""
        prefix = field.removesuffix("url")
        if bool(files.certificate) != bool(files.key):
            raise InvalidArgument(f"{prefix}cert", f"and {prefix}key go together: set both or neither")
        if (files.ca or files.certificate) and not self.tls:
            raise InvalidArgument(f"{prefix}{'ca' if files.ca else 'cert'}", f"needs TLS: {field} of rediss://")
        if files.password and self.password:
            raise InvalidArgument(f"{prefix}password_file", f"and a password in {field}: expected one of both")
        return msgspec.structs.replace(self, files=files)

    def at(self, host: str, port: int) -> Endpoint:
        """One server that sentinels, or nodes of the cluster, have named."""
        return msgspec.structs.replace(self, host=host, port=port, shape=Shape.ONE, hosts=(), master="")

    def without_database(self) -> Endpoint:
        """A sentinel has none."""
        return msgspec.structs.replace(self, database=0)

    def without_password(self) -> Endpoint:
        return msgspec.structs.replace(self, password="", files=msgspec.structs.replace(self.files, password=""))

    @property
    def secrets(self) -> tuple[str, ...]:
        """What of it must be shown nowhere."""
        return (self.password,) if self.password else ()

    def check_reach(self, field: str = "redis_url", *, insecure: bool) -> None:
        """Raises InvalidArgument for a Redis beyond this machine that is shown no password and no certificate."""
        if not (self.is_local or self.has_secret or insecure):
            prefix = field.removesuffix("url")
            raise InvalidArgument(
                field,
                "leads beyond this machine without a password: whoever is there may write balances; "
                f"put one into it or into {prefix}password_file, set {prefix}cert, or say insecure = true",
            )

    @property
    def has_secret(self) -> bool:
        """Whether it shows who it is: by a password, or by a certificate."""
        return bool(self.password or self.files.password or self.files.certificate)

    @property
    def is_local(self) -> bool:
        """Whether no other machine is involved."""
        hosts = [host for host, _ in self.hosts] or [self.host]
        return bool(self.path) or all(host in _LOOPBACK or _THIS_MACHINE.fullmatch(host) for host in hosts)

    def __repr__(self) -> str:
        return f"Endpoint({self})"

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        if self.shape is Shape.ONE:
            return f"{self.host}:{self.port}/{self.database}"
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{hosts}/{self.master}/{self.database}" if self.shape is Shape.SENTINEL else f"cluster {hosts}"


def _one(parts: SplitResult) -> Endpoint:
    username, password = unquote(parts.username or ""), unquote(parts.password or "")
    if parts.scheme == "unix" and parts.path:
        return Endpoint(path=parts.path, username=username, password=password)
    shape, tls = _SHAPES.get(parts.scheme, (None, False))
    if shape is not Shape.ONE or not parts.hostname:
        raise ValueError
    return Endpoint(parts.hostname, parts.port or PORT, "", username, password, _number(parts.path.lstrip("/")), tls)


def _several(parts: SplitResult) -> Endpoint:
    shape, tls = _SHAPES[parts.scheme]
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    hosts = tuple(_hosts(places, SENTINEL_PORT if shape is Shape.SENTINEL else PORT))
    master, _, database = parts.path.lstrip("/").partition("/")
    if not hosts or parts.query or parts.fragment or bool(master) != (shape is Shape.SENTINEL):
        raise ValueError
    return Endpoint(
        hosts[0][0],
        hosts[0][1],
        "",
        unquote(user),
        unquote(password),
        _number(database),
        tls,
        shape,
        hosts,
        unquote(master),
    )


def _hosts(places: str, port: int) -> Iterator[tuple[str, int]]:
    for place in places.split(","):
        parts = urlsplit(f"//{place}")
        if not parts.hostname or parts.username is not None or parts.path:
            raise ValueError
        yield parts.hostname, parts.port or port


def _number(text: str) -> int:
    if text and not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError
    return int(text or 0)
