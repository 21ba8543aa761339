"""The gRPC codec over ASGI, driven by a peer that is not there: what is received and sent is all there is."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from entitlement.v1 import gateway_pb2, gateway_pb2_grpc
from gateway.transport.asgi import MAX_UNFINISHED_BYTES, GrpcApp
from gateway.transport.asgi_context import Context, Event
from gateway.transport.asgi_json import JsonApp
from gateway.transport.asgi_stream import READ_AHEAD_BYTES
from gateway.transport.deadlines import TICK_S
from gateway.transport.frames import Frames, compressed_frame, decode_message, frame

SOON_S = 5.0  # everything that is waited for comes much sooner
LIMIT = 100_000
GZIP = (b"grpc-encoding", b"gzip")
OK, CANCELLED, UNKNOWN, INVALID, LATE, TOO_MUCH, UNIMPLEMENTED = 0, 1, 2, 3, 4, 8, 12


@dataclass
class Answer:
    """What a peer makes of the events it was sent."""

    status: int = -1
    message: str = ""
    initial: dict[str, bytes] = field(default_factory=dict)
    trailing: dict[str, bytes] = field(default_factory=dict)
    messages: list[bytes] = field(default_factory=list)
    trailers_only: bool = False


class Peer:
    """The other end of one call. `empty`: like servers that answer an ended body with more and more nothing."""

    def __init__(self, *parts: bytes, ended: bool = True, empty: bool = False) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._empty = empty
        self._ended = self._gone = False
        self.received = 0
        self.sent: list[Event] = []
        self.news = asyncio.Condition()
        self.stalled: asyncio.Event | None = None  # set: what is sent is accepted only when it is set
        for index, part in enumerate(parts):
            self.push(part, more=not ended or index + 1 < len(parts))
        if ended and not parts:
            self.push(b"", more=False)

    def push(self, data: bytes, *, more: bool = True) -> None:
        self._ended = not more
        self._events.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def vanish(self) -> None:
        self._gone = True
        self._events.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Event:
        if self._events.empty() and self._ended and self._empty and not self._gone:
            return {"type": "http.request", "body": b"", "more_body": False}
        event = await self._events.get()
        self.received += len(event.get("body", b""))
        return event

    async def send(self, event: Event) -> None:
        if self._gone:
            raise OSError("the peer has gone")
        kind, last = event["type"], self.sent[-1] if self.sent else {"type": ""}
        if kind == "http.response.start":
            assert not self.sent
        elif kind == "http.response.body":
            assert last["type"] == "http.response.start" or last.get("more_body"), last
        else:
            assert kind == "http.response.trailers" and self.sent[0]["trailers"]
            assert last["type"] == "http.response.body" and not last["more_body"], last
        if self.stalled is not None:
            await self.stalled.wait()
        self.sent.append(event)
        async with self.news:
            self.news.notify_all()

    async def messages(self, count: int) -> list[bytes]:
        """The first `count` messages, as soon as they were sent."""
        async with asyncio.timeout(SOON_S), self.news:
            await self.news.wait_for(lambda: len(self.answer().messages) >= count)
        return self.answer().messages

    def answer(self) -> Answer:
        answer, body = Answer(), bytearray()
        frames = Frames(1 << 24, gzip=True)
        for event in self.sent:
            headers = {name.decode(): value for name, value in event.get("headers", ())}
            if event["type"] == "http.response.start":
                assert event["status"] == 200 and headers["content-type"] == b"application/grpc"
                answer.initial = headers
            elif event["type"] == "http.response.body":
                body += event["body"]
            else:
                answer.trailing = headers
        answer.messages = frames.feed(body)
        answer.trailers_only = "grpc-status" in answer.initial
        if answer.trailers_only:
            answer.trailing = answer.initial
            assert not body
        answer.status = int(answer.trailing.get("grpc-status", b"-1"))
        answer.message = decode_message(answer.trailing.get("grpc-message", b""))
        return answer


class Servicer:
    """The methods that the tests call, from bytes to bytes."""

    def __init__(self) -> None:
        self.begun, self.cancelled, self.release = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.taken: list[bytes] = []
        self.context: Context | None = None

    async def Echo(self, request: bytes, context: Context) -> bytes:
        self.context = context
        return request

    async def Hold(self, request: bytes, context: Context) -> bytes:
        self.begun.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request

    async def Abort(self, request: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, request.decode(), (("why", "asked"), ("why-bin", b"\0\xff")))
        raise AssertionError("abort returns never")

    async def Say(self, request: bytes, context: Context) -> bytes:
        context.set_code(grpc.StatusCode.OUT_OF_RANGE)
        context.set_details(request.decode())
        assert (context.code(), context.details()) == (11, request.decode())
        return b"never sent"

    async def Explode(self, request: bytes, context: Context) -> bytes:
        raise RuntimeError("canary")

    async def Give_up(self, request: bytes, context: Context) -> bytes:
        raise asyncio.CancelledError

    async def Initial(self, request: bytes, context: Context) -> bytes:
        await context.send_initial_metadata((("early", "1"), ("early-bin", b"\1")))
        self.begun.set()
        await self.release.wait()
        return request

    async def Packed(self, request: bytes, context: Context) -> bytes:
        context.set_compression(grpc.Compression.Gzip)
        context.set_trailing_metadata((("late", "1"),))
        return request

    async def Count(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            for number in range(int(request)):
                self.taken.append(b"%d" % number)
                yield b"%d" % number
        finally:
            self.cancelled.set()

    async def HoldStream(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        yield b"begun"
        yield await self.Hold(request, context)

    async def CountThenAbort(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        yield b"0"
        await context.abort(grpc.StatusCode.DATA_LOSS, "after one", (("why", "asked"),))

    async def ExplodeStream(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        yield b"0"
        raise KeyError("canary")

    async def Write(self, request: bytes, context: Context) -> None:
        for number in range(3):
            await context.write(b"%d" % number)

    async def Join(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        async for request in requests:
            self.taken.append(request)
        return b"".join(self.taken)

    async def First(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        return await anext(aiter(requests))

    async def Chat(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def Read(self, requests: AsyncIterator[bytes], context: Context) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(b"got " + request)  # type: ignore[operator]

    async def HoldChat(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        yield await self.Hold(b"", context)
        async for request in requests:
            yield request


KINDS = {
    **dict.fromkeys(("Echo", "Hold", "Abort", "Say", "Explode", "Give_up", "Initial", "Packed"), "unary_unary"),
    **dict.fromkeys(("Count", "HoldStream", "CountThenAbort", "ExplodeStream", "Write"), "unary_stream"),
    **dict.fromkeys(("Join", "First"), "stream_unary"),
    **dict.fromkeys(("Chat", "Read", "HoldChat"), "stream_stream"),
}


class Bench:
    """An app with the servicer, and calls to it."""

    def __init__(self, **limits: int) -> None:
        self.app = GrpcApp(LIMIT, **limits)
        self.servicer = Servicer()
        handlers = {
            name: getattr(grpc, f"{kind}_rpc_method_handler")(getattr(self.servicer, name))
            for name, kind in KINDS.items()
        }
        self.app.add_registered_method_handlers("t.T", handlers)

    def begin(self, method: str, peer: Peer, *headers: tuple[bytes, bytes], **scope: object) -> asyncio.Task[None]:
        given = [(b"content-type", b"application/grpc"), (b"te", b"trailers"), *headers]
        asked: Event = {"type": "http", "method": "POST", "path": f"/t.T/{method}", "headers": given}
        return asyncio.create_task(self.app.serve(asked | scope, peer.receive, peer.send))

    async def call(self, method: str, peer: Peer | bytes, *headers: tuple[bytes, bytes], **scope: object) -> Answer:
        """The whole answer. Bytes are a single message."""
        peer = Peer(frame(peer)) if isinstance(peer, bytes) else peer
        async with asyncio.timeout(SOON_S):
            await self.begin(method, peer, *headers, **scope)
        self.assert_clean()
        return peer.answer()

    def assert_clean(self) -> None:
        """Nothing is kept of calls that have ended."""
        assert self.app.in_flight == 0
        assert self.app.room.taken == 0


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def happens(event: asyncio.Event) -> None:
    async with asyncio.timeout(SOON_S):
        await event.wait()


async def until(holds: Callable[[], bool]) -> None:
    """For what tells nobody when it happens."""
    async with asyncio.timeout(SOON_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def ends(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(SOON_S):
        await task


class TestUnary:
    @pytest.mark.parametrize("message", [b"", b"hello", bytes(LIMIT)])
    async def test_a_message_and_its_status(self, bench: Bench, message: bytes) -> None:
        answer = await bench.call("Echo", message)
        assert (answer.messages, answer.status, answer.trailers_only) == ([message], OK, False)

    @pytest.mark.parametrize("size", [1, 3, 7])
    async def test_a_body_in_parts(self, bench: Bench, size: int) -> None:
        body = frame(b"in small parts")
        parts = [body[at : at + size] for at in range(0, len(body), size)]
        assert (await bench.call("Echo", Peer(*parts))).messages == [b"in small parts"]
        assert (await bench.call("Echo", Peer(*parts, b""))).messages == [b"in small parts"]

    async def test_a_generic_handler_serves_too(self, bench: Bench) -> None:
        handler = grpc.unary_unary_rpc_method_handler(
            bench.servicer.Echo, StringValue.FromString, StringValue.SerializeToString
        )
        bench.app.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("g.G", {"Echo": handler})])
        wire = StringValue(value="ü").SerializeToString()
        answer = await bench.call("", wire, path="/g.G/Echo")
        assert (answer.messages, answer.status) == ([wire], OK)

    @pytest.mark.parametrize("path", ["/t.T/Nope", "/nope/Echo", "/", "", "/t.T/Echo/", "/t.T/" + "x" * 5000])
    async def test_an_unknown_method(self, bench: Bench, path: str) -> None:
        answer = await bench.call("", b"", path=path)
        assert (answer.status, answer.trailers_only) == (UNIMPLEMENTED, True)
        assert answer.message == f"method {path[:200]} is not known here"

    async def test_an_error_is_one_block_of_headers(self, bench: Bench) -> None:
        answer = await bench.call("Abort", "100% nicht\nda: ü€".encode())
        assert (answer.status, answer.message, answer.trailers_only) == (5, "100% nicht\nda: ü€", True)
        assert answer.trailing["why"] == b"asked"
        assert answer.trailing["why-bin"] == base64.b64encode(b"\0\xff").rstrip(b"=")

    async def test_a_status_that_was_set(self, bench: Bench) -> None:
        answer = await bench.call("Say", b"so")
        assert (answer.status, answer.message, answer.messages) == (11, "so", [])

    async def test_what_nobody_foresaw_is_counted_and_not_told(self, bench: Bench) -> None:
        for method in ("Explode", "Give_up"):
            peer = Peer(frame(b""))
            answer = await bench.call(method, peer)
            assert (answer.status, answer.message) == (UNKNOWN, "internal error")
            assert b"canary" not in repr(peer.sent).encode()
            assert b"Error" not in repr(peer.sent).encode()
        assert bench.app.failures == 2

    async def test_errors_that_are_foreseen_are_not_failures(self, bench: Bench) -> None:
        await bench.call("Abort", b"")
        await bench.call("Echo", Peer(b"garbage"))
        await bench.call("Echo", b"", path="/nope")
        assert bench.app.failures == 0

    async def test_initial_metadata_comes_before_the_answer(self, bench: Bench) -> None:
        peer = Peer(frame(b"x"))
        task = bench.begin("Initial", peer)
        await happens(bench.servicer.begun)
        initial = peer.answer().initial
        assert (initial["early"], initial["early-bin"]) == (b"1", b"AQ")
        assert peer.answer().messages == []
        bench.servicer.release.set()
        await ends(task)
        assert (peer.answer().messages, peer.answer().status) == ([b"x"], OK)

    async def test_done_callbacks_run_however_it_ends(self, bench: Bench) -> None:
        done: list[str] = []

        async def ask(request: bytes, context: Context) -> bytes:
            context.add_done_callback(lambda ended: done.append(f"{request.decode()} {ended.done()}"))
            if request == b"abort":
                await context.abort(grpc.StatusCode.ABORTED, "")
            if request == b"gone":
                peer.vanish()
            return b""

        bench.app.add_registered_method_handlers("d.D", {"Ask": grpc.unary_unary_rpc_method_handler(ask)})
        for request in (b"ok", b"abort", b"gone"):
            peer = Peer(frame(request))
            await bench.call("", peer, path="/d.D/Ask")
        assert done == ["ok True", "abort True", "gone True"]


class TestBadRequests:
    @pytest.mark.parametrize(
        ("body", "status", "problem"),
        [
            (b"", INVALID, "the body holds no message"),
            (b"\0\0", INVALID, "in the middle of a message"),
            (b"\0\0\0\0\5abcd", INVALID, "says 5 bytes; the body has 4"),
            (b"\0\0\0\0\2abcd", INVALID, "says 2 bytes; the body has 4"),
            (frame(b"a") * 2, INVALID, "says 1 bytes"),
            (compressed_frame(b"a"), INVALID, "flag 1 without a grpc-encoding"),
            (b"\0\xff\xff\xff\xff", TOO_MUCH, f"message has 4294967295 bytes; the limit is {LIMIT}"),
            (b"\0" + (LIMIT + 1).to_bytes(4, "big"), TOO_MUCH, f"the limit is {LIMIT}"),
        ],
    )
    @pytest.mark.parametrize("method", ["Echo", "Count", "Join"])
    async def test_a_status_that_says_what_is_wrong(
        self, bench: Bench, method: str, body: bytes, status: int, problem: str
    ) -> None:
        answer = await bench.call(method, Peer(body))
        if method == "Join" and body in (b"", frame(b"a") * 2):
            assert answer.status == OK  # A stream of none, or of two.
            return
        assert (answer.status, answer.trailers_only) == (status, True)
        if method == "Echo" or "says" not in problem:
            assert problem in answer.message
        else:
            assert "in the middle of a message" in answer.message or "more than one message" in answer.message

    async def test_one_message_too_many_bytes_long(self, bench: Bench) -> None:
        body = frame(bytes(LIMIT + 1))
        peer = Peer(*(body[at : at + 10_000] for at in range(0, len(body), 10_000)))
        answer = await bench.call("Echo", peer)
        assert (answer.status, answer.message) == (TOO_MUCH, f"message has {LIMIT + 1} bytes; the limit is {LIMIT}")

    async def test_reading_stops_at_the_limit(self, bench: Bench) -> None:
        peer = Peer(*[bytes(50_000)] * 100)
        assert (await bench.call("Echo", peer)).status == INVALID
        assert peer.received <= LIMIT + 2 * 50_000

    @pytest.mark.parametrize("method", ["Echo", "Count", "Chat"])
    async def test_an_unknown_encoding_is_answered_with_the_known_ones(self, bench: Bench, method: str) -> None:
        answer = await bench.call(method, b"1", (b"grpc-encoding", b"snappy"))
        assert answer.status == UNIMPLEMENTED
        assert answer.initial["grpc-accept-encoding"] == b"identity,gzip"

    @pytest.mark.parametrize("text", [b"", b"5", b"S", b"123456789S", b"1.5S", b"\xff\xff", b"-1S"])
    async def test_a_deadline_that_is_none(self, bench: Bench, text: bytes) -> None:
        answer = await bench.call("Echo", b"", (b"grpc-timeout", text))
        assert answer.status == INVALID and "grpc-timeout" in answer.message

    async def test_what_does_not_decode_is_the_peers_fault(self, bench: Bench) -> None:
        kinds = {"U": "unary_unary", "S": "unary_stream", "C": "stream_unary", "B": "stream_stream"}
        behaviors = {"U": "Echo", "S": "Count", "C": "Join", "B": "Chat"}
        handlers = {
            name: getattr(grpc, f"{kind}_rpc_method_handler")(
                getattr(bench.servicer, behaviors[name]), StringValue.FromString, StringValue.SerializeToString
            )
            for name, kind in kinds.items()
        }
        bench.app.add_registered_method_handlers("p.P", handlers)
        for name in kinds:
            for garbage in (b"\x0a\xff", b"\x0a\x02\xff\xfe", b"\xff" * 20):
                answer = await bench.call("", garbage, path=f"/p.P/{name}")
                assert (answer.status, answer.message) == (INVALID, "request: does not decode as the method's message")
        assert bench.app.failures == 0


class TestGzip:
    async def test_a_compressed_request(self, bench: Bench) -> None:
        answer = await bench.call("Echo", Peer(compressed_frame(bytes(50_000))), GZIP)
        assert (answer.status, answer.messages) == (OK, [bytes(50_000)])

    async def test_the_encoding_says_only_that_messages_may_be_compressed(self, bench: Bench) -> None:
        assert (await bench.call("Echo", b"plain", GZIP)).messages == [b"plain"]
        peer = Peer(frame(b"plain") + compressed_frame(b"packed"))
        assert (await bench.call("Join", peer, GZIP)).messages == [b"plainpacked"]

    @pytest.mark.parametrize("method", ["Echo", "Join"])
    async def test_a_bomb(self, bench: Bench, method: str) -> None:
        bomb = compressed_frame(bytes(100 * LIMIT))
        assert len(bomb) < LIMIT
        answer = await bench.call(method, Peer(bomb), GZIP)
        assert (answer.status, answer.message) == (
            TOO_MUCH,
            f"message inflates to more than the limit of {LIMIT} bytes",
        )

    async def test_an_answer_is_compressed_for_those_who_can_read_it(self, bench: Bench) -> None:
        for accepts in (b"identity,deflate,gzip", b"gzip", b"identity, gzip"):
            peer = Peer(frame(bytes(50_000)))
            answer = await bench.call("Packed", peer, (b"grpc-accept-encoding", accepts))
            assert (answer.status, answer.messages) == (OK, [bytes(50_000)])
            assert answer.initial["grpc-encoding"] == b"gzip"
            assert sum(len(event.get("body", b"")) for event in peer.sent) < 1_000
            assert answer.trailing["late"] == b"1"

    async def test_nobody_else_gets_one(self, bench: Bench) -> None:
        for headers in ([], [(b"grpc-accept-encoding", b"identity,deflate")]):
            peer = Peer(frame(bytes(50_000)))
            answer = await bench.call("Packed", peer, *headers)
            assert answer.messages == [bytes(50_000)] and "grpc-encoding" not in answer.initial


class TestMetadata:
    async def test_what_a_servicer_sees(self, bench: Bench) -> None:
        await bench.call(
            "Echo",
            b"",
            (b"x-text", b"one"),
            (b"x-text", b"two"),
            (b"x-bytes-bin", b"AP8"),
            (b"x-padded-bin", b"AP8="),
            (b"x-joined-bin", b"AP8,AQ, Ag=="),
            (b"grpc-timeout", b"5S"),
            (b"grpc-accept-encoding", b"gzip"),
            (b"user-agent", b"test"),
            (b"host", b"here"),
            (b":authority", b"here"),
        )
        assert bench.servicer.context is not None
        assert bench.servicer.context.invocation_metadata() == (
            ("x-text", "one"),
            ("x-text", "two"),
            ("x-bytes-bin", b"\0\xff"),
            ("x-padded-bin", b"\0\xff"),
            ("x-joined-bin", b"\0\xff"),
            ("x-joined-bin", b"\1"),
            ("x-joined-bin", b"\2"),
            ("user-agent", "test"),
        )

    @pytest.mark.parametrize("value", [b"\xff\xfe", b"A", b"a\0b"])
    async def test_values_that_are_neither_text_nor_base64_harm_nobody(self, bench: Bench, value: bytes) -> None:
        await bench.call("Echo", b"", (b"x", value), (b"x-bin", value))
        assert bench.servicer.context is not None
        assert len(bench.servicer.context.invocation_metadata()) == 2

    @pytest.mark.parametrize(
        ("client", "peer"),
        [
            (("127.0.0.1", 4711), "ipv4:127.0.0.1:4711"),
            (("::1", 4711), "ipv6:[::1]:4711"),
            (None, "unix:"),
            (("", 0), "unix:"),
        ],
    )
    async def test_the_peer(self, bench: Bench, client: object, peer: str) -> None:
        await bench.call("Echo", b"", client=client)
        assert bench.servicer.context is not None and bench.servicer.context.peer() == peer


class TestDeadline:
    @pytest.mark.parametrize("empty", [True, False])
    @pytest.mark.parametrize("limit", [b"20m", b"120m", b"0S"])
    async def test_ends_the_work_and_says_so(self, bench: Bench, limit: bytes, empty: bool) -> None:
        answer = await bench.call("Hold", Peer(frame(b""), empty=empty), (b"grpc-timeout", limit))
        assert (answer.status, answer.message) == (LATE, "the call's deadline has passed")
        assert bench.servicer.cancelled.is_set()
        assert bench.app.failures == 0

    async def test_of_a_stream_that_has_begun_to_answer(self, bench: Bench) -> None:
        answer = await bench.call("HoldStream", b"", (b"grpc-timeout", b"80m"))
        assert (answer.status, answer.messages, answer.trailers_only) == (LATE, [b"begun"], False)
        assert bench.servicer.cancelled.is_set()

    async def test_of_a_stream_that_waits_for_its_peer(self, bench: Bench) -> None:
        peer = Peer(frame(b"a"), ended=False)
        answer = await bench.call("Join", peer, (b"grpc-timeout", b"80m"))
        assert answer.status == LATE

    @pytest.mark.parametrize("part", [b"", b"\0\0\0", b"\0\0\0\1\0half"])
    async def test_while_the_request_is_still_on_its_way(self, bench: Bench, part: bytes) -> None:
        peer = Peer(part, ended=False) if part else Peer(ended=False)
        answer = await bench.call("Echo", peer, (b"grpc-timeout", b"80m"))
        assert (answer.status, answer.trailers_only) == (LATE, True)

    async def test_nothing_is_kept_of_calls_that_end_in_time(self, bench: Bench) -> None:
        for _ in range(200):
            await bench.call("Echo", b"", (b"grpc-timeout", b"99999999H"))
        peer = Peer(frame(b""), empty=True)
        task = bench.begin("Hold", peer, (b"grpc-timeout", b"1H"))
        await happens(bench.servicer.begun)
        deadlines = bench.app._deadlines
        assert deadlines is not None
        soon = deadlines.now() + SOON_S
        await until(lambda: len(deadlines) == 1 and min(deadlines._due) * TICK_S > soon)  # Only the last, hours away.
        bench.servicer.release.set()
        await ends(task)
        assert len(deadlines) == 0

    async def test_the_time_that_remains(self, bench: Bench) -> None:
        seen: list[float | None] = []

        async def ask(request: bytes, context: Context) -> bytes:
            seen.append(context.time_remaining())
            return b""

        bench.app.add_registered_method_handlers("d.D", {"Ask": grpc.unary_unary_rpc_method_handler(ask)})
        await bench.call("", b"", path="/d.D/Ask")
        await bench.call("", b"", (b"grpc-timeout", b"10S"), path="/d.D/Ask")
        assert seen[0] is None and seen[1] is not None and 5 < seen[1] <= 10

    async def test_cancellation_from_outside_is_not_swallowed(self, bench: Bench) -> None:
        task = bench.begin("Hold", Peer(frame(b"")))
        await happens(bench.servicer.begun)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ends(task)
        bench.assert_clean()


class TestPeerGone:
    @pytest.mark.parametrize("empty", [True, False])
    @pytest.mark.parametrize("method", ["Hold", "HoldStream", "HoldChat"])
    async def test_the_work_for_it_ends(self, bench: Bench, method: str, empty: bool) -> None:
        peer = Peer(frame(b"x"), empty=empty)
        task = bench.begin(method, peer)
        await happens(bench.servicer.begun)
        peer.vanish()
        await happens(bench.servicer.cancelled)
        await ends(task)
        bench.assert_clean()
        assert bench.app.failures == 0

    async def test_while_it_still_sends(self, bench: Bench) -> None:
        for method in ("Echo", "Join", "Count"):
            peer = Peer(b"\0\0\0\0\5ab", ended=False)
            task = bench.begin(method, peer)
            peer.vanish()
            await ends(task)
            bench.assert_clean()
            assert peer.sent == []
        assert bench.servicer.context is None, "half a request is no request"

    async def test_before_it_has_sent_anything(self, bench: Bench) -> None:
        for method in ("Echo", "Join", "Count", "Chat"):
            peer = Peer(ended=False)
            peer.vanish()
            await ends(bench.begin(method, peer))
            bench.assert_clean()

    async def test_before_the_answer(self, bench: Bench) -> None:
        for method in ("Initial", "Hold"):
            peer = Peer(frame(b""))
            bench.servicer.begun.clear()
            task = bench.begin(method, peer)
            await happens(bench.servicer.begun)
            peer._gone = True  # Nobody is told, and sending fails.
            bench.servicer.release.set()
            await ends(task)
            bench.assert_clean()
        assert bench.app.failures == 0

    async def test_in_the_middle_of_a_streams_answers(self, bench: Bench) -> None:
        peer = Peer(frame(b"1000000"))
        peer.stalled = asyncio.Event()
        task = bench.begin("Count", peer)
        peer._gone = True
        peer.stalled.set()
        await ends(task)
        await happens(bench.servicer.cancelled)  # The generator has ended too.
        assert len(bench.servicer.taken) < 10
        assert bench.app.failures == 0
        bench.assert_clean()

    async def test_an_error_for_nobody(self, bench: Bench) -> None:
        for method, path in (("Abort", "/t.T/Abort"), ("Explode", "/t.T/Explode"), ("", "/nope")):
            peer = Peer(frame(b""))
            peer._gone = True
            await ends(bench.begin(method, peer, path=path))
            bench.assert_clean()


class TestServerStream:
    async def test_messages_in_order(self, bench: Bench) -> None:
        answer = await bench.call("Count", b"1000")
        assert answer.messages == [b"%d" % number for number in range(1000)]
        assert (answer.status, answer.trailers_only) == (OK, False)

    async def test_of_nothing(self, bench: Bench) -> None:
        answer = await bench.call("Count", b"0")
        assert (answer.messages, answer.status) == ([], OK)

    async def test_a_servicer_may_write_by_itself(self, bench: Bench) -> None:
        assert (await bench.call("Write", b"")).messages == [b"0", b"1", b"2"]

    async def test_a_status_after_messages_comes_in_trailers(self, bench: Bench) -> None:
        answer = await bench.call("CountThenAbort", b"")
        assert (answer.messages, answer.status, answer.message) == ([b"0"], 15, "after one")
        assert not answer.trailers_only and answer.trailing["why"] == b"asked"

    async def test_what_nobody_foresaw(self, bench: Bench) -> None:
        answer = await bench.call("ExplodeStream", b"")
        assert (answer.messages, answer.status, answer.message) == ([b"0"], UNKNOWN, "internal error")
        assert bench.app.failures == 1

    async def test_a_reader_that_is_slow_holds_the_servicer_back(self, bench: Bench) -> None:
        peer = Peer(frame(b"1000"))
        peer.stalled = asyncio.Event()
        task = bench.begin("Count", peer)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(bench.servicer.taken) == 1
        peer.stalled.set()
        await ends(task)
        assert len(peer.answer().messages) == 1000


class TestClientStream:
    async def test_messages_in_order_and_one_answer(self, bench: Bench) -> None:
        sent = [b"%d," % number for number in range(1000)]
        body = b"".join(map(frame, sent))
        peer = Peer(*(body[at : at + 997] for at in range(0, len(body), 997)))
        answer = await bench.call("Join", peer)
        assert (answer.messages, answer.status) == ([b"".join(sent)], OK)
        assert bench.servicer.taken == sent

    async def test_of_nothing(self, bench: Bench) -> None:
        assert (await bench.call("Join", Peer())).messages == [b""]

    async def test_an_answer_before_the_end_of_the_requests(self, bench: Bench) -> None:
        peer = Peer(frame(b"first") + frame(b"second"), ended=False)
        answer = await bench.call("First", peer)
        assert (answer.messages, answer.status) == ([b"first"], OK)

    async def test_that_ends_inside_a_message(self, bench: Bench) -> None:
        answer = await bench.call("Join", Peer(frame(b"whole"), b"\0\0\0\0\5ab"))
        assert answer.status == INVALID and "in the middle of a message, 7 bytes" in answer.message
        assert bench.servicer.taken == [b"whole"]


class TestChat:
    async def test_ping_pong(self, bench: Bench) -> None:
        peer = Peer(ended=False)
        task = bench.begin("Chat", peer)
        for number in range(100):
            peer.push(frame(b"%d" % number))
            assert (await peer.messages(number + 1))[-1] == b"%d" % number
        peer.push(b"", more=False)
        await ends(task)
        assert peer.answer().status == OK
        bench.assert_clean()

    async def test_a_servicer_may_read_and_write_by_itself(self, bench: Bench) -> None:
        answer = await bench.call("Read", Peer(frame(b"a") + frame(b"b")))
        assert (answer.messages, answer.status) == ([b"got a", b"got b"], OK)

    @pytest.mark.parametrize("size", [10, 1_000, 50_000])
    async def test_what_is_not_taken_is_not_read(self, bench: Bench, size: int) -> None:
        peer = Peer(ended=False)
        task = bench.begin("HoldChat", peer)
        await happens(bench.servicer.begun)
        count = 2_000_000 // size
        for number in range(count):
            peer.push(frame(bytes(size)), more=number + 1 < count)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert peer.received <= READ_AHEAD_BYTES + 2 * size + 100
        assert bench.app.room.taken == peer.received
        bench.servicer.release.set()
        await ends(task)
        assert len(peer.answer().messages) == count + 1
        bench.assert_clean()

    async def test_a_servicer_that_ends_first_ends_the_reading(self, bench: Bench) -> None:
        peer = Peer(*[frame(bytes(50_000))] * 40, ended=False)
        assert (await bench.call("First", peer)).status == OK
        read = peer.received
        peer.push(frame(bytes(50_000)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert peer.received <= read + 50_005
        bench.assert_clean()


class TestRoom:
    """All that is unfinished is bounded, over all calls."""

    async def test_half_requests_are_refused_when_there_are_too_many(self) -> None:
        bench = Bench(max_unfinished_bytes=200_000)
        half = b"\0\0\1\0\0" + bytes(39_995)
        peers = [Peer(half, ended=False) for _ in range(5)]
        tasks = [bench.begin("Echo" if number % 2 else "Join", peer) for number, peer in enumerate(peers)]
        await until(lambda: bench.app.room.taken == 200_000)
        small = await asyncio.wait_for(self.asked(bench, Peer(frame(b"small"))), SOON_S)
        assert (small.status, small.messages) == (OK, [b"small"]), "a request that comes whole is no problem"
        for method in ("Echo", "Join"):
            refused = await asyncio.wait_for(self.asked(bench, Peer(half, ended=False), method), SOON_S)
            assert refused.status == TOO_MUCH
            assert refused.message == "unfinished requests hold more than 200000 bytes"
        for peer, task in zip(peers[2:], tasks[2:], strict=True):
            peer.vanish()
            await ends(task)
        for peer, task in zip(peers[:2], tasks[:2], strict=True):
            peer.push(bytes(65_536 - 39_995), more=False)
            await ends(task)
            assert peer.answer().status == OK
        bench.assert_clean()

    async def asked(self, bench: Bench, peer: Peer, method: str = "Echo") -> Answer:
        await bench.begin(method, peer)
        return peer.answer()


class TestRealServicers:
    async def test_health(self, bench: Bench) -> None:
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, bench.app)
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        asked = health_pb2.HealthCheckRequest().SerializeToString()
        answer = await bench.call("", asked, path="/grpc.health.v1.Health/Check")
        assert health_pb2.HealthCheckResponse.FromString(answer.messages[0]).status == 1
        peer = Peer(frame(asked))
        task = bench.begin("", peer, path="/grpc.health.v1.Health/Watch")
        await peer.messages(1)
        await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        told = [health_pb2.HealthCheckResponse.FromString(message).status for message in await peer.messages(2)]
        assert told == [1, 2]
        peer.vanish()
        await ends(task)
        bench.assert_clean()

    async def test_the_app_passes_for_a_server_of_grpcio(self) -> None:
        assert isinstance(GrpcApp(), grpc.aio.Server), "reflection asks, to know which servicer to add"


class Json:
    """Calls in JSON, to a service of the contract."""

    PATH = "/entitlement.v1.EntitlementGateway/CheckAndConsume"

    def __init__(self) -> None:
        bench = self
        self.asked: list[gateway_pb2.CheckAndConsumeRequest] = []

        class Service(gateway_pb2_grpc.EntitlementGatewayServicer):
            async def CheckAndConsume(self, request, context):
                bench.asked.append(request)
                if request.customer.startswith("code "):
                    code = grpc.StatusCode[request.customer.removeprefix("code ")]
                    await context.abort(code, 'because "ü"\n')
                if request.customer == "explode":
                    raise RuntimeError("canary")
                return gateway_pb2.CheckAndConsumeResponse(verdict=1, idempotency_key=request.idempotency_key, epoch=7)

        self.grpc = GrpcApp(LIMIT)
        self.app = JsonApp(self.grpc, LIMIT)
        gateway_pb2_grpc.add_EntitlementGatewayServicer_to_server(Service(), self.grpc)

    async def serve(self, peer: Peer, *, path: str = PATH, method: str = "POST", content: str = "application/json"):
        scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", content.encode())]}
        async with asyncio.timeout(SOON_S):
            await self.app.serve(scope, peer.receive, peer.send)
        assert (self.grpc.in_flight, self.grpc.room.taken) == (0, 0)

    async def __call__(self, *parts: bytes, **asked: str) -> tuple[int, dict, dict[bytes, bytes]]:
        peer = Peer(*parts)
        await self.serve(peer, **asked)
        start, body = peer.sent
        headers = dict(start["headers"])
        assert headers[b"content-type"] == b"application/json"
        assert int(headers[b"content-length"]) == len(body["body"]) and not body["more_body"]
        return start["status"], json.loads(body["body"]), headers


class TestJson:
    async def test_a_call(self) -> None:
        curl = Json()
        body = b'{"idempotencyKey": "k", "customer": "c", "usage": [{"feature": "f", "quantity": "9007199254740993"}]}'
        for parts in ([body], [body[:10], body[10:30], body[30:]]):
            status, answer, _ = await curl(*parts)
            assert (status, answer) == (200, {"verdict": "VERDICT_ALLOW", "idempotencyKey": "k", "epoch": "7"})
            assert curl.asked[-1].usage[0].quantity == 2**53 + 1

    async def test_the_names_of_the_contract_are_fine_too(self) -> None:
        curl = Json()
        assert (await curl(b'{"idempotency_key": "k"}'))[1]["idempotencyKey"] == "k"
        assert (await curl(b"{}", content="application/json; charset=utf-8"))[0] == 200
        assert (await curl(b""))[0] == 200

    @pytest.mark.parametrize(
        ("code", "status"),
        [
            ("INVALID_ARGUMENT", 400),
            ("UNAUTHENTICATED", 401),
            ("PERMISSION_DENIED", 403),
            ("NOT_FOUND", 404),
            ("ALREADY_EXISTS", 409),
            ("RESOURCE_EXHAUSTED", 429),
            ("INTERNAL", 500),
            ("DATA_LOSS", 500),
            ("UNIMPLEMENTED", 501),
            ("UNAVAILABLE", 503),
            ("DEADLINE_EXCEEDED", 504),
        ],
    )
    async def test_a_status(self, code: str, status: int) -> None:
        assert (await Json()(json.dumps({"customer": f"code {code}"}).encode()))[:2] == (
            status,
            {"code": code.lower(), "message": 'because "ü"\n'},
        )

    async def test_what_nobody_foresaw_is_counted_and_not_told(self) -> None:
        curl = Json()
        status, answer, _ = await curl(b'{"customer": "explode"}')
        assert (status, answer) == (500, {"code": "unknown", "message": "internal error"})
        assert curl.grpc.failures == 1

    @pytest.mark.parametrize(
        "body",
        [
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe",
            b'{"customer": 1}',
            b'{"nope": 1}',
            b'{"customer": "a", "customer": "b"}',
            b'{"customer": "\\ud800"}',
            b'{"usage": [{"quantity": 1.5}]}',
            b'{"usage": [{"quantity": 9223372036854775808}]}',
            b'{"usage": [{"quantity": "NaN"}]}',
            b'{"usage": [{"quantity": ' + b"9" * 5000 + b"}]}",
            b'{"event_time": "yesterday"}',
            b'{"usage":' * 50_00 + b"1" + b"}" * 50_00,
            b"[" * 90_000,
        ],
    )
    async def test_what_is_no_request_is_refused(self, body: bytes) -> None:
        curl = Json()
        status, answer, _ = await curl(body)
        assert (status, answer["code"]) == (400, "invalid_argument")
        assert answer["message"].startswith("body: ") and len(answer["message"]) < 400
        assert not curl.asked

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "OPTIONS"])
    async def test_other_methods(self, method: str) -> None:
        status, answer, headers = await Json()(b"", method=method)
        assert (status, answer["code"], headers[b"allow"]) == (405, "unimplemented", b"POST")

    @pytest.mark.parametrize("path", ["/", "/nope/Nope", "/entitlement.v1.EntitlementGateway/CheckAndConsumeStream"])
    async def test_other_paths(self, path: str) -> None:
        assert (await Json()(b"{}", path=path))[:1] == (404,)

    async def test_a_method_that_no_descriptor_knows(self) -> None:
        curl = Json()
        handler = grpc.unary_unary_rpc_method_handler(Servicer().Echo)
        curl.grpc.add_registered_method_handlers("t.T", {"Echo": handler})
        assert (await curl(b"{}", path="/t.T/Echo"))[0] == 404

    @pytest.mark.parametrize("content", ["", "text/plain", "application/grpc-web", "application/x-www-form-urlencoded"])
    async def test_other_content_types(self, content: str) -> None:
        status, answer, _ = await Json()(b"{}", content=content)
        assert status == 415 and "application/json" in answer["message"]

    async def test_too_large(self) -> None:
        for parts in ([bytes(LIMIT + 1)], [bytes(10_000)] * 50):
            status, answer, _ = await Json()(*parts)
            assert (status, answer["code"]) == (413, "resource_exhausted")

    async def test_too_much_at_once(self) -> None:
        curl = Json()
        curl.grpc.room.take(MAX_UNFINISHED_BYTES - 1)
        peer = Peer(bytes(90_000), b"", ended=True)
        scope = {
            "type": "http",
            "method": "POST",
            "path": Json.PATH,
            "headers": [(b"content-type", b"application/json")],
        }
        await curl.app.serve(scope, peer.receive, peer.send)
        assert peer.sent[0]["status"] == 429

    @pytest.mark.parametrize("parts", [[], [b"{"], [b'{"idempotency_key": "k"}']])
    async def test_a_peer_that_goes_away_has_asked_nothing(self, parts: Iterable[bytes]) -> None:
        curl = Json()
        peer = Peer(*parts, ended=False)
        peer.vanish()
        await curl.serve(peer)
        assert not peer.sent and not curl.asked

    async def test_a_peer_that_does_not_wait_for_its_answer(self) -> None:
        peer = Peer(b"{}")
        peer._gone = True
        await Json().serve(peer)
