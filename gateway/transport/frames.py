"""gRPC's message framing and header texts (gRPC over HTTP/2, PROTOCOL-HTTP2.md): pure, no I/O."""

from __future__ import annotations

import zlib
from urllib.parse import quote_from_bytes, unquote_to_bytes

PREFIX = 5  # one flag byte and four of length, before every message
_GZIP = 31  # zlib's window bits for a gzip header and trailer
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class BadFrame(Exception):
    """The peer broke the framing. `oversized`: only by a message over the limit."""

    def __init__(self, problem: str, *, oversized: bool = False) -> None:
        super().__init__(problem)
        self.oversized = oversized


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

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now. Raises BadFrame."""
        buffer, found = self._buffer, []
        buffer += data
        while len(buffer) >= PREFIX:
            size = int.from_bytes(buffer[1:PREFIX], "big")
            if size > self._limit:
                raise BadFrame(f"message has {size} bytes; the limit is {self._limit}", oversized=True)
            if len(buffer) < PREFIX + size:
                break
            found.append(self._message(buffer[0], bytes(buffer[PREFIX : PREFIX + size])))
            del buffer[: PREFIX + size]
        return found

    def end(self) -> None:
        """The body has ended. Raises BadFrame when it ended in the middle of a message."""
        if self._buffer:
            raise BadFrame(f"the body ended in the middle of a message, {len(self._buffer)} bytes into it")

    def _message(self, flag: int, data: bytes) -> bytes:
        return unpack(flag, data, self._limit, gzip=self._gzip)


def unpack(flag: int, data: bytes, limit: int, *, gzip: bool) -> bytes:
    """The message in a frame; a compressed one is inflated to at most `limit` bytes, whatever it claims."""
    if flag == 0:
        return data
    if flag != 1 or not gzip:
        raise BadFrame(f"frame flag {flag} without a grpc-encoding that says how to read it")
    unpacker = zlib.decompressobj(wbits=_GZIP)
    try:
        message = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise BadFrame(f"gzip message does not inflate: {error}") from None
    if len(message) > limit:
        raise BadFrame(f"message inflates to more than the limit of {limit} bytes", oversized=True)
    if not unpacker.eof:
        raise BadFrame("gzip message is cut short")
    return message


def parse_timeout(text: str) -> float:
    """Seconds of a grpc-timeout: at most 8 digits and one of H M S m u n. Raises ValueError."""
    digits, unit = text[:-1], text[-1:]
    if not (1 <= len(digits) <= 8 and digits.isascii() and digits.isdigit() and unit in _UNITS):
        raise ValueError(f"grpc-timeout {text[:20]!r} is not 1..8 digits and one of H M S m u n")
    return int(digits) * _UNITS[unit]


def encode_message(text: str) -> bytes:
    """A status message as grpc-message carries it: percent-encoded UTF-8."""
    return quote_from_bytes(text.encode("utf-8", "replace"), safe=_PRINTABLE).encode("ascii")


def decode_message(data: bytes) -> str:
    return unquote_to_bytes(data).decode("utf-8", "replace")
