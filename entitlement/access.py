"""Who may call: identities in a file, by the token that a caller sends or the certificate that it shows. Pure.

    identities:
    - name: checkout                                      # what the audit log calls it
      uri: spiffe://cluster.local/ns/shop/sa/checkout     # of a certificate: its one URI; or, of a token:
      token: k7qjx2m4t6a5                                 #   the part that may be shown
      sha256: 5f1c...                                     #   of the whole token; the token itself is nowhere
      tenant: default
      scopes: [consume, read]
      customers: [acme, "shop-*"]                         # left out: all
      expires: 2027-01-01T00:00:00Z                       # left out: never
      revoked: 2026-11-23T20:00:00Z                       # from then on it is nobody

A token is ent_<its id>_<43 random characters>: 256 bits, so that one plain SHA-256 is all that is kept of it.
"""

from __future__ import annotations

import re
from base64 import b32encode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
import yaml

try:
    from yaml import CSafeLoader as _Safe  # Where libyaml is, a long file takes no second.
except ImportError:
    from yaml import SafeLoader as _Safe  # type: ignore[assignment]

from entitlement.errors import InvalidArgument, PermissionDenied, Unauthenticated
from entitlement.identity import check_id, is_id

Scope: TypeAlias = Literal["consume", "read", "admin"]

MAX_FILE_BYTES: Final = 4_194_304
MAX_IDENTITIES: Final = 10_000
MAX_CUSTOMERS: Final = 1_000  # of one identity
ID_CHARACTERS: Final = 12
EVERY: Final = "*"

_TOKEN: Final = re.compile(r"ent_([a-z2-7]{12})_[A-Za-z0-9_-]{43}", re.ASCII)
_TOKEN_ID: Final = re.compile(r"[a-z2-7]{12}", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_URI: Final = re.compile(r"[a-z][a-z0-9+.-]*:[!$&'()*+./0-9:=?@A-Z_a-z~%-]{1,2000}", re.ASCII)  # no , ; " or space
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)
_UNKNOWN: Final = "authorization: the token is not known here, has expired or was revoked"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """An identity as the file has it. Nothing in it lets anybody in."""

    name: str
    tenant: str
    scopes: tuple[Scope, ...]
    uri: str = ""
    token: str = ""
    sha256: str = ""
    customers: tuple[str, ...] | None = None
    created: str = ""
    expires: str = ""
    revoked: str = ""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    identities: tuple[Entry, ...] = ()


class Identity(msgspec.Struct, frozen=True):
    """Who calls. `customers`: ids, and beginnings of ids that end in '*'; () is every customer of the tenant."""

    name: str
    tenant: str
    scopes: frozenset[str]
    customers: tuple[str, ...] = ()
    until_ms: int = 0  # 0: for ever

    @property
    def limited(self) -> bool:
        return bool(self.customers)

    def may_touch(self, customer: str) -> bool:
        return not self.customers or any(_covers(pattern, customer) for pattern in self.customers)


class Credentials(NamedTuple):
    """What came with a call: every `authorization` there was, and the URIs of the certificate that was verified."""

    authorizations: Sequence[str] = ()
    uris: Sequence[str] = ()


class Access:
    """The identities of one reading of the file. `now_ms` tells when one has expired."""

    def __init__(self, entries: Iterable[Entry], now_ms: Callable[[], int]) -> None:
        """Raises InvalidArgument for what is not sound, naming the identity."""
        self._now_ms = now_ms
        self._by_hash: dict[str, Identity] = {}
        self._by_uri: dict[str, Identity] = {}
        self.entries = tuple(entries)
        if len(self.entries) > MAX_IDENTITIES:
            raise InvalidArgument("identities", f"are {len(self.entries)}; expected at most {MAX_IDENTITIES}")
        names: set[str] = set()
        for place, entry in enumerate(self.entries):
            self._add(f"identities[{place}]", entry, names)
        known = (*self._by_hash.values(), *self._by_uri.values())
        self._ends = sorted((one.until_ms for one in known if one.until_ms > now_ms()), reverse=True)  # soonest last

    def identify(self, came: Credentials) -> Identity:
        """Who it is: by the token if one was sent, else by the certificate.

        Unauthenticated: nothing came, or what came is nobody's. PermissionDenied: a certificate that no entry names.
        """
        if len(came.authorizations) > 1:
            raise Unauthenticated("authorization: is there more than once")
        if came.authorizations:
            return self._alive(self._by_hash.get(_hash(_bearer(came.authorizations[0]))), Unauthenticated(_UNKNOWN))
        if not came.uris:
            raise Unauthenticated(
                "authorization: is missing; send `authorization: Bearer <token>` or show a certificate with a URI"
            )
        if len(came.uris) > 1:
            raise Unauthenticated("certificate: names more than one URI; expected exactly one")
        return self._alive(self._by_uri.get(came.uris[0]), PermissionDenied("certificate: its URI may not call here"))

    def ended(self) -> bool:
        """Whether anybody's time has come since this was asked last."""
        before, now_ms = len(self._ends), self._now_ms()
        while self._ends and self._ends[-1] <= now_ms:
            self._ends.pop()
        return len(self._ends) < before

    def _alive(self, found: Identity | None, otherwise: Exception) -> Identity:
        if found is None or (found.until_ms and found.until_ms <= self._now_ms()):
            raise otherwise
        return found

    def _add(self, where: str, entry: Entry, names: set[str]) -> None:
        check_id(f"{where}.name", entry.name)
        where = f"{where} ({entry.name})"
        if entry.name in names:
            raise InvalidArgument(where, "the name is there twice")
        names.add(entry.name)
        identity = _identity(where, entry)
        known: dict[str, Identity] = self._by_uri if entry.uri else self._by_hash
        mark = entry.uri or entry.sha256
        if mark in known:
            raise InvalidArgument(where, f"{'uri' if entry.uri else 'sha256'} is another identity's too")
        known[mark] = identity


