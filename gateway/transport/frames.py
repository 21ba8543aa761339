"""gRPC's message framing and header texts (gRPC over HTTP/2, PROTOCOL-HTTP2.md): pure, no I/O."""

from __future__ import annotations

import zlib
from functools import lru_cache
from urllib.parse import quote_from_bytes, unquote_to_bytes

PREFIX = 5  # one flag byte and four of length, before every message
_GZIP = 31  # zlib's window bits for a gzip header and trailer
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class BadFrame(Exception):
    """The peer broke the framing. `oversized`: only by more bytes than there is room for."""

    def __init__(self, problem: str, *, oversized: bool = False) -> None:
        super().__init__(problem)
        self.oversized = oversized


class Room:
    """Bytes of requests that have arrived and that nobody has taken yet, over all calls: bounded."""

    def __init__(self, limit: int) -> None:
        self.taken = 0
        self._limit = limit

    def take(self, count: int) -> None:
        """Raises BadFrame when that is more than there is room for; `give` back what was taken all the same."""
        self.taken += count
        if self.taken > self._limit:
            raise BadFrame(f"unfinished requests hold more than {self._limit} bytes", oversized=True)

    def give(self, count: int) -> None:
        self.taken -= count


def frame(message: bytes) -> bytes:
    """The message with its prefix, uncompressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def compressed_frame(message: bytes) -> bytes:
    """The message with its prefix, in gzip."""
    packer = zlib.compressobj(wbits=_GZIP)
    packed = packer.compress(message) + packer.flush()
    return b"\1" + len(packed).to_bytes(4, "big") + packed


class Frames:
    """Cuts a body into messages as its bytes arrive. Never holds more than one message of at most `limit` bytes."""

    def __init__(self, limit: int, *, gzip: bool) -> None:
        self._limit = limit
        self._gzip = gzip
        self._buffer = bytearray()

    @property
    def held(self) -> int:
        """Bytes of a message that is not complete."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now. Raises BadFrame."""
        buffer, found = self._buffer, []
        buffer += data
        while len(buffer) >= PREFIX:
            size = int.from_bytes(buffer[1:PREFIX], "big")
            check_size(size, self._limit)
            if len(buffer) < PREFIX + size:
                break
            found.append(unpack(buffer[0], bytes(buffer[PREFIX : PREFIX + size]), self._limit, gzip=self._gzip))
            del buffer[: PREFIX + size]
        return found

    def end(self) -> None:
        """The body has ended. Raises BadFrame when it ended in the middle of a message."""
        if self._buffer:
            raise BadFrame(f"the body ended in the middle of a message, {len(self._buffer)} bytes into it")


def only(body: bytes, limit: int, *, gzip: bool) -> bytes:
    """The single message of a whole body. Raises BadFrame."""
    if len(body) < PREFIX:
        raise BadFrame("the body ended in the middle of a message" if body else "the body holds no message")
    size = int.from_bytes(body[1:PREFIX], "big")
    check_size(size, limit)
    if len(body) != PREFIX + size:
        raise BadFrame(f"the message's prefix says {size} bytes; the body has {len(body) - PREFIX}")
    return body[PREFIX:] if body[0] == 0 else unpack(body[0], body[PREFIX:], limit, gzip=gzip)


def check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BadFrame(f"message has {size} bytes; the limit is {limit}", oversized=True)


def unpack(flag: int, data: bytes, limit: int, *, gzip: bool) -> bytes:
    """The message in a frame; a compressed one is inflated to at most `limit` bytes, whatever it claims."""
    if flag == 0:
        return data
    if flag != 1 or not gzip:
        raise BadFrame(f"frame flag {flag} without a grpc-encoding that says how to read it")
    unpacker = zlib.decompressobj(wbits=_GZIP)
    try:
        message = unpacker.decompress(data, limit + 1)
    except zlib.error:
        raise BadFrame("gzip message does not inflate") from None
    if len(message) > limit:
        raise BadFrame(f"message inflates to more than the limit of {limit} bytes", oversized=True)
    if not unpacker.eof:
        raise BadFrame("gzip message is cut short")
    if unpacker.unused_data:
        raise BadFrame(f"gzip message is followed by {len(unpacker.unused_data)} bytes that belong to nothing")
    return message


@lru_cache(4096)
def parse_timeout(value: bytes) -> float:
    """Seconds of a grpc-timeout: at most 8 digits and one of H M S m u n. Raises ValueError."""
    digits, unit = value[:-1], value[-1:]
    if not (1 <= len(digits) <= 8 and digits.isdigit() and unit in _UNITS):
        raise ValueError(f"grpc-timeout {value[:20].decode('latin-1')!r} is not 1..8 digits and one of H M S m u n")
    return int(digits) * _UNITS[unit]


def encode_message(text: str) -> bytes:
    """A status message as grpc-message carries it: percent-encoded UTF-8."""
    return quote_from_bytes(text.encode("utf-8", "replace"), safe=_PRINTABLE).encode("ascii")


def decode_message(data: bytes) -> str:
    return unquote_to_bytes(data).decode("utf-8", "replace")
