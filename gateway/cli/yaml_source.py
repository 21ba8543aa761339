"""YAML read with its line numbers: every value knows where it stands, and every fault says so.

A fault reads 'FILE:LINE: path: found X, expected Y'. Numbers and amounts are read from their text as it was written; no
float is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Final, NamedTuple, TypeVar

import yaml
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.errors import InvalidArgument
from entitlement.quantity import MAX_NANOS, parse_amount, parse_integer

MAX_FILE_BYTES: Final = 8 * 1024 * 1024
MAX_ITEMS: Final = 100_000  # in one list
MAX_TEXT: Final = 256
_NULL: Final = "tag:yaml.org,2002:null"

_flatten = yaml.constructor.SafeConstructor().flatten_mapping


class Alphabet(NamedTuple):
    """Which texts a field takes."""

    accepts: Callable[[str], object]
    expected: str


Chosen = TypeVar("Chosen")

PRINTABLE: Final = Alphabet(
    lambda text: len(text) <= MAX_TEXT and text.isprintable(), f"at most {MAX_TEXT} printable characters on one line"
)


@dataclass(frozen=True)
class Where:
    line: int
    path: str


class Fault(Exception):
    """One thing that is wrong in a file."""

    def __init__(self, where: Where, found: str, expected: str) -> None:
        place = f"{where.path}: " if where.path else ""
        super().__init__(f"{place}found {found}, expected {expected}")
        self.where = where


class BadFile(Exception):
    """Everything that is wrong in a file, a line each, in the order of its lines."""

    def __init__(self, file: str, faults: list[Fault]) -> None:
        ordered = sorted(faults, key=lambda fault: fault.where.line)
        super().__init__("\n".join(f"{file}:{fault.where.line}: {fault}" for fault in ordered))


class Value:
    """A node of the file and the path to it."""

    def __init__(self, node: yaml.Node, path: str, line: int | None = None) -> None:
        self.node = node
        self.where = Where(line or node.start_mark.line + 1, path)

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)

    def fault(self, expected: str) -> Fault:
        return Fault(self.where, self._found(), expected)

    def text(self, alphabet: Alphabet = PRINTABLE) -> str:
        text = self._scalar()
        if text is None or not alphabet.accepts(text):
            raise self.fault(alphabet.expected)
        return text

    def amount(self, high: int = MAX_NANOS) -> int:
        """Nanos of a decimal text such as \"12.50\", exactly."""
        try:
            nanos = parse_amount("", self._scalar() or "")
        except InvalidArgument:
            nanos = -1
        if not 0 <= nanos <= high:
            raise self.fault('a decimal amount such as "12.50", not negative, with at most 9 decimals')
        return nanos

    def integer(self, low: int, high: int) -> int:
        try:
            return parse_integer("", self._scalar() or "", low, high)
        except InvalidArgument:
            raise self.fault(f"a whole number from {low} to {high}") from None

    def boolean(self) -> bool:
        return self.choice({"false": False, "true": True})

    def choice(self, known: Mapping[str, Chosen]) -> Chosen:
        text = self._scalar() or ""
        if text not in known:
            raise self.fault(f"one of {', '.join(known)}{suggest(text, list(known))}")
        return known[text]

    def time(self) -> Timestamp:
        """A date, or a time with its zone."""
        text = self._scalar() or ""
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise self.fault("a time such as 2025-01-31T00:00:00Z or a date") from None
        if len(text) > len("2025-01-31") and moment.tzinfo is None:
            raise self.fault("a time with its zone, such as 2025-01-31T00:00:00Z")
        stamp = Timestamp()
        stamp.FromDatetime(moment.astimezone(UTC) if moment.tzinfo else moment)
        return stamp

    def items(self) -> list[Value]:
        """The elements of a list; nothing at all is an empty one."""
        if self.node.tag == _NULL:
            return []
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.fault("a list")
        if len(self.node.value) > MAX_ITEMS:
            raise Fault(self.where, f"{len(self.node.value)} elements", f"at most {MAX_ITEMS}")
        return [Value(node, f"{self.where.path}[{at}]") for at, node in enumerate(self.node.value)]

    def fields(self, *known: str) -> Fields:
        """The fields of a mapping, each known and given once."""
        found = self.pairs()
        for name, value in found.items():
            if name not in known:
                expected = f"one of {', '.join(known)}{suggest(name, list(known))}"
                raise Fault(Where(value.where.line, value.where.path), "an unknown field", expected)
        return Fields(self, found)

    def pairs(self) -> dict[str, Value]:
        if not isinstance(self.node, yaml.MappingNode):
            raise self.fault("fields (name: value)")
        found: dict[str, Value] = {}
        for key, node in self.node.value:
            name = str(key.value)
            value = Value(node, self._path(name), key.start_mark.line + 1)
            if name in found:
                raise Fault(value.where, "the field twice", f"it once (it is on line {found[name].where.line} too)")
            found[name] = value
        return self._merged(self.node) if "<<" in found else found

    def _merged(self, mapping: yaml.MappingNode) -> dict[str, Value]:
        """The fields with those that '<<' names, which give way to what stands here."""
        try:
            _flatten(mapping)
        except yaml.MarkedYAMLError:
            where = Where(self.where.line, self._path("<<"))
            raise Fault(where, "no fields", "an alias of fields, such as *defaults") from None
        pairs: list[tuple[yaml.Node, yaml.Node]] = mapping.value
        return {str(key.value): Value(node, self._path(str(key.value)), key.start_mark.line + 1) for key, node in pairs}

    def _path(self, name: str) -> str:
        return f"{self.where.path}.{name}" if self.where.path else name

    def _scalar(self) -> str | None:
        """The text as it was written; None where there is nothing, a list or fields."""
        plain = isinstance(self.node, yaml.ScalarNode) and self.node.tag != _NULL
        return str(self.node.value) if plain else None

    def _found(self) -> str:
        match self.node:
            case yaml.ScalarNode(tag=tag) if tag == _NULL:
                return "nothing"
            case yaml.ScalarNode(value=text):
                return repr(text if len(text) <= 40 else f"{text[:40]}…")
            case yaml.SequenceNode():
                return "a list"
        return "fields"


