"""A protobuf message from its JSON form, read strictly.

protobuf's own reader takes '1e3', '1_000' and digits of any script for integers, 1.5 for an enum's 1, and tells callers
of Python's insides. Here an integer is plain, a name is known, a text is Unicode, and an error says where and why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import NoReturn

from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from entitlement.errors import InvalidArgument
from entitlement.quantity import within

MAX_SHOWN = 40  # characters of a caller's text in a message

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,19})", re.ASCII)
_BITS_32, _BITS_64 = (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1)
_BOUNDS: Mapping[int, tuple[int, int]] = {
    **dict.fromkeys((FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_SINT32, FieldDescriptor.TYPE_SFIXED32), _BITS_32),
    **dict.fromkeys((FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_SINT64, FieldDescriptor.TYPE_SFIXED64), _BITS_64),
    **dict.fromkeys((FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32), (0, 2**32 - 1)),
    **dict.fromkeys((FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64), (0, 2**64 - 1)),
}


def parse(kind: Descriptor, body: bytes) -> Message:
    """The message; an empty body is an empty one. Raises InvalidArgument, whose field is the value's place."""
    value = _loaded(body) if body else {}
    if not isinstance(value, dict):
        raise InvalidArgument("body", "expected a JSON object")
    _check_message("", kind, value)
    try:
        return json_format.ParseDict(value, message_factory.GetMessageClass(kind)())
    except json_format.ParseError:  # Its text may be Python's.
        raise InvalidArgument("body", f"is not the JSON form of {kind.name}") from None


def _loaded(body: bytes) -> object:
    try:
        return json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except InvalidArgument:
        raise
    except (ValueError, RecursionError):  # Not UTF-8, not JSON, a number too long to read, too deep.
        raise InvalidArgument("body", "expected a JSON object") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise InvalidArgument(_shown(name), "is given twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise InvalidArgument("body", f"{text} is not JSON")


@cache
def _fields(kind: Descriptor) -> dict[str, FieldDescriptor]:
    """By both names that a field has."""
    return {name: field for field in kind.fields for name in (field.name, field.json_name)}


def _check_message(place: str, kind: Descriptor, value: object) -> None:
    if kind.full_name.startswith("google.protobuf."):
        _check_known(place, kind, value)
        return
    if not isinstance(value, dict):
        raise InvalidArgument(place, "expected an object")
    for name, inner in value.items():
        field = _fields(kind).get(name)
        if field is None:
            raise InvalidArgument(place or "body", f"{_shown(name)} is no field of {kind.name}")
        if name != field.json_name and field.json_name in value:
            raise InvalidArgument(place or "body", f"{name} and {field.json_name} are one field")
        if inner is not None:
            _check_field(f"{place}.{name}" if place else name, field, inner)


def _check_known(place: str, kind: Descriptor, value: object) -> None:
    """Timestamp and Duration: what their own reader takes, in ASCII."""
    made = message_factory.GetMessageClass(kind)()
    try:
        if not isinstance(value, str) or not value.isascii():
            raise ValueError
        made.FromJsonString(value)  # type: ignore[attr-defined]
    except (AttributeError, ValueError, OverflowError):
        raise InvalidArgument(place, f"{_shown(value)} is not a {kind.name}") from None


def _check_field(place: str, field: FieldDescriptor, value: object) -> None:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        if not isinstance(value, dict):
            raise InvalidArgument(place, "expected an object")
        for key, one in value.items():
            _check_value(f"{place}[{_shown(key)}]", inner.fields_by_name["key"], key)
            _check_value(f"{place}[{_shown(key)}]", inner.fields_by_name["value"], one)
    elif field.is_repeated:
        if not isinstance(value, list):
            raise InvalidArgument(place, "expected a list")
        for index, one in enumerate(value):
            _check_value(f"{place}[{index}]", field, one)
    else:
        _check_value(place, field, value)


def _check_value(place: str, field: FieldDescriptor, value: object) -> None:
    if field.message_type is not None:
        _check_message(place, field.message_type, value)
    elif field.type in _BOUNDS:
        within(place, _integer(place, value), *_BOUNDS[field.type])
    elif field.enum_type is not None:
        if not isinstance(value, str):
            within(place, _integer(place, value), *_BITS_32)
        elif not value.isascii() or value not in field.enum_type.values_by_name:
            raise InvalidArgument(place, f"{_shown(value)} is no {field.enum_type.name}")
    elif field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise InvalidArgument(place, f"{_shown(value)} is neither true nor false")
    elif field.type == FieldDescriptor.TYPE_STRING:
        _check_text(place, value)


def _integer(place: str, value: object) -> int:
    if type(value) is int:
        return value
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    raise InvalidArgument(place, f"{_shown(value)} is not a plain decimal integer")


def _check_text(place: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidArgument(place, f"{_shown(value)} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(place, "has half of a surrogate pair") from None


def _shown(value: object) -> str:
    """A line of ASCII, whatever it is."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
