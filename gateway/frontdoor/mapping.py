"""The mapping file: how a proxied request becomes a call. Read once, at the start; what is wrong in it is named.

    requests:     {otherwise, defaults: {...}, rules: [{name, match: {path_prefix, methods, hosts}, skip, ...}]}
    forward:      {uri, method, host, denied_status}
    descriptors:  {otherwise, defaults: {...}, rules: [{name, match: {domain, entries}, skip, ...}]}

`...`: customer, subject, feature, quantity, dimensions and key, each from a source; key_suffix, on_missing, mode,
shadow, replays. A source is a text, which is the value itself, or one of {header: NAME}, {context: KEY}, {metadata:
[FILTER, KEY, ...]} for requests, {descriptor: KEY}, {hits_addend: true} for descriptors; `default`, `on_missing`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec
import yaml

from entitlement.decision import Mode
from entitlement.errors import InvalidArgument
from entitlement.identity import MAX_DIMENSIONS, check_name
from gateway.frontdoor import checks
from gateway.frontdoor.rules import (
    MODES,
    Call,
    DescriptorMatch,
    Forward,
    OnMissing,
    RequestMatch,
    Rule,
    Rules,
    Source,
    Table,
)

MAX_FILE_BYTES: Final = 1_048_576
MAX_RULES: Final = 256  # of requests, and of descriptors
KEY_HEADER, KEY_ENTRY = "x-request-id", "request_id"  # where the idempotency key is when nothing is said
USED: Final = "/used"  # ends the keys of what is charged afterwards: the same request was asked about before

Given: TypeAlias = str | Source


class Fields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a rule says of its call, and what `defaults` says for all rules of a section."""

    customer: Given | None = None
    subject: Given | None = None
    feature: Given | None = None
    quantity: Given | None = None
    dimensions: dict[str, Given] | None = None
    key: Given | None = None
    key_suffix: str | None = None
    on_missing: OnMissing | None = None
    mode: Literal["consume", "check", "adjust"] | None = None
    shadow: bool | None = None
    replays: Literal["allow", "deny"] | None = None


class RequestRule(Fields, frozen=True, kw_only=True):
    name: str = ""
    match: RequestMatch = RequestMatch()
    skip: bool = False


class DescriptorRule(Fields, frozen=True, kw_only=True):
    name: str = ""
    match: DescriptorMatch = DescriptorMatch()
    skip: bool = False


class Requests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rules: tuple[RequestRule, ...]
    defaults: Fields = Fields()
    otherwise: Literal["deny", "allow"] = "deny"


class Descriptors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rules: tuple[DescriptorRule, ...]
    defaults: Fields = Fields()
    otherwise: Literal["deny", "allow"] = "deny"


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    requests: Requests | None = None
    forward: Forward | None = None
    descriptors: Descriptors | None = None


def load(path: str) -> Rules:
    """The rules in a file. Raises InvalidArgument, which names the file, the field and its problem."""
    try:
        return read(Path(path).read_bytes())
    except (OSError, ValueError) as error:  # The latter: no file's name can have a NUL.
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidArgument("frontdoor", f"{path!r} cannot be read: {why}") from None
    except InvalidArgument as error:
        raise InvalidArgument("frontdoor", f"{path}: {error}") from None


def read(data: bytes) -> Rules:
    """The rules in a file's bytes. Raises InvalidArgument."""
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument("file", f"has {len(data)} bytes; expected at most {MAX_FILE_BYTES}")
    try:
        file = msgspec.convert(_parsed(data), File, strict=False)
    except msgspec.ValidationError as error:
        raise _explained(error) from None
    if file.requests is None and file.descriptors is None:
        raise InvalidArgument("file", "has neither requests nor descriptors; expected one of them")
    if file.forward is not None:
        if file.requests is None:
            raise InvalidArgument("forward", "has no rules to go by; expected requests beside it")
        checks.forward(file.forward, [rule.match for rule in file.requests.rules])
    requests = _table("requests", file.requests) if file.requests else None
    return Rules(requests, file.forward, _table("descriptors", file.descriptors) if file.descriptors else None)


