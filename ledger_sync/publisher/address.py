"""The publisher setting: one URL, parsed once. Secrets stay out of its text and of every error about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit


class BadPublisher(ValueError):
    """The `publisher` setting cannot be used. Says what is wrong and what is expected, and never quotes the URL."""

    def __init__(self, wrong: str, expected: str) -> None:
        super().__init__(f"publisher: {wrong}; expected {expected}")


@dataclass(frozen=True, slots=True)
class Address:
    """A publisher URL in parts, percent-decoded. `str` shows it without user and password."""

    scheme: str
    hosts: tuple[str, ...]  # "name:port", "name" or "[v6]:port", as written.
    path: str
    options: Mapping[str, str]
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        secret = "***@" if self.username is not None else ""
        return f"{self.scheme}://{secret}{','.join(self.hosts)}{self.path}"

    def refuse_options_but(self, *known: str) -> None:
        for name in self.options:
            if name not in known:
                raise BadPublisher(f"unknown option {name!r}", f"one of {', '.join(known)}" if known else "no options")

    def integer(self, name: str, default: int, *, low: int, high: int) -> int:
        text = self.options.get(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit()) or not low <= int(text[:20]) <= high:
            raise BadPublisher(f"option {name!r} is {text[:20]!r}", f"a whole number from {low} to {high}")
        return int(text)

    def choice(self, name: str, default: str, *known: str) -> str:
        value = self.options.get(name, default)
        if value not in known:
            raise BadPublisher(f"option {name!r} is not known", f"one of {', '.join(known)}")
        return value


def parse_address(url: str, expected: str) -> Address:
    """The parts of a URL. BadPublisher: it is not one, a host is malformed, or an option comes twice."""
    try:
        parts = urlsplit(url)
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise BadPublisher("it is not a URL", expected) from None
    if parts.fragment:
        raise BadPublisher("it contains '#'", "it percent-encoded as %23")
    if len(dict(options)) != len(options):
        raise BadPublisher("an option is given twice", "each option once")
    userinfo, _, hosts = parts.netloc.rpartition("@")
    username, _, password = userinfo.partition(":")
    return Address(
        scheme=parts.scheme,
        hosts=tuple(_host(host, expected) for host in hosts.split(",")) if hosts else (),
        path=unquote(parts.path),
        options=dict(options),
        username=unquote(username) if userinfo else None,
        password=unquote(password) if userinfo else None,
    )


def _host(text: str, expected: str) -> str:
    try:
        parts = urlsplit(f"//{text}")
        sound = parts.hostname and parts.netloc == text and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise BadPublisher("a host is malformed (a password in the URL has to be percent-encoded)", expected)
    return text
