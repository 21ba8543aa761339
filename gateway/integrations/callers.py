"""Who a request is charged to: by headers that a proxy has set, or by the API key it carries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from entitlement.errors import InvalidArgument
from entitlement.identity import check_id
from gateway.integrations.settings import Settings, listed


class Caller(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    customer: str
    subject: str = ""


class Callers:
    """Headers' names are in lower case."""

    def __init__(self, settings: Settings) -> None:
        """Raises InvalidArgument for a file of keys that cannot be read."""
        self._customer = settings.customer_header.lower()
        self._subject = settings.subject_header.lower()
        self._keys = read_keys(settings.keys) if settings.keys else None

    def find(self, headers: Mapping[str, str]) -> Caller | None:
        """None: it does not say, or with a key that is nobody's. Raises InvalidArgument for what can be no id."""
        if self._keys is not None:  # Then no header counts: whoever has a key could set it.
            scheme, _, key = headers.get("authorization", "").partition(" ")
            return self._keys.get(digest(key.strip())) if scheme.lower() == "bearer" else None
        if customer := headers.get(self._customer, ""):
            return _checked(Caller(customer, headers.get(self._subject, "")))
        return None


class Key(Protocol):
    """An API key as the LiteLLM proxy knows it: what a Caller may be read of."""

    metadata: Mapping[str, object] | None
    org_id: str | None
    team_id: str | None
    user_id: str | None
    key_alias: str | None
    end_user_id: str | None


def caller_of_key(settings: Settings, key: Key) -> Caller:
    """By the first of what the settings name that the key has. Raises InvalidArgument for none, and for no id."""
    if not (customer := _said(key, "customer", settings.litellm_customer)):
        raise InvalidArgument("customer", f"the key has none of {settings.litellm_customer}")
    subject = _said(key, "subject", settings.litellm_subject)
    return _checked(Caller(customer, subject if subject != customer else ""))


def _said(key: Key, what: str, sources: str) -> str:
    found = {
        "metadata": (key.metadata or {}).get(f"entitlement_{what}"),
        "org": key.org_id,
        "team": key.team_id,
        "user": key.user_id,
        "key": key.key_alias,
        "end_user": key.end_user_id,
    }
    return next((str(found[name]) for name in listed(sources) if found[name]), "")


def digest(key: str) -> str:
    """What stands for an API key in the file of keys."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(file: str) -> dict[str, Caller]:
    """JSON: {"<SHA-256 of the key, in hex>": {"customer": "...", "subject": "..."}}."""
    try:
        keys = msgspec.json.decode(Path(file).read_bytes(), type=dict[str, Caller])
    except (OSError, msgspec.MsgspecError) as error:
        raise InvalidArgument("keys", f"{file!r} cannot be read: {error}") from None
    for number, (name, caller) in enumerate(keys.items(), 1):
        if len(name) != 64 or set(name) - set("0123456789abcdef"):
            raise InvalidArgument("keys", f"entry {number} of {file!r} is not named by a SHA-256 in 64 hex digits")
        _checked(caller)
    return keys


def _checked(caller: Caller) -> Caller:
    check_id("customer", caller.customer)
    if caller.subject:
        check_id("subject", caller.subject)
    return caller
