"""Sends what tests/fuzz.py makes, many calls on a connection, and says how each ended."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gateway.transport.frames import decode_message
from tests import http2
from tests.fuzz import LONG, SHORT, Case
from tests.http2 import Closed, Connection
from tests.servers import DEADLINE_S

MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "1000"))  # to each gateway, and those that are sent again
OK, INVALID, LATE, NOT_FOUND, EXISTS, EXHAUSTED = "0", "3", "4", "5", "6", "8"
PRECONDITION, UNIMPLEMENTED, AWAY = "9", "12", "14"
ANSWERS = {OK, INVALID, LATE, NOT_FOUND, EXISTS, EXHAUSTED, AWAY}
NO_TIMEOUT = "reset 2"  # grpcio's answer to a grpc-timeout that is none

CONNECTIONS = 12  # at a time
STREAMS = 100  # of one connection
ROOM = 48_000  # bytes of their bodies: less than the window that every connection begins with
WINDOW = 1 << 26  # for answers

# What nobody outside should read: an exception's class, a stack, a module of ours or of a library.
_INSIDE = re.compile(
    rb"Traceback|\b[A-Za-z]*(?:Error|Exception|Warning)\b|File \"|\.py\b|0x[0-9a-f]{8,}|_pb2\b|<class|"
    rb"\b(?:gateway|ledger_sync|google|grpc|redis|asyncpg|asyncio|msgspec|orjson|upb|pyvoy)\.[a-z_]+"
)


class Outcome(NamedTuple):
    """`status`: gRPC's as a number, HTTP's of JSON, or how the stream or connection was ended."""

    status: str
    message: str
    body: bytes

    def inside(self, case: Case) -> str:
        """What it tells of the inside that the caller did not say itself; empty: nothing."""
        told = b"%b %b" % (self.message.replace(case.path[:200], "").encode("utf-8", "replace"), self.body)
        found = _INSIDE.search(told)
        return "" if found is None or found[0] in case.body + case.path.encode() else f"{found[0]!r} of {told[:300]!r}"


def groups(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """As many as go together on one connection."""
    group: list[Case] = []
    room = ROOM
    for case in cases:
        if group and (len(group) == STREAMS or room < len(case.body)):
            yield group
            group, room = [], ROOM
        group.append(case)
        room -= len(case.body)
    if group:
        yield group


def play(address: str, asked: Sequence[Case], answers: set[str]) -> list[tuple[Case, Outcome]]:
    """Each with how it ended; AssertionError unless that is one of the answers and tells nothing of the inside."""

    def one(group: list[Case]) -> list[tuple[Case, Outcome]]:
        return list(zip(group, send(address, group, DEADLINE_S), strict=True))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        ended = [pair for pairs in pool.map(one, groups(asked)) for pair in pairs]
    wrong = [problem for pair in ended if (problem := _problem(*pair, answers))]
    assert not wrong, f"{len(wrong)} of {len(ended)}: {wrong[0][:2_000]}"
    return ended


def _problem(case: Case, outcome: Outcome, answers: set[str]) -> str:
    no_timeout = outcome.status == NO_TIMEOUT and case.timeout not in (LONG, SHORT)
    if outcome.status not in answers and not no_timeout:
        return f"{outcome} to {case}"
    told = outcome.inside(case)
    return f"tells {told} to {case}" if told else ""


def send(address: str, cases: Sequence[Case], timeout: float) -> list[Outcome]:
    """How each of them ended. AssertionError: one has not, within the timeout after the last that did."""
    with Connection(address, window=1 << 20, timeout=timeout) as connection:
        ends = _Ends()
        try:
            connection.send(http2.frame(http2.WINDOW_UPDATE, 0, 0, WINDOW.to_bytes(4, "big")))
            connection.send(b"".join(_request(1 + 2 * number, case) for number, case in enumerate(cases)))
            for got in connection.frames():
                ends.add(got)
                if len(ends.ended) == len(cases):
                    break
        except Closed:
            pass
        except TimeoutError:
            hung = [case for number, case in enumerate(cases) if 1 + 2 * number not in ends.ended]
            raise AssertionError(f"{len(hung)} calls hang; first {hung[0]}") from None
    return [ends.outcome(1 + 2 * number) for number in range(len(cases))]


class _Ends:
    def __init__(self) -> None:
        self.ended: set[int] = set()
        self.closed = "closed"
        self._resets: dict[int, int] = {}
        self._headers: dict[int, dict[str, str]] = defaultdict(dict)
        self._bodies: dict[int, bytes] = defaultdict(bytes)

    def add(self, got: http2.Frame) -> None:
        if got.kind == http2.HEADERS:
            self._headers[got.stream] |= http2.decode(http2.unpadded(got))
        elif got.kind == http2.DATA:
            self._bodies[got.stream] += got.payload
        elif got.kind == http2.GOAWAY:
            self.closed = f"goaway {int.from_bytes(got.payload[4:8], 'big')}"
        if got.kind == http2.RST_STREAM:
            self._resets.setdefault(got.stream, int.from_bytes(got.payload, "big"))
            self.ended.add(got.stream)
        elif got.kind in (http2.HEADERS, http2.DATA) and got.flags & http2.END_STREAM:
            self.ended.add(got.stream)

    def outcome(self, stream: int) -> Outcome:
        headers, body = self._headers[stream], self._bodies[stream]
        status = headers.get("grpc-status") or headers.get(":status", "")
        if stream not in self.ended:
            status = self.closed
        elif not headers.get("grpc-status") and stream in self._resets:
            status = f"reset {self._resets[stream]}"
        return Outcome(status, decode_message(headers.get("grpc-message", "").encode("latin-1")), body)


def _request(stream: int, case: Case) -> bytes:
    """In gRPC every call has a deadline: grpcio answers half a message with nothing else."""
    given: list[tuple[str, str | bytes]] = [(":method", "POST"), (":scheme", "http"), (":path", case.path)]
    given += [(":authority", "test"), ("content-type", case.content)]
    if case.content == "application/grpc":
        given += [("te", "trailers"), ("grpc-timeout", case.timeout)]
    return http2.request(stream, [*given, *case.headers], case.body)
