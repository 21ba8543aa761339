"""Takes secrets out of what is logged or shown: those that are known, and what looks like one. Pure.

What a process is given as a secret is found wherever it stands and in whatever form. What it is not told of (a caller's
token, a password in another's error) is found by where it stands: in a URL, after a name, under a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

HIDDEN: Final = "***"
SHORTEST: Final = 4  # of known ones: what is shorter stands in every other word
DEEPEST: Final = 8  # of values inside values; below it nothing is shown

Logged: TypeAlias = Mapping[str, object]

_NAMES: Final = "password|passwd|passphrase|secret|authorization|credential|cookie|api[_-]?key|private[_-]?key"
_NAMED: Final = re.compile(rf"{_NAMES}|(?:^|[_-])(?:token|pwd|jwt|dsn)$", re.IGNORECASE)
_PLACED: Final = (
    # Up to the last @: a password that is not escaped may hold one, or a slash.
    (re.compile(r"(?<=://)[^\s'\"]*@"), f"{HIDDEN}@"),
    (re.compile(r"\b((?i:bearer|basic))\s+(?=\S*[0-9A-Z=])[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"(ent_[a-z2-7]{12})_[A-Za-z0-9_-]+"), rf"\1_{HIDDEN}"),  # Of a caller: its id may be shown.
    (re.compile(r"\bwhsec_[A-Za-z0-9+/=_-]+"), f"whsec_{HIDDEN}"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"), HIDDEN),  # A JSON web token.
    (
        re.compile(
            rf"""(\b[\w.-]{{0,40}}(?:{_NAMES}|token|pwd)\b["']?\s*[=:]\s*)(?:"[^"]*"|'[^']*'|(?!\*\*\*)[^\s,;&)}}\]"']+)""",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)


class Redactor:
    """A processor of structlog, to stand just before what renders; `text` for anything else that is shown."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets for form in _forms(secret) if len(form) >= SHORTEST}
        longest = sorted(forms, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest))) if longest else None

    def __call__(self, logger: object, method: str, event: Logged) -> Logged:
        return {name: self._value(name, value, DEEPEST) for name, value in event.items()}

    def text(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        for pattern, shown in _PLACED:
            text = pattern.sub(shown, text)
        return text

    def _value(self, name: str, value: object, depth: int) -> object:
        if value is None or isinstance(value, bool | int | float):
            return HIDDEN if value and not isinstance(value, bool) and _NAMED.search(name) else value
        if _NAMED.search(name) or not depth:
            return HIDDEN
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._value(str(key), inner, depth - 1) for key, inner in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._value("", inner, depth - 1) for inner in value]
        if isinstance(value, bytes | bytearray):
            return self.text(value.decode("utf-8", "backslashreplace"))
        return self.text(value if isinstance(value, str) else repr(value))


def of_url(url: str) -> tuple[str, ...]:
    """What is secret in a URL: its password, and options whose names say so."""
    try:
        parts = urlsplit(url)
        password = parts.password
    except ValueError:
        return (url,)  # Nobody knows which part of it was meant to be one.
    options = [value for name, value in parse_qsl(parts.query) if _NAMED.search(name)]
    return tuple(found for found in (password, *options) if found)


def of_collector(environment: Mapping[str, str]) -> tuple[str, ...]:
    """What OpenTelemetry's exporter was given to show to its collector: it may hold a token."""
    names = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
    given = [environment[name] for name in names if name in environment]
    return (*given, *(pair.partition("=")[2] for text in given for pair in text.split(",")))


def _forms(secret: str) -> set[str]:
    """As it is, as a URL has it, and as a text in quotes does."""
    plain = unquote(secret)
    quoted = {quote(plain, safe=""), quote(plain), quote_plus(plain)}
    return {secret, plain, *quoted, repr(plain)[1:-1], repr(plain.encode())[2:-1]}
