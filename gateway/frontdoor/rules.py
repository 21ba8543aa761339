"""What a mapping says, as values: rules, what they match, and where each value of a call comes from. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, Protocol

import msgspec

from entitlement.decision import Mode

MODES: Final = {"consume": Mode.NORMAL, "check": Mode.CHECK_ONLY, "adjust": Mode.ADJUST_ONLY}
OnMissing = Literal["deny", "allow"]


class Facts(Protocol):
    """What is known of one request, or of one descriptor. Each says "" for what is not there."""

    def header(self, name: str) -> str: ...

    def context(self, key: str) -> str: ...

    def metadata(self, path: tuple[str, ...]) -> str: ...

    def entry(self, key: str) -> str: ...

    def hits(self) -> str: ...


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one value comes from: exactly one of the first six is given."""

    value: str | None = None
    header: str | None = None
    context: str | None = None
    metadata: tuple[str, ...] | None = None
    descriptor: str | None = None
    hits_addend: bool = False
    default: str | None = None  # what stands for a value that is not there; "" for a subject or dimension: none
    on_missing: OnMissing | None = None

    def __str__(self) -> str:
        """As it is told to who is refused for want of it."""
        if self.header is not None:
            return f"header {self.header}"
        if self.context is not None:
            return f"context extension {self.context}"
        if self.metadata is not None:
            return f"metadata {'/'.join(self.metadata)}"
        return "hits_addend" if self.hits_addend else f"descriptor entry {self.descriptor}"

    def find(self, facts: Facts) -> str:
        """The value, or what stands for it; "" when there is neither."""
        if self.value is not None:
            return self.value
        return self._found(facts) or self.default or ""

    def _found(self, facts: Facts) -> str:
        if self.header is not None:
            return facts.header(self.header)
        if self.context is not None:
            return facts.context(self.context)
        if self.metadata is not None:
            return facts.metadata(self.metadata)
        if self.descriptor is not None:
            return facts.entry(self.descriptor)
        return facts.hits()


class RequestMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is empty matches everything. A prefix is of whole segments: /v1/chat is not one of /v1/chats."""

    path_prefix: str = ""
    methods: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def holds(self, method: str, path: str, host: str) -> bool:
        prefix = self.path_prefix
        if prefix and path != prefix and not path.startswith(prefix if prefix.endswith("/") else f"{prefix}/"):
            return False
        return (not self.methods or method in self.methods) and (not self.hosts or host in self.hosts)


class DescriptorMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is empty matches everything; an entry's value `*` is any."""

    domain: str = ""
    entries: dict[str, str] = {}

    def holds(self, domain: str, entries: Mapping[str, str]) -> bool:
        if self.domain and self.domain != domain:
            return False
        return all(
            entries.get(key) == value or (value == "*" and key in entries) for key, value in self.entries.items()
        )


class Call(msgspec.Struct, frozen=True):
    """How a rule makes a call."""

    customer: Source
    feature: Source
    quantity: Source
    key: Source
    key_suffix: str  # two calls for one request need two keys
    subject: Source | None
    dimensions: tuple[tuple[str, Source], ...]
    mode: Mode
    shadow: bool  # decided, and never denied
    replays: bool  # whether a key that was answered before passes again


class Rule(msgspec.Struct, frozen=True):
    """`call` None: what matches passes without being asked for."""

    match: RequestMatch | DescriptorMatch
    call: Call | None


class Table(msgspec.Struct, frozen=True):
    """Rules in their order: the first one that matches counts."""

    rules: tuple[Rule, ...]
    otherwise: bool  # whether what no rule matches passes
    of_paths: bool  # whether any rule looks at the path

    def request(self, method: str, path: str, host: str) -> Rule | None:
        return first(rule for rule in self.rules if _of_request(rule.match).holds(method, path, host))

    def descriptor(self, domain: str, entries: Mapping[str, str]) -> Rule | None:
        return first(rule for rule in self.rules if _of_descriptor(rule.match).holds(domain, entries))


class Forward(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Headers in which a proxy tells /v1/authorize of the request: it must set them, whatever its client has sent."""

    uri: str
    method: str = ""
    host: str = ""
    denied_status: int = 0  # 401 or 403: of every denial, for a proxy that passes nothing else on; 0: its own


class Rules(msgspec.Struct, frozen=True):
    """A whole mapping. None: that door is not opened."""

    requests: Table | None
    forward: Forward | None
    descriptors: Table | None


def first(rules: Iterable[Rule]) -> Rule | None:
    return next(iter(rules), None)


def _of_request(match: RequestMatch | DescriptorMatch) -> RequestMatch:
    assert isinstance(match, RequestMatch)
    return match


def _of_descriptor(match: RequestMatch | DescriptorMatch) -> DescriptorMatch:
    assert isinstance(match, DescriptorMatch)
    return match