class _Loader(yaml.BaseLoader):
    """Texts as they are written: no number is rounded, no word becomes a switch, and nothing is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        names: set[str] = set()
        for key, _ in node.value:
            if key.value in names:
                raise InvalidArgument(f"line {key.start_mark.line + 1}", f"the field {key.value!r} is there twice")
            names.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        if node.style is None and node.value in ("null", "Null", "NULL", "~"):
            line = node.start_mark.line + 1
            raise InvalidArgument(f"line {line}", f"{node.value} is no value; leave the field out, or quote the text")
        return str(super().construct_scalar(node))


def _parsed(data: bytes) -> object:
    try:
        return yaml.load(data, _Loader)  # noqa: S506 - a BaseLoader: texts, lists and dicts, nothing else
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidArgument(f"line {line}", f"is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError):
        raise InvalidArgument("file", "is not YAML in UTF-8") from None


_STRUCTS: Final[dict[str, type[msgspec.Struct]]] = {
    "": File,
    "requests": Requests,
    "forward": Forward,
    "descriptors": Descriptors,
    "requests.defaults": Fields,
    "descriptors.defaults": Fields,
    "requests.rules": RequestRule,
    "descriptors.rules": DescriptorRule,
    "requests.rules.match": RequestMatch,
    "descriptors.rules.match": DescriptorMatch,
}


def _explained(error: msgspec.ValidationError) -> InvalidArgument:
    """What msgspec says ('problem - at `$.path`'), with the fields that are known in place of one that is not."""
    problem, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem):
        struct = _STRUCTS.get(re.sub(r"\[[^]]*\]", "", path), Source)
        problem = f"has no field {unknown[1][:40]!r}; known are {', '.join(struct.__struct_fields__)}"
    return InvalidArgument(path or "file", problem)


def _table(section: str, given: Requests | Descriptors) -> Table:
    if not 1 <= len(given.rules) <= MAX_RULES:
        raise InvalidArgument(f"{section}.rules", f"has {len(given.rules)} rules; expected 1..{MAX_RULES}")
    found: tuple[RequestRule | DescriptorRule, ...] = given.rules
    rules = [_rule(section, index, rule, given.defaults) for index, rule in enumerate(found)]
    for index, rule in enumerate(rules[:-1]):
        if rule.match == type(rule.match)():
            problem = f"is never reached: rules[{index}] matches everything; expected that one as the last"
            raise InvalidArgument(f"{section}.rules[{index + 1}]", problem)
    of_paths = any(isinstance(rule.match, RequestMatch) and rule.match.path_prefix for rule in rules)
    return Table(tuple(rules), given.otherwise == "allow", of_paths)


def _rule(section: str, index: int, given: RequestRule | DescriptorRule, defaults: Fields) -> Rule:
    field, match = f"{section}.rules[{index}]", given.match
    checks.text(f"{field}.name", given.name)
    if isinstance(match, RequestMatch):
        checks.request_match(f"{field}.match", match)
    else:
        checks.descriptor_match(f"{field}.match", match)
    if not given.skip:
        return Rule(match, _Reader(section, field, given, defaults).call())
    for stray in Fields.__struct_fields__:
        if getattr(given, stray) is not None:
            raise InvalidArgument(f"{field}.{stray}", "is of no use beside skip: nothing is asked")
    return Rule(match, None)


class _Reader:
    """Reads one rule's call, from the rule and its section's defaults."""

    def __init__(self, section: str, field: str, rule: Fields, defaults: Fields) -> None:
        self._descriptor = section == "descriptors"
        self._places = ((field, rule), (f"{section}.defaults", defaults))

    def call(self) -> Call:
        mode = MODES[self._word("mode") or "consume"]
        key = Source(descriptor=KEY_ENTRY) if self._descriptor else Source(header=KEY_HEADER)
        one = Source(hits_addend=True) if self._descriptor else Source(value="1")
        quantity = self._source("quantity") or self._settled(one)
        if mode is Mode.NORMAL and "0" in (quantity.value, quantity.default):
            raise InvalidArgument(f"{self._places[0][0]}.quantity", "0 consumes nothing; expected 1 or more")
        return Call(
            customer=self._required("customer"),
            feature=self._required("feature"),
            quantity=quantity,
            key=self._source("key") or self._settled(key),
            key_suffix=self._suffix(USED if mode is Mode.ADJUST_ONLY else ""),
            subject=self._source("subject"),
            dimensions=self._dimensions(),
            mode=mode,
            shadow=next((fields.shadow for _, fields in self._places if fields.shadow is not None), False),
            replays=self._word("replays") != "deny",
        )

    def _word(self, name: str) -> str:
        return next((str(word) for _, fields in self._places if (word := getattr(fields, name))), "")

    def _suffix(self, otherwise: str) -> str:
        for field, fields in self._places:
            if fields.key_suffix is not None:
                return checks.suffix(f"{field}.key_suffix", fields.key_suffix)
        return otherwise

    def _required(self, name: str) -> Source:
        if source := self._source(name):
            return source
        raise InvalidArgument(f"{self._places[0][0]}.{name}", "is missing; expected a source here or in defaults")

    def _source(self, name: str) -> Source | None:
        for field, fields in self._places:
            if (given := getattr(fields, name)) is not None:
                return self._checked(f"{field}.{name}", name, given)
        return None

    def _dimensions(self) -> tuple[tuple[str, Source], ...]:
        found: dict[str, Source] = {}
        for field, fields in reversed(self._places):
            for name, given in (fields.dimensions or {}).items():
                check_name(f"{field}.dimensions key", name)
                found[name] = self._checked(f"{field}.dimensions[{name}]", "dimensions", given)
        if len(found) > MAX_DIMENSIONS:
            problem = f"has {len(found)} dimensions with the defaults; expected at most {MAX_DIMENSIONS}"
            raise InvalidArgument(f"{self._places[0][0]}.dimensions", problem)
        return tuple(sorted(found.items()))

    def _checked(self, field: str, name: str, given: Given) -> Source:
        source = Source(value=given) if isinstance(given, str) else given
        checks.source(field, source, descriptor=self._descriptor)
        if source.value is not None:
            checks.constant(field, name, source.value)
        none_at_all = source.default == "" and name in ("subject", "dimensions")
        if source.default is not None and not none_at_all:
            checks.constant(f"{field}.default", name, source.default)
        return self._settled(source)

    def _settled(self, source: Source) -> Source:
        """With what happens when the value is not there: an empty default stands for none."""
        said: OnMissing = "allow" if (source.on_missing or self._word("on_missing")) == "allow" else "deny"
        return msgspec.structs.replace(source, on_missing=said)
