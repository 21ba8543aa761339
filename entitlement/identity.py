"""Who and what: the one place that says which texts may name a tenant, customer, subject, key, feature or dimension."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

from entitlement.errors import InvalidArgument

MAX_ID_BYTES = 128
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 8
DIGEST_BYTES = 16

# No ':' '{' '}' ';' ',' space, control or non-ASCII character: an id stands unescaped in keys, records and logs.
_ID = re.compile(r"[A-Za-z0-9._~@/+=-]{1,128}", re.ASCII)
ID_BYTES = bytes(code for code in range(128) if _ID.fullmatch(chr(code)))  # all that may stand in an id
_NAME = re.compile(r"[a-z][a-z0-9._-]{0,63}", re.ASCII)
_VALUE = re.compile(r"[A-Za-z0-9._~@/+-]{1,128}", re.ASCII)

is_id: Callable[[str], object] = _ID.fullmatch
is_name: Callable[[str], object] = _NAME.fullmatch
is_value: Callable[[str], object] = _VALUE.fullmatch


def check_id(field: str, text: str) -> str:
    """An id (tenant, customer, subject, idempotency key, grant, ...): 1..128 of A-Z a-z 0-9 . _ ~ @ / + = -"""
    if is_id(text):
        return text
    raise InvalidArgument(field, _problem(text, MAX_ID_BYTES, "A-Z a-z 0-9 . _ ~ @ / + = -"))


def check_name(field: str, text: str) -> str:
    """A feature or dimension name: 1..64 of a-z 0-9 . _ -, a letter first."""
    if is_name(text):
        return text
    raise InvalidArgument(field, _problem(text, MAX_NAME_BYTES, "a-z 0-9 . _ - with a letter first"))


def check_value(field: str, text: str) -> str:
    """A dimension's value: 1..128 of A-Z a-z 0-9 . _ ~ @ / + -"""
    if is_value(text):
        return text
    raise InvalidArgument(field, _problem(text, MAX_ID_BYTES, "A-Z a-z 0-9 . _ ~ @ / + -"))


def key_digest(tenant: str, customer: str, key: str) -> bytes:
    """16 bytes that stand for one idempotency key of one customer.

    Injective up to BLAKE2b collisions: NUL cannot occur in an id, so the joined text is unambiguous.
    """
    return hashlib.blake2b(f"{tenant}\0{customer}\0{key}".encode(), digest_size=DIGEST_BYTES).digest()


def fingerprint(payload: bytes) -> bytes:
    """8 bytes that a repeated key's payload must match."""
    return hashlib.blake2b(payload, digest_size=8).digest()


def _problem(text: str, limit: int, alphabet: str) -> str:
    if not text:
        return f"is empty; expected 1..{limit} bytes"
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limit:
        return f"has {size} bytes; expected 1..{limit}"
    return f"{text[:40]!a} has a character outside {alphabet}"
