"""Messages that nobody should send, made by a seed: random, and mutated from valid ones. Pure.

Valid ones are made from the descriptors, so that a method or field that is added is covered by itself.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from gateway.transport.frames import frame

Words = Mapping[str, Sequence[object]]
Mutation = Callable[[random.Random, bytes], bytes]
Headers = tuple[tuple[str, str | bytes], ...]

LONG, SHORT = b"9S", b"150m"  # deadlines: what is half a message ends with nothing else on grpcio
DEEPEST = 3  # of messages in messages
LARGEST = 20_000  # bytes of a body: all of a connection's fit into its first window
INTEGERS = (0, 1, 2, 7, -1, 2**31, 2**53 - 1, 2**53, 2**53 + 1, 10**15, 10**15 + 1, 2**63 - 1, -(2**63), -(2**31))
HOSTILE = (
    *(
        "",
        "\0",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "{}",
        "{0}",
        "%s%n",
        "a:b",
        "a b",
        "\u202eabc",
        "\u200b",
        "caf\u00e9",
        "\uff11",
    ),
    *(
        "' OR 1=1 --",
        '"',
        "*",
        "../../etc/passwd",
        "${jndi:x}",
        "x" * 128,
        "x" * 129,
        "x" * 10_000,
        "nan",
        "1e3",
        "0x10",
        "-0",
    ),
)
BOUNDS = {  # of integer fields, by protobuf's type
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


class Case(NamedTuple):
    """One call: the body as it is sent, and the headers beside those that every call has."""

    path: str
    body: bytes
    headers: Headers = ()
    content: str = "application/grpc"
    timeout: bytes = LONG


class Maker:
    """Cases for the methods of a service. `words`: what fields of a name usually hold; others hold anything."""

    def __init__(self, seed: int, service: ServiceDescriptor, words: Words) -> None:
        self.rng = random.Random(seed)
        self.methods: Sequence[MethodDescriptor] = service.methods
        self._words = words
        self._numbers = count(1)
        self._tag = f"{seed:x}"

    def path(self, method: MethodDescriptor) -> str:
        return f"/{method.containing_service.full_name}/{method.name}"

    def valid(self, kind: Descriptor, depth: int = 0) -> Message:
        """A message whose fields hold what they may, mostly."""
        made: Message = message_factory.GetMessageClass(kind)()
        chosen = {oneof.name: self.rng.choice(oneof.fields) for oneof in kind.oneofs}
        for field in kind.fields:
            if field.containing_oneof is not None and chosen[field.containing_oneof.name] is not field:
                continue
            if depth < DEEPEST and self.rng.random() < 0.95:
                self._fill(made, field, depth)
        return made

    def _fill(self, made: Message, field: FieldDescriptor, depth: int) -> None:
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            getattr(made, field.name).update({"model": self.rng.choice(("m3", "x", "a/b"))})
        elif inner is not None and field.is_repeated:
            getattr(made, field.name).extend(
                self.valid(inner, depth + 1) for _ in range(self.rng.choice((1,) * 30 + (2, 3, 17)))
            )
        elif inner is not None and inner.full_name in ("google.protobuf.Timestamp", "google.protobuf.Duration"):
            if self.rng.random() < 0.05:
                getattr(made, field.name).seconds = self.rng.choice((0, 1, 60, 10**9, 2 * 10**9, 253_402_300_799))
        elif inner is not None:
            getattr(made, field.name).CopyFrom(self.valid(inner, depth + 1))
        elif field.is_repeated:
            getattr(made, field.name).extend(self._value(field) for _ in range(self.rng.choice((1, 2))))
        else:
            setattr(made, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        rng = self.rng
        usual = self._words.get(field.name)
        if usual and (len(usual) == 1 or rng.random() < 0.95):
            return rng.choice(usual)
        if field.type in BOUNDS:
            low, high = BOUNDS[field.type]
            return max(low, min(high, rng.choice(INTEGERS)))
        if field.type == FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        if field.type == FieldDescriptor.TYPE_ENUM:
            return rng.choice([*(value.number for value in field.enum_type.values), 99, -1])
        if field.type == FieldDescriptor.TYPE_STRING:
            fresh = f"{self._tag}-{next(self._numbers)}"
            return rng.choice(HOSTILE) if rng.random() < 0.05 else fresh
        return rng.randbytes(8) if field.type == FieldDescriptor.TYPE_BYTES else 0.5

    def cases(self, method: MethodDescriptor, count: int, *, json: bool = False) -> list[Case]:
        make = self.json if json else self.case
        return [make(method) for _ in range(count)]

    def case(self, method: MethodDescriptor) -> Case:
        """A call in gRPC. One in six is as it should be; its content may still be refused."""
        rng, path = self.rng, self.path(method)
        messages = [self._message(method) for _ in range(rng.choice((0, 1, 1, 2, 5)) if method.client_streaming else 1)]
        watched = method.server_streaming and not method.client_streaming  # It ends by its deadline alone.
        if rng.random() < 0.8:
            timeout = rng.choice(TIMEOUTS) if rng.random() < 0.06 and not watched else SHORT if watched else LONG
            return Case(path, b"".join(map(frame, messages)), timeout=timeout)
        body = rng.choice(FRAMINGS)(rng, messages[0] if messages else b"")[:LARGEST]
        encodings: tuple[Headers, ...] = ((), (("grpc-encoding", "gzip"),), (("grpc-encoding", "identity"),))
        return Case(path, body, rng.choice(encodings), timeout=SHORT)

    def _message(self, method: MethodDescriptor) -> bytes:
        rng = self.rng
        if rng.random() < 0.15:
            return rng.randbytes(rng.choice((0, 1, 2, 5, 20, 200, 2_000)))
        data = self.valid(method.input_type).SerializeToString()
        for _ in range(rng.choice((0, 0, 1, 1, 1, 1, 2, 4))):
            data = rng.choice(MUTATIONS)(rng, data)[: LARGEST // 6]
        return data

    def json(self, method: MethodDescriptor) -> Case:
        """The same in JSON over HTTP."""
        rng = self.rng
        text = json_format.MessageToJson(self.valid(method.input_type), indent=None)
        for _ in range(rng.choice((0, 1, 1, 2))):
            text = rng.choice(TEXTS)(rng, text)
        body = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.15:
            body = rng.choice((*MUTATIONS, lambda rng, _: rng.randbytes(50)))(rng, body)
        content = (
            "application/json"
            if rng.random() < 0.97
            else rng.choice(("application/jso", "text/json", "application/json;x"))
        )
        return Case(self.path(method), body[:LARGEST], content=content)

    def strange(self, method: MethodDescriptor) -> Case:
        """A good message under headers, or to a path, that are not: what breaks here may break a connection."""
        rng, body = self.rng, frame(self.valid(method.input_type).SerializeToString()[: LARGEST // 6])
        names = (
            "x-a",
            "X-Upper",
            "",
            "a b",
            "te",
            "grpc-timeout",
            "x-bin",
            ":path",
            ":odd",
            "content-length",
            "host",
            "x\0",
            "connection",
        )
        values = (
            b"",
            b"\0",
            b"a\nb",
            b"\xff\xfe",
            b"y" * 3_000,
            b"%zz",
            b"-1",
            b"9" * 30,
            "\u202e".encode(),
            b"AAA=",
            b"gzip,,",
        )
        headers = tuple((rng.choice(names), rng.choice(values)) for _ in range(rng.choice((1, 1, 2, 120))))
        paths = (
            self.path(method),
            self.path(method) + "x",
            "/",
            "",
            "*",
            "//",
            "/a/b/c",
            "/%00/%ff",
            "/" + "x" * 5_000,
            "/\xff/\x00",
        )
        return Case(rng.choice(paths), body, headers, timeout=rng.choice(TIMEOUTS))


# Of a message's bytes.


def flipped(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def spliced(rng: random.Random, data: bytes) -> bytes:
    at, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    return data[:at] + data[other:]


def inserted(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 3, 30))) + data[at:]


def repeated(rng: random.Random, data: bytes) -> bytes:
    return data * rng.choice((2, 3, 20))


def unknown(rng: random.Random, data: bytes) -> bytes:
    """Fields that the contract does not have, of every wire type; also numbers that none may have."""
    number = rng.choice((15, 99, 2_047, 18_999, 2**29 - 1, 2**29, 0))
    bodies = {
        0: varint(rng.choice((0, 2**64 - 1))),
        1: rng.randbytes(8),
        2: sized(rng.randbytes(9)),
        3: b"",
        5: rng.randbytes(4),
    }
    wire = rng.choice((0, 1, 2, 3, 4, 5, 6, 7))
    added = varint(number << 3 | wire) + bodies.get(wire, b"")
    return added + data if rng.random() < 0.5 else data + added


def nested(rng: random.Random, data: bytes) -> bytes:
    """Deep inside unknown fields, or inside groups that may not end."""
    depth = rng.choice((5, 99, 101, 500))
    if rng.random() < 0.5:
        return data + varint(99 << 3 | 3) * depth + varint(99 << 3 | 4) * rng.choice((0, depth - 1, depth))
    out = b""
    for _ in range(depth):
        out = varint(rng.choice((1, 2, 4, 99)) << 3 | 2) + sized(out)
    return data + out


def wrong_type(rng: random.Random, data: bytes) -> bytes:
    """A field of a number that is known, under another wire type."""
    number, wire = rng.randrange(1, 10), rng.choice((0, 1, 2, 3, 4, 5, 6, 7))
    return varint(number << 3 | wire) + rng.randbytes(rng.choice((0, 1, 8))) + data


def huge(rng: random.Random, data: bytes) -> bytes:
    """A number or a length beyond what it may be."""
    number, wire = rng.randrange(1, 10), rng.choice((0, 2))
    return (
        data
        + varint(number << 3 | wire)
        + rng.choice((b"\xff" * 9 + b"\x01", b"\xff" * 11, b"\x80" * 20, b"\xff\xff\xff\xff\x07"))
    )


def text(rng: random.Random, data: bytes) -> bytes:
    """A string field with what is no UTF-8, or what nobody should name anything."""
    bad = rng.choice((b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", rng.choice(HOSTILE).encode()))
    return data + varint(rng.randrange(1, 10) << 3 | 2) + sized(bad)


def inside(rng: random.Random, data: bytes) -> bytes:
    """The same done to a field that holds a message or a text, its length kept right."""
    fields = split(data)
    nests = [index for index, (tag, body) in enumerate(fields) if tag[0] & 7 == 2 and body]
    if not nests:
        return data
    index = rng.choice(nests)
    fields[index] = (fields[index][0], rng.choice(MUTATIONS[:-1])(rng, fields[index][1]))
    rng.shuffle(fields)
    return b"".join(tag + (sized(body) if tag[0] & 7 == 2 else body) for tag, body in fields)


MUTATIONS: tuple[Mutation, ...] = (
    *(flipped, truncated, spliced, inserted, repeated, unknown, nested, wrong_type, huge, text, inside),
)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def sized(data: bytes) -> bytes:
    return varint(len(data)) + data


def split(data: bytes) -> list[tuple[bytes, bytes]]:
    """Tag and content of each field, as far as they can be read."""
    found, at = [], 0
    try:
        while at < len(data):
            begin = at
            number, at = _read(data, at)
            tag = data[begin:at]
            size, start = {0: (_read(data, at)[1] - at, at), 1: (8, at), 5: (4, at)}.get(number & 7, (0, at))
            if number & 7 == 2:
                size, start = _read(data, at)
            found.append((tag, data[start : start + size]))
            at = start + size
    except IndexError:
        pass
    return found


def _read(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


# Of what a message comes in.

TIMEOUTS = (
    b"1n",
    b"0m",
    b"99999999H",
    b"999999999H",
    b"1",
    b"",
    b"-1S",
    b"1.5S",
    b"S",
    b" 1S",
    b"\xff",
    b"1x",
    b"00000001S",
)


def _prefixed(rng: random.Random, data: bytes) -> bytes:
    """A length that lies, a flag that there is not."""
    size = rng.choice((0, 1, len(data) + 1, max(0, len(data) - 1), 2**31, 2**32 - 1, 5_000_000))
    return bytes((rng.choice((0, 1, 2, 255)),)) + size.to_bytes(4, "big") + data


def _zipped(rng: random.Random, data: bytes) -> bytes:
    packed = gzip.compress(data)
    return b"\1" + frame(rng.choice((packed, packed[:-3], packed + b"x", flipped(rng, packed), rng.randbytes(30))))[1:]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return truncated(rng, frame(data))


def _several(rng: random.Random, data: bytes) -> bytes:
    return frame(data) * rng.choice((2, 30)) + rng.randbytes(rng.choice((0, 3)))


def _bare(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((data, b"", b"\0", rng.randbytes(40)))


FRAMINGS: tuple[Mutation, ...] = (_prefixed, _zipped, _cut, _several, _bare)

# Of a JSON text.

_TOKENS = (
    *(
        "null",
        "true",
        "[]",
        "{}",
        "1e400",
        "-1",
        "1.5",
        "NaN",
        "Infinity",
        "9" * 5_000,
        '"\\ud800"',
        '"\\u0000"',
        "\ud800",
    ),
    *(
        '"\u202e"',
        "[" * 2_000,
        '{"a":' * 500,
        '"',
        "'",
        "\\",
        ",",
        '"1e3"',
        '"0x10"',
        '" 7 "',
        '"\uff11"',
        "99",
        '"MODE_X"',
        "\ufeff",
    ),
)


def _token(rng: random.Random, text: str) -> str:
    """One value in place of another."""
    colons = [at for at, letter in enumerate(text) if letter == ":"]
    if not colons:
        return rng.choice(_TOKENS)
    at = rng.choice(colons) + 1
    end = min((found for found in (text.find(",", at), text.find("}", at)) if found >= 0), default=len(text))
    return text[:at] + rng.choice(_TOKENS) + text[end:]


def _field(rng: random.Random, text: str) -> str:
    name = rng.choice(("customer", "usage", "nope", "@type", "\\ud800", "", "idempotencyKey", "idempotency_key"))
    return "{" + f'"{name}":{rng.choice(_TOKENS)},' + text[1:]


def _letters(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice((*_TOKENS, "")) + text[at + rng.choice((0, 1, 5)) :]


def _twice(rng: random.Random, text: str) -> str:
    return rng.choice((text + text, f"[{text}]", json.dumps(text), text[: len(text) // 2], "{" + text))


TEXTS: tuple[Callable[[random.Random, str], str], ...] = (_token, _field, _letters, _twice)
