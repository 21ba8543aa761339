"""How receipts lie in a segment file. Pure.

A segment begins with a header of 64 bytes: the magic word, its number, the opening of the hot store that its receipts
were decided under, and a checksum of these. Then come frames: mark, size of the body, CRC-32 of the body that starts
with the segment's number, body. A frame of an earlier use of the same file therefore never passes for one of this.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from struct import Struct

import msgspec

HEADER_BYTES = 64
MARK = b"\xe7RCP"
FRAME_BYTES = 12  # mark, size, checksum
MAX_BODY = 1 << 20

_HEADER = Struct("<8sQQI")
_MAGIC = b"ENTRCPT1"
_FRAME = Struct("<4sII")
_SEED = Struct("<Q")


class Header(msgspec.Struct, frozen=True):
    """Which segment this is, and under which opening of the hot store its receipts were decided."""

    number: int
    opening: int


class Scan(msgspec.Struct):
    """What a segment holds. `damaged`: places in its middle where a frame was not whole, which happens by no crash."""

    bodies: list[bytes]
    end: int  # where the next frame would stand
    damaged: int = 0


def pack_header(header: Header) -> bytes:
    head = _HEADER.pack(_MAGIC, header.number, header.opening, 0)[:24]
    return (head + zlib.crc32(head).to_bytes(4, "little")).ljust(HEADER_BYTES, b"\0")


def read_header(data: bytes) -> Header | None:
    """None: it is no segment, or its beginning was never whole on disk; then nothing in it was acknowledged."""
    if len(data) < HEADER_BYTES:
        return None
    magic, number, opening, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC or checksum != zlib.crc32(data[:24]):
        return None
    return Header(number, opening)


def seed_of(number: int) -> int:
    """What the checksums of a segment's frames start from."""
    return zlib.crc32(_SEED.pack(number))


def pack_frames(bodies: Sequence[bytes], seed: int) -> bytes:
    parts: list[bytes] = []
    for body in bodies:
        parts.append(_FRAME.pack(MARK, len(body), zlib.crc32(body, seed)))
        parts.append(body)
    return b"".join(parts)


def scan(data: bytes, seed: int) -> Scan:
    """Every whole frame after the header. A torn end is nothing; what is broken in the middle is counted and passed."""
    found = Scan([], HEADER_BYTES)
    at = HEADER_BYTES
    while (start := data.find(MARK, at)) >= 0:
        body = _body(data, start, seed)
        if body is None:
            at = start + 1
            continue
        if start != found.end:
            found.damaged += 1
        found.bodies.append(body)
        at = found.end = start + FRAME_BYTES + len(body)
    return found


def _body(data: bytes, at: int, seed: int) -> bytes | None:
    if at + FRAME_BYTES > len(data):
        return None
    _, size, checksum = _FRAME.unpack_from(data, at)
    end = at + FRAME_BYTES + size
    if size > MAX_BODY or end > len(data):
        return None
    body = data[at + FRAME_BYTES : end]
    return body if zlib.crc32(body, seed) == checksum else None