def parse(data: bytes, now_ms: Callable[[], int]) -> Access:
    """The identities of a file. Raises InvalidArgument, which names the field and its problem."""
    return Access(entries_in(data), now_ms)


def entries_in(data: bytes) -> tuple[Entry, ...]:
    """What a file says, not checked further. Raises InvalidArgument."""
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument("file", f"has {len(data)} bytes; expected at most {MAX_FILE_BYTES}")
    try:
        return msgspec.convert(_yaml(data) or {}, File).identities
    except msgspec.ValidationError as error:
        raise InvalidArgument("file", str(error)) from None


def as_file(entries: Sequence[Entry]) -> str:
    """The file that says this."""
    kept = {"identities": [msgspec.to_builtins(entry) for entry in entries]}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def make_token(random: Callable[[int], bytes]) -> tuple[str, str, str]:
    """A new token, its id and its hash, from a source of `n` random bytes."""
    name = b32encode(random(8)).decode().lower()[:ID_CHARACTERS]
    token = f"ent_{name}_{urlsafe_b64encode(random(32)).decode().rstrip('=')}"
    return token, name, _hash(token)


def parse_time(field: str, text: str) -> int:
    """A time of RFC 3339, in ms since 1970. Raises InvalidArgument."""
    if _TIME.fullmatch(text):
        try:
            return int(datetime.fromisoformat(text).timestamp() * 1000)
        except (ValueError, OverflowError):
            pass
    raise InvalidArgument(field, f"{text[:40]!r} is not a time like 2027-01-31T12:00:00Z")


def as_time(ms: int) -> str:
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _identity(where: str, entry: Entry) -> Identity:
    check_id(f"{where}.tenant", entry.tenant)
    if not entry.scopes:
        raise InvalidArgument(f"{where}.scopes", "is empty; expected some of consume, read, admin")
    _check_marks(where, entry)
    ends = [parse_time(f"{where}.{name}", text) for name, text in _ends(entry) if text]
    return Identity(
        entry.name,
        entry.tenant,
        frozenset(entry.scopes),
        _customers(f"{where}.customers", entry.customers),
        max(1, min(ends)) if ends else 0,
    )


def _ends(entry: Entry) -> tuple[tuple[str, str], ...]:
    return ("expires", entry.expires), ("revoked", entry.revoked)


def _check_marks(where: str, entry: Entry) -> None:
    if bool(entry.uri) == bool(entry.token or entry.sha256):
        raise InvalidArgument(where, "has to have a uri, or a token and its sha256, and not both")
    if entry.uri and not _URI.fullmatch(entry.uri):
        raise InvalidArgument(f"{where}.uri", f"{entry.uri[:80]!a} is not a URI without , ; and quotes")
    if not entry.uri and not _TOKEN_ID.fullmatch(entry.token):
        raise InvalidArgument(f"{where}.token", f"is not a token's id, {ID_CHARACTERS} of a-z 2-7; never the token")
    if not entry.uri and not _SHA256.fullmatch(entry.sha256):
        raise InvalidArgument(f"{where}.sha256", "is not 64 hexadecimal digits in lower case")


def _customers(where: str, patterns: tuple[str, ...] | None) -> tuple[str, ...]:
    if patterns is None or EVERY in patterns:
        return ()
    if not 0 < len(patterns) <= MAX_CUSTOMERS:
        raise InvalidArgument(where, f"are {len(patterns)}; expected 1..{MAX_CUSTOMERS}, or leave it out for all")
    for pattern in patterns:
        if not is_id(pattern.removesuffix(EVERY)):
            raise InvalidArgument(
                where, f"{pattern[:40]!a} is no customer's id, nor a beginning of one with * after it"
            )
    return patterns


def _covers(pattern: str, customer: str) -> bool:
    return customer.startswith(pattern[:-1]) if pattern.endswith(EVERY) else customer == pattern


def _bearer(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not _TOKEN.fullmatch(token):
        raise Unauthenticated("authorization: is not `Bearer <token>` with a token of this gateway")
    return token


def _hash(token: str) -> str:
    return sha256(token.encode()).hexdigest()


class _Loader(_Safe):
    """Nothing is there twice, and a time stays the text that it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[object] = set()
        for key, _ in node.value:
            if key.value in names:
                raise InvalidArgument(f"line {key.start_mark.line + 1}", f"the field {key.value!r} is there twice")
            names.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor(
    "tag:yaml.org,2002:timestamp",
    lambda loader, node: loader.construct_scalar(node),  # type: ignore[arg-type]
)


def _yaml(data: bytes) -> object:
    try:
        return yaml.load(data, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidArgument(f"line {line}", f"is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        raise InvalidArgument("file", "is not YAML in UTF-8") from None
