"""A bare HTTP/2 client that says whatever a test wants it to say, well or badly. Its headers need no table."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 1, 1, 4, 8, 32
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 1, 4
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW: Final = 65_535
MOST: Final = 16_384  # bytes of a frame

# RFC 7541: names of the static table, and the lengths of the Huffman codes of 15 bits and less; the code is canonical.
_STATIC: Final = """
    :authority :method :method :path :path :scheme :scheme :status :status :status :status :status :status :status
    accept-charset accept-encoding accept-language accept-ranges accept access-control-allow-origin age allow
    authorization cache-control content-disposition content-encoding content-language content-length content-location
    content-range content-type cookie date etag expect expires from host if-match if-modified-since if-none-match
    if-range if-unmodified-since last-modified link location max-forwards proxy-authenticate proxy-authorization range
    referer refresh retry-after server set-cookie strict-transport-security transfer-encoding user-agent vary via
    www-authenticate
""".split()  # noqa: SIM905
_STATUS: Final = {8: "200", 9: "204", 10: "206", 11: "304", 12: "400", 13: "404", 14: "500"}
_LENGTHS: Final = {
    5: "012aceiost",
    6: " %-./3456789=A_bdfghlmnpru",
    7: ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
    8: "&*,;XZ",
    10: '!"()?',
    11: "'+|",
    12: "#>",
    13: "\0$@[]~",
    14: "^}",
    15: "<`{",
}


def _codes() -> dict[tuple[int, int], str]:
    codes, code, before = {}, 0, 5
    for length, characters in _LENGTHS.items():
        code <<= length - before
        before = length
        for character in characters:
            codes[length, code] = character
            code += 1
    return codes


_CODES: Final = _codes()


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


class Closed(Exception):
    """The server has closed the connection."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def literal(name: str, value: str | bytes) -> bytes:
    """A header that no table remembers."""
    parts = (name.encode(), value.encode() if isinstance(value, str) else value)
    return b"\x00" + b"".join(_integer(len(part), 7) + part for part in parts)


