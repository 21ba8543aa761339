"""The envelope of every published event: CloudEvents 1.0, JSON format, structured mode. Pure.

Sources: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md and, for `data`,
https://protobuf.dev/programming-guides/json/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

import msgspec
import orjson

INT64_MIN: Final = -(2**63)
UINT64_MAX: Final = 2**64 - 1


class Int32(int):
    """An int32 field of the data: stays a JSON number. Any other integer is an int64 or uint64."""


def source_of(tenant: str) -> str:
    """The CloudEvents source of a tenant: a URI reference, so what may not stand in one is percent-encoded."""
    return f"/entitlement/{quote(tenant, safe='')}"


def envelope(
    *,
    id: str,
    source: str,
    type: str,
    subject: str,
    time: str,
    partitionkey: str,
    traceparent: str = "",
    data: Mapping[str, object] | msgspec.Struct,
) -> bytes:
    """One event as one line of UTF-8 JSON, the same bytes for the same arguments.

    `time` is RFC 3339. `data` is written in the JSON form of its protobuf message: names as given (for a struct, its
    encoded names: declare it with rename="camel"), int64 and uint64 as decimal strings, `Int32` as numbers, None left
    out. ValueError: an attribute is empty, or an integer has more than 64 bits. TypeError: a float, bytes or foreign
    object in the data, or text that is not Unicode.
    """
    attributes = {
        "id": id,
        "source": source,
        "type": type,
        "subject": subject,
        "time": time,
        "partitionkey": partitionkey,
    }
    for name, value in attributes.items():
        if not value:
            raise ValueError(f"the CloudEvents attribute {name} is empty")
    if traceparent:  # https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/extensions/distributed-tracing.md
        attributes["traceparent"] = traceparent
    return orjson.dumps(
        {"specversion": "1.0", **attributes, "datacontenttype": "application/json", "data": _json_form(data, "data")}
    )


def _json_form(value: object, path: str) -> object:
    if value is None or isinstance(value, str | bool | Int32):
        return value
    if isinstance(value, int):
        return _int64(value, path)
    if isinstance(value, Mapping):
        return _object(value, path)
    if isinstance(value, list | tuple):
        return [_json_form(item, path) for item in value]
    if isinstance(value, msgspec.Struct):
        names = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        return _object({encoded: getattr(value, name) for encoded, name in names}, path)
    raise TypeError(f"{path} is a {type(value).__name__}; expected text, an integer, a boolean, a list or an object")


def _object(fields: Mapping[str, object], path: str) -> dict[str, object]:
    return {name: _json_form(value, f"{path}.{name}") for name, value in fields.items() if value is not None}


def _int64(value: int, path: str) -> str:
    if not INT64_MIN <= value <= UINT64_MAX:
        raise ValueError(f"{path} is {value}; expected an integer of 64 bits")
    return str(value)
