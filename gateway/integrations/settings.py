"""What the integrations are told: one frozen value from ENTITLEMENT_LLM_* in the environment, unknown names refused."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import parse_qsl

import msgspec

from entitlement.environment import settings_in
from entitlement.errors import InvalidArgument
from entitlement.identity import check_name, check_value
from entitlement.quantity import parse_integer, within
from gateway.client import Client, Tls, Usage

PREFIX: Final = "ENTITLEMENT_LLM_"
MODEL: Final = "{model}"
KEY_SAYS: Final = ("metadata", "org", "team", "user", "key", "end_user")  # of LiteLLM
Tokenizer = Callable[[str, str], int]  # the model and a text; its tokens


def listed(text: str) -> tuple[str, ...]:
    """Of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each field is ENTITLEMENT_LLM_<FIELD>."""

    gateway: str = "127.0.0.1:8080"  # or unix:/path
    token_file: str = ""  # a file with the gateway's bearer token, read anew for every call
    tls_ca: str = ""  # a PEM file: with it the gateway is spoken to in TLS
    timeout_ms: int = 1_000  # 1..60000: for the gateway's answer before a request goes on
    away_s: int = 60  # 1..3600: how long an answer goes on while the gateway is away
    customer_header: str = "x-customer-id"  # set by whoever authenticates in front of this server
    subject_header: str = "x-subject-id"
    keys: str = ""  # a file that says whose each API key is; with it the customer's header is not read
    input: str = "tokens?model={model}&token_type=input"  # the feature and dimensions of what a model reads
    output: str = "tokens?model={model}&token_type=output"  # and of what it writes
    cached: str = ""  # and of what it had read before; empty: as input
    tokenizer: str = ""  # package.module:function(model, text) -> tokens; empty: four bytes are one token
    most_output: int = 4_096  # 1..10000000: tokens that are written at most where a request does not say
    first_output: int = 1_024  # 1..10000000: tokens that are reserved while nothing is known of a model
    percent: int = 90  # 1..100: of the answers that shall fit into what is reserved
    unstreamed: str = "most"  # what is reserved for answers that do not stream, and cannot be stopped: most, estimate
    chunk_tokens: int = 1  # 0..64: tokens that a chunk with text has at least; 0: nothing is told before the usage is
    stream_usage: str = "ask"  # what is added to streaming requests: ask, continuous (of vLLM and SGLang), leave
    on_break: str = "charge"  # of an answer that broke off: charge (input and observed output), reported
    models: str = ""  # that are served, with commas; empty: the server itself refuses what it does not serve
    open_paths: str = "/tokenize,/detokenize"  # POST to these is not charged; anything else unknown is refused

    litellm_customer: str = "team,user"  # LiteLLM: what of a key is the customer, the first that it has
    litellm_subject: str = "user"
    litellm_open: str = ""  # LiteLLM: types of calls that are not charged; anything else unknown is refused

    @property
    def free_paths(self) -> frozenset[str]:
        return frozenset(listed(self.open_paths))

    @property
    def free_calls(self) -> frozenset[str]:
        return frozenset(listed(self.litellm_open))

    def client(self) -> Client:
        """Not started."""
        return Client(
            self.gateway,
            timeout_ms=self.timeout_ms,
            token_file=self.token_file or None,
            tls=Tls(self.tls_ca) if self.tls_ca else None,
        )


class Kind(msgspec.Struct, frozen=True):
    """A feature and its dimensions, in one of which the model may stand."""

    feature: str
    dimensions: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, field: str, text: str) -> Kind:
        """Of `feature?name=value&...`. Raises InvalidArgument."""
        feature, _, query = text.partition("?")
        check_name(field, feature)
        try:
            dimensions = tuple(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else ()
        except ValueError:
            raise InvalidArgument(field, f"{text!r} is not feature?name=value&name=value") from None
        for name, value in dimensions:
            check_name(field, name)
            if value != MODEL:
                check_value(field, value)
        return cls(feature, dimensions)

    def usage(self, model: str, quantity: int) -> Usage:
        return Usage(self.feature, quantity, self.of(model))

    def of(self, model: str) -> dict[str, str]:
        return {name: model if value == MODEL else value for name, value in self.dimensions}


_NUMBERS: Final = {
    "timeout_ms": (1, 60_000),
    "away_s": (1, 3_600),
    "most_output": (1, 10_000_000),
    "first_output": (1, 10_000_000),
    "percent": (1, 100),
    "chunk_tokens": (0, 64),
}
_WORDS: Final = {
    "unstreamed": ("most", "estimate"),
    "stream_usage": ("ask", "continuous", "leave"),
    "on_break": ("charge", "reported"),
}


def load(environment: Mapping[str, str] | None = None) -> Settings:
    """Raises InvalidArgument, which names the setting, its problem and what is expected."""
    environment = os.environ if environment is None else environment
    values: dict[str, object] = dict(settings_in(environment, PREFIX))
    known = Settings.__struct_fields__
    for name in values:
        if name not in known:
            raise InvalidArgument(name, f"is not a setting; known are {', '.join(known)}")
    for name in _NUMBERS.keys() & values.keys():
        values[name] = parse_integer(name, str(values[name]), -(10**19), 10**19)
    return checked(msgspec.convert(values, Settings))


def checked(settings: Settings) -> Settings:
    for name, (low, high) in _NUMBERS.items():
        within(name, getattr(settings, name), low, high)
    for name, words in _WORDS.items():
        if getattr(settings, name) not in words:
            raise InvalidArgument(name, f"{getattr(settings, name)!r} is not one of {', '.join(words)}")
    for name in ("litellm_customer", "litellm_subject"):
        for word in listed(getattr(settings, name)):
            if word not in KEY_SAYS:
                raise InvalidArgument(name, f"{word!r} is not one of {', '.join(KEY_SAYS)}")
    for name in ("input", "output", "cached"):
        if text := getattr(settings, name):
            Kind.parse(name, text)
        elif name != "cached":
            raise InvalidArgument(name, "is empty; expected feature?name=value&name=value")
    if not settings.keys and not settings.customer_header:
        raise InvalidArgument("customer_header", "is empty, and there are no keys: nobody could be charged")
    return settings


def tokenizer_of(settings: Settings) -> Tokenizer | None:
    """The named function. Raises InvalidArgument when there is none."""
    if not settings.tokenizer:
        return None
    module, colon, name = settings.tokenizer.partition(":")
    try:
        found: Tokenizer | None = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise InvalidArgument("tokenizer", f"{settings.tokenizer!r} cannot be imported: {error}") from None
    if not callable(found):
        raise InvalidArgument("tokenizer", f"{settings.tokenizer!r} is not package.module:function")
    return found
