"""What may stand in a mapping: each check raises InvalidArgument, which names the field, its problem and the bound."""

from __future__ import annotations

import re
from typing import Final

from entitlement.errors import InvalidArgument
from entitlement.identity import MAX_DIMENSIONS, check_id, check_name, check_value
from entitlement.quantity import MAX_QUANTITY, parse_integer
from gateway.frontdoor.rules import DescriptorMatch, Forward, RequestMatch, Source

MAX_MATCHES: Final = 32  # methods, hosts or entries of one match
MAX_TEXT: Final = 256
MAX_SUFFIX: Final = 32
FORWARD_STATUSES: Final = (0, 401, 403)

_OF_REQUESTS: Final = ("value", "header", "context", "metadata")
_OF_DESCRIPTORS: Final = ("value", "descriptor", "hits_addend")
_HEADER = re.compile(r":?[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)  # pseudo-headers too, as Envoy passes them on
_METHOD = re.compile(r"[A-Z]{1,16}", re.ASCII)
_HOST = re.compile(r"[a-z0-9.-]{1,253}", re.ASCII)
_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@/-]{0,255}", re.ASCII)
_NOT_PLAIN = re.compile(r"//|/\.\.?(/|$)")


def source(field: str, given: Source, *, descriptor: bool) -> None:
    """That it says one place, which is there for requests or descriptors."""
    allowed = _OF_DESCRIPTORS if descriptor else _OF_REQUESTS
    said = [
        name for name in dict.fromkeys((*_OF_REQUESTS, *_OF_DESCRIPTORS)) if getattr(given, name) not in (None, False)
    ]
    if len(said) != 1 or said[0] not in allowed:
        found = " and ".join(said) or "no place"
        where = "descriptors" if descriptor else "requests"
        raise InvalidArgument(field, f"says {found}; expected one of {', '.join(allowed)} for {where}")
    if given.default is not None and given.on_missing is not None:
        raise InvalidArgument(f"{field}.on_missing", "stands beside a default; expected one of both")
    if given.value is not None and (given.default is not None or given.on_missing is not None):
        raise InvalidArgument(field, "has a value, which is never missing; expected no default and no on_missing")
    if given.header is not None:
        header(f"{field}.header", given.header)
    if given.metadata is not None and not 2 <= len(given.metadata) <= MAX_DIMENSIONS:
        problem = f"has {len(given.metadata)} parts; expected 2..{MAX_DIMENSIONS}: a filter's name, then keys"
        raise InvalidArgument(f"{field}.metadata", problem)
    for name in (given.context, given.descriptor, *(given.metadata or ())):
        if name is not None:
            text(f"{field}.{said[0]}", name, low=1)


def constant(field: str, name: str, given: str) -> None:
    """That a call may have this value. `name`: of the call's field."""
    match name:
        case "quantity":
            parse_integer(field, given, 0, MAX_QUANTITY)
        case "feature":
            check_name(field, given)
        case "dimensions":
            check_value(field, given)
        case "key":
            raise InvalidArgument(
                field, "is the same for every request, and a key charges once; expected another source"
            )
        case _:
            check_id(field, given)


def suffix(field: str, given: str) -> str:
    if given and len(check_id(field, given)) > MAX_SUFFIX:
        raise InvalidArgument(field, f"has {len(given)} characters; expected at most {MAX_SUFFIX}")
    return given


def request_match(field: str, match: RequestMatch) -> None:
    prefix = match.path_prefix
    if prefix and (not _PATH.fullmatch(prefix) or _NOT_PLAIN.search(prefix)):
        problem = (
            f"{prefix[:40]!r} is not a path of 1..256 characters, with '/' first, no '%', no '//' and no dot segment"
        )
        raise InvalidArgument(f"{field}.path_prefix", problem)
    for name, texts, form, expected in (
        ("methods", match.methods, _METHOD, "a method in capitals, such as POST"),
        ("hosts", match.hosts, _HOST, "a host without its port, 1..253 of a-z 0-9 . -"),
    ):
        _bounded(f"{field}.{name}", len(texts))
        for index, given in enumerate(texts):
            if not form.fullmatch(given):
                raise InvalidArgument(f"{field}.{name}[{index}]", f"{given[:40]!r} is not {expected}")


def descriptor_match(field: str, match: DescriptorMatch) -> None:
    text(f"{field}.domain", match.domain)
    _bounded(f"{field}.entries", len(match.entries))
    for key, value in match.entries.items():
        text(f"{field}.entries", key, low=1)
        text(f"{field}.entries[{key}]", value)


def forward(given: Forward, matches: list[RequestMatch]) -> None:
    """That what the rules ask for will be told."""
    header("forward.uri", given.uri)
    for name in ("method", "host"):
        if name_of_header := getattr(given, name):
            header(f"forward.{name}", name_of_header)
    if given.denied_status not in FORWARD_STATUSES:
        problem = f"{given.denied_status} is not one of {', '.join(map(str, FORWARD_STATUSES))}"
        raise InvalidArgument("forward.denied_status", problem)
    for index, match in enumerate(matches):
        for name, needed in (("method", match.methods), ("host", match.hosts)):
            if needed and not getattr(given, name):
                problem = f"is missing, and requests.rules[{index}].match.{name}s needs it; expected a header's name"
                raise InvalidArgument(f"forward.{name}", problem)


def header(field: str, name: str) -> None:
    if not _HEADER.fullmatch(name):
        raise InvalidArgument(field, f"{name[:40]!r} is not a header's name: 1..64 of a-z 0-9 _ -, in lower case")


def text(field: str, given: str, low: int = 0) -> None:
    if not low <= len(given) <= MAX_TEXT or not given.isprintable():
        raise InvalidArgument(field, f"{given[:40]!r} is not a text of {low}..{MAX_TEXT} printable characters")


def _bounded(field: str, count: int) -> None:
    if count > MAX_MATCHES:
        raise InvalidArgument(field, f"has {count} elements; expected at most {MAX_MATCHES}")