def _integer(value: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    if value < most:
        return bytes((value,))
    out, value = bytearray((most,)), value - most
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes((*out, value))


def decode(block: bytes) -> dict[str, str]:
    """Headers, written with the static table and literals: the client allows no other."""
    found, at = {}, 0

    def integer(bits: int) -> int:
        nonlocal at
        value = block[at] & ((1 << bits) - 1)
        at += 1
        if value == (1 << bits) - 1:
            shift = 0
            while True:
                byte = block[at]
                at += 1
                value += (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
        return value

    def text() -> str:
        nonlocal at
        huffman = block[at] >= 128
        size = integer(7)
        data, at = block[at : at + size], at + size
        return _unhuffman(data) if huffman else data.decode("latin-1")

    while at < len(block):
        first = block[at]
        if first >= 128:
            index = integer(7)
            found[_STATIC[index - 1]] = _STATUS.get(index, "")
        elif first >> 5 == 1:
            assert integer(5) == 0, "a table was asked for that the client does not have"
        else:
            index = integer(6 if first >= 64 else 4)
            name = _STATIC[index - 1] if index else text()
            found[name] = text()
    return found


def _unhuffman(data: bytes) -> str:
    out, length, code = [], 0, 0
    for byte in data:
        for shift in range(7, -1, -1):
            length, code = length + 1, code << 1 | byte >> shift & 1
            if (character := _CODES.get((length, code))) is not None:
                out.append(character)
                length = code = 0
    return "".join(out)


class Connection:
    """One connection. Nothing is answered for the test but PINGs and SETTINGS; every wait has a deadline."""

    def __init__(self, address: str, *, window: int = WINDOW, timeout: float = 10.0) -> None:
        self._socket = connect(address, timeout)
        self._buffer = b""
        self._next = 1
        self._windows: dict[int, int] = {0: WINDOW}  # what the server lets the client send, in all and by stream
        self._window = WINDOW  # of a new stream
        self.seen: list[Frame] = []
        self.send(PREFACE + frame(SETTINGS, 0, 0, setting(HEADER_TABLE_SIZE, 0) + setting(INITIAL_WINDOW_SIZE, window)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Raises Closed when the server takes nothing any more."""
        try:
            self._socket.sendall(data)
        except OSError:
            raise Closed from None

    def close(self) -> None:
        self._socket.close()

    def request(
        self, path: str, body: bytes = b"", *, end: bool = True, headers: Sequence[tuple[str, str]] = ()
    ) -> int:
        """Begins a gRPC call, in one write, and answers its stream. With `end` nothing more follows."""
        stream, self._next = self._next, self._next + 2
        self.send(self.request_bytes(stream, path, body, end=end, headers=headers))
        return stream

    @staticmethod
    def request_bytes(
        stream: int, path: str, body: bytes, *, end: bool = True, headers: Sequence[tuple[str, str]] = ()
    ) -> bytes:
        given = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "test"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *headers,
        ]
        return request(stream, given, body, end=end)

    def data(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self.send(frame(DATA, END_STREAM if end else 0, stream, data))

    def upload(self, streams: Sequence[int], data: bytes) -> int:
        """Sends the data on each stream, as far as the server's windows let it. Answers how many bytes it took.

        A server that takes no more says nothing: the connection's timeout tells.
        """
        sent = 0
        left = dict.fromkeys(streams, data)
        try:
            while left:
                for stream in list(left):
                    windows = self._windows
                    room = min(windows[0], windows.setdefault(stream, self._window), MOST)
                    part, left[stream] = left[stream][: max(0, room)], left[stream][max(0, room) :]
                    if part:
                        self.data(stream, part)
                        sent += len(part)
                        windows[0] -= len(part)
                        windows[stream] -= len(part)
                    if not left[stream]:
                        del left[stream]
                stuck = left and all(min(self._windows[0], self._windows[stream]) <= 0 for stream in left)
                if stuck and next(self.frames(), None) is None:
                    break
        except (Closed, TimeoutError):
            pass
        return sent

    def frames(self) -> Iterator[Frame]:
        """What comes, one by one. Ends when the server closes; raises TimeoutError when it says nothing."""
        while True:
            while len(self._buffer) < 9 or len(self._buffer) < 9 + int.from_bytes(self._buffer[:3], "big"):
                try:
                    more = self._socket.recv(1 << 16)
                except ConnectionError:
                    return
                if not more:
                    return
                self._buffer += more
            size = int.from_bytes(self._buffer[:3], "big")
            stream = int.from_bytes(self._buffer[5:9], "big") & 0x7FFFFFFF
            got = Frame(self._buffer[3], self._buffer[4], stream, self._buffer[9 : 9 + size])
            self._buffer = self._buffer[9 + size :]
            self.seen.append(got)
            if got.kind == WINDOW_UPDATE:
                added = int.from_bytes(got.payload, "big")
                self._windows[stream] = self._windows.get(stream, self._window) + added
            if got.kind == SETTINGS and not got.flags & ACK:
                for at in range(0, size, 6):
                    if int.from_bytes(got.payload[at : at + 2], "big") == INITIAL_WINDOW_SIZE:
                        self._opened(int.from_bytes(got.payload[at + 2 : at + 6], "big"))
            if got.kind in (SETTINGS, PING) and not got.flags & ACK:
                self._acknowledge(got)
            yield got

    def _opened(self, window: int) -> None:
        for stream in self._windows.keys() - {0}:
            self._windows[stream] += window - self._window
        self._window = window

    def _acknowledge(self, got: Frame) -> None:
        try:
            self.send(frame(got.kind, ACK, 0, b"" if got.kind == SETTINGS else got.payload))
        except Closed:
            return

    def until(self, holds: Callable[[Frame], bool]) -> Frame | None:
        """The first frame of which it holds, seen or still to come; None when the server closed before."""
        for got in self.seen:
            if holds(got):
                return got
        return next((got for got in self.frames() if holds(got)), None)

    def begins(self, stream: int) -> dict[str, str] | None:
        """The first headers of an answer; None when the server closed before."""
        got = self.until(lambda got: got.kind == HEADERS and got.stream == stream)
        return None if got is None else decode(unpadded(got))

    def outcome(self, stream: int) -> dict[str, str]:
        """The end of a call: its last headers or trailers, {"reset": code}, {"goaway": code} or {"closed": ""}."""

        def ends(got: Frame) -> bool:
            if got.kind == GOAWAY:
                return int.from_bytes(got.payload[:4], "big") < stream or got.payload[4:8] != bytes(4)
            return got.stream == stream and (got.kind == RST_STREAM or bool(got.flags & END_STREAM))

        got = self.until(ends)
        if got is None:
            return {"closed": ""}
        if got.kind == RST_STREAM:
            return {"reset": str(int.from_bytes(got.payload, "big"))}
        if got.kind == GOAWAY:
            return {"goaway": str(int.from_bytes(got.payload[4:8], "big"))}
        return decode(unpadded(got)) if got.kind == HEADERS else {}

    def counts(self) -> dict[int, int]:
        """How many bytes of data have come on each stream."""
        found: dict[int, int] = defaultdict(int)
        for got in self.seen:
            if got.kind == DATA:
                found[got.stream] += len(got.payload)
        return found


def request(stream: int, headers: Sequence[tuple[str, str | bytes]], body: bytes, *, end: bool = True) -> bytes:
    """The frames of a call, whatever its headers say."""
    block = b"".join(literal(name, value) for name, value in headers)
    blocks = [block[at : at + MOST] for at in range(0, len(block), MOST)]
    out = b"".join(
        frame(CONTINUATION if number else HEADERS, END_HEADERS if number + 1 == len(blocks) else 0, stream, part)
        for number, part in enumerate(blocks)
    )
    parts = [body[at : at + MOST] for at in range(0, len(body), MOST)] or [b""]
    for number, part in enumerate(parts, 1):
        last = end and number == len(parts)
        if part or last:
            out += frame(DATA, END_STREAM if last else 0, stream, part)
    return out


def setting(number: int, value: int) -> bytes:
    return number.to_bytes(2, "big") + value.to_bytes(4, "big")


def connect(address: str, timeout: float = 10.0) -> socket.socket:
    """A connected socket to host:port or unix:/path."""
    if address.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(timeout)
        made.connect(address.removeprefix("unix:"))
        return made
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout)


def unpadded(got: Frame) -> bytes:
    payload = got.payload
    if got.flags & PADDED:
        payload = payload[1 : len(payload) - payload[0]]
    return payload[5:] if got.flags & PRIORITY else payload