class Fields:
    """The fields of one mapping. Those asked for by a method may be left out; `[]` is for one that must be there."""

    def __init__(self, owner: Value, found: dict[str, Value]) -> None:
        self.owner = owner
        self._found = found

    def __getitem__(self, name: str) -> Value:
        if name not in self._found:
            where = self.owner.where
            raise Fault(Where(where.line, f"{where.path}.{name}".lstrip(".")), "nothing", "this field: it is required")
        return self._found[name]

    def get(self, name: str) -> Value | None:
        return self._found.get(name)

    def items(self, name: str) -> list[Value]:
        value = self.get(name)
        return value.items() if value else []

    def pairs(self, name: str) -> dict[str, Value]:
        value = self.get(name)
        return value.pairs() if value else {}

    def text(self, name: str) -> str:
        value = self.get(name)
        return value.text() if value else ""

    def boolean(self, name: str) -> bool:
        value = self.get(name)
        return value.boolean() if value else False

    def choice(self, name: str, known: Mapping[str, Chosen], default: Chosen) -> Chosen:
        value = self.get(name)
        return value.choice(known) if value else default

    def integer(self, name: str, low: int, high: int, default: int = 0) -> int:
        value = self.get(name)
        return value.integer(low, high) if value else default

    def amount(self, name: str) -> int:
        value = self.get(name)
        return value.amount() if value else 0

    def time(self, name: str) -> Timestamp | None:
        value = self.get(name)
        return value.time() if value else None


def read_root(file: str, data: bytes) -> Value:
    """The file's one document. BadFile says on which line it stops being YAML."""
    if len(data) > MAX_FILE_BYTES:
        raise BadFile(file, [Fault(Where(1, ""), f"{len(data)} bytes", f"at most {MAX_FILE_BYTES}")])
    try:
        node = yaml.SafeLoader(data).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise BadFile(file, [Fault(Where(line, ""), f"a syntax error ({error.problem})", "YAML")]) from None
    except RecursionError:
        raise BadFile(file, [Fault(Where(1, ""), "too many levels", "a catalogue")]) from None
    except yaml.reader.ReaderError as error:
        line = data[: error.position].count(b"\n") + 1 if isinstance(error.position, int) else 1
        raise BadFile(file, [Fault(Where(line, ""), f"what is not text ({error.reason})", "YAML in UTF-8")]) from None
    if node is None:
        raise BadFile(file, [Fault(Where(1, ""), "an empty file", "a catalogue")])
    return Value(node, "")


def suggest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
