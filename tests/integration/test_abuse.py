"""What nobody should send: a clear status or a closed connection, bounded memory, and others are served meanwhile."""

from __future__ import annotations

import itertools
import random
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from time import monotonic

import grpc
import pytest

from entitlement.v1 import gateway_pb2 as pb
from gateway.transport.frames import compressed_frame, frame
from tests import http2
from tests.gateway_process import MIB, GatewayProcess, Steady, asked, installed, prepare
from tests.gateway_rig import CHANNEL, SERVICE
from tests.hot_stores import CUSTOMER
from tests.http2 import Closed, Connection
from tests.servers import DEADLINE_S, ValkeyProcess

CONSUME, BATCH, STREAM = (SERVICE + f"CheckAndConsume{kind}" for kind in ("", "Batch", "Stream"))
LIMITED = (("grpc-timeout", "500m"),)  # grpcio answers half a message with nothing, until the call's deadline
STREAMS = 2_048  # of one connection, at a time


@pytest.fixture(scope="module")
def gateway(transport: str, valkey_server: ValkeyProcess) -> Iterator[GatewayProcess]:
    """One process for all that is done to it. It ends as if nothing had happened."""
    installed(transport)
    prepare(valkey_server.url)
    with GatewayProcess(transport, valkey_server.url) as process:
        yield process
        process.terminate()
        assert process.exit_code() == 0
        assert "Traceback" not in process.output and "xception" not in process.output, process.output


@pytest.fixture(autouse=True)
def steady(gateway: GatewayProcess) -> Iterator[Steady]:
    """Another client, all the time. Whatever a test does, its calls are answered and the process lives."""
    with Steady(gateway.address).calling() as client:
        yield client
    assert gateway.alive


@pytest.fixture
def bounded(gateway: GatewayProcess) -> Iterator[Callable[[int], None]]:
    """How many bytes the process may grow by, at its peak, in this test. Not to be told: 64 MiB."""
    limits = [64 * MIB]
    before = gateway.memory()
    yield limits.append
    grown = gateway.peak() - before
    assert grown < limits[-1], f"grew by {grown / MIB:.0f} MiB"


def outcome(gateway: GatewayProcess, body: bytes, *headers: tuple[str, str], path: str = CONSUME) -> dict[str, str]:
    """How a call with this body ends, on a connection of its own."""
    with Connection(gateway.address, timeout=DEADLINE_S) as connection:
        return connection.outcome(connection.request(path, body, headers=(*LIMITED, *headers)))


@cache
def bomb(size: int) -> bytes:
    packer = zlib.compressobj(6, wbits=31)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()


def answer_to(address: str, junk: bytes) -> bytes:
    """All that comes back until the server has closed the connection."""
    with http2.connect(address, DEADLINE_S) as sock:
        try:
            sock.sendall(junk)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # It was closed before everything was said.
        answer = b""
        while True:
            try:
                more = sock.recv(1 << 16)
            except ConnectionError:
                return answer
            if not more:
                return answer
            answer += more


class TestGarbage:
    @pytest.mark.parametrize("unix", [False, True])
    def test_is_answered_with_an_end(self, gateway: GatewayProcess, bounded: object, unix: bool, seed: int) -> None:
        address = f"unix:{gateway.path}" if unix else gateway.address
        generator = random.Random(seed)
        junk = [
            b"",
            b"\0",
            b"\0" * 1_000,
            b"\xff" * 100_000,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,  # TLS where there is none.
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET /\r\n\r\n",
            b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"x" * 100_000,
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 2_000 + b"\r\n",
            b"\r\n" * 10_000,
            http2.PREFACE[:10],
            http2.PREFACE[:10] + b"z" * 100,
            http2.PREFACE + b"\xff" * 1_000,
            *(generator.randbytes(generator.randrange(1, 5_000)) for _ in range(20)),
            *(http2.PREFACE + generator.randbytes(generator.randrange(1, 500)) for _ in range(20)),
        ]
        for one in junk:
            assert len(answer_to(address, one)) < 100_000, one[:100]

    def test_frames_that_break_the_rules_end_the_connection(self, gateway: GatewayProcess, bounded: object) -> None:
        request = Connection.request_bytes(1, CONSUME, frame(b""))
        settings = http2.frame(http2.SETTINGS, 0, 0)
        broken = {
            "longer than it may be": http2.frame(http2.DATA, 0, 1, bytes(100_000)),
            "data on no stream": http2.frame(http2.DATA, 0, 0, b"x"),
            "data on a stream that is not open": http2.frame(http2.DATA, 0, 99, b"x"),
            "headers on no stream": http2.frame(http2.HEADERS, http2.END_HEADERS, 0, b"\x82"),
            "headers on the server's stream": http2.frame(http2.HEADERS, http2.END_HEADERS, 2, b"\x82"),
            "headers that are none": http2.frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff" * 50),
            "a table index that is none": http2.frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xc6"),
            "a continuation of nothing": http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, b"\x82"),
            "a window that overflows": http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"),
            "a window of nothing": http2.frame(http2.WINDOW_UPDATE, 0, 0, bytes(4)),
            "settings of a wrong size": http2.frame(http2.SETTINGS, 0, 0, b"12345"),
            "a ping of a wrong size": http2.frame(http2.PING, 0, 0, b"1"),
            "padding longer than the frame": http2.frame(http2.DATA, http2.PADDED, 1, b"\xff"),
            "a stream number that goes back": Connection.request_bytes(9, CONSUME, b"") + request,
        }
        for what, data in broken.items():
            begin = b"" if "stream number" in what else request
            answer_to(gateway.address, http2.PREFACE + settings + begin + data), what

    @pytest.mark.parametrize("cut", [1, 8, 9, 20, 60, 120])
    def test_frames_that_end_in_the_middle(self, gateway: GatewayProcess, bounded: object, cut: int) -> None:
        whole = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + Connection.request_bytes(1, CONSUME, frame(b"abc"))
        answer_to(gateway.address, whole[: len(http2.PREFACE) + 9 + cut])


class TestMessages:
    def test_a_length_that_lies(self, gateway: GatewayProcess, transport: str, bounded: object) -> None:
        message = asked().SerializeToString()
        size = len(message)
        too_long = outcome(gateway, b"\0" + (size + 10).to_bytes(4, "big") + message)
        huge = outcome(gateway, b"\0\xff\xff\xff\xff" + message)
        nothing = outcome(gateway, b"")
        too_short = outcome(gateway, b"\0" + (size - 2).to_bytes(4, "big") + message)
        found = [ended["grpc-status"] for ended in (too_long, huge, nothing)]
        assert found == (["3", "8", "3"] if transport == "envoy" else ["4", "4", "4"])
        assert too_short["grpc-status"] == "3"

    def test_that_are_no_request(self, gateway: GatewayProcess, bounded: object, seed: int) -> None:
        generator = random.Random(seed)
        for size in (1, 10, 100, 10_000):
            ended = outcome(gateway, frame(b"\xff" + generator.randbytes(size)))
            assert ended["grpc-status"] == "3"
            assert ended["grpc-message"] == "request: does not decode as the method's message"

    @pytest.mark.parametrize("path", [CONSUME, BATCH, STREAM])
    def test_a_compressed_bomb(self, gateway: GatewayProcess, bounded: object, path: str) -> None:
        packed = bomb(300 * MIB)
        with Connection(gateway.address, timeout=DEADLINE_S) as connection:
            stream = connection.request(path, end=False, headers=(("grpc-encoding", "gzip"),))
            body = b"\1" + len(packed).to_bytes(4, "big") + packed
            assert connection.upload([stream], body) == len(body)
            connection.data(stream, b"", end=True)
            ended = connection.outcome(stream)
        assert ended["grpc-status"] == "8"
        assert ended["grpc-message"] == "message inflates to more than the limit of 4194304 bytes"

    def test_what_says_it_is_gzip_and_is_not(self, gateway: GatewayProcess, bounded: object) -> None:
        for body in (b"\1\0\0\0\5abcde", compressed_frame(asked().SerializeToString())[:-4]):
            fixed = b"\1" + (len(body) - 5).to_bytes(4, "big") + body[5:]
            assert outcome(gateway, fixed, ("grpc-encoding", "gzip"))["grpc-status"] in ("3", "13")

    def test_an_unknown_encoding(self, gateway: GatewayProcess, bounded: object) -> None:
        ended = outcome(gateway, frame(b""), ("grpc-encoding", "snappy"))
        assert ended.get("grpc-status") == "12" or "reset" in ended

    def test_five_megabytes(self, gateway: GatewayProcess, bounded: Callable[[int], None]) -> None:
        bounded(96 * MIB)
        with grpc.insecure_channel(gateway.address, options=CHANNEL) as channel:
            for path in (CONSUME, BATCH):
                with pytest.raises(grpc.RpcError) as error:
                    channel.unary_unary(path)(bytes(5_000_000), timeout=DEADLINE_S)
                assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_metadata_over_sixteen_kibibytes(self, gateway: GatewayProcess, bounded: object) -> None:
        with grpc.insecure_channel(gateway.address, options=CHANNEL) as channel:
            for metadata in ([("x-big", "y" * 17_000)], [(f"x-{n}", "y" * 100) for n in range(200)]):
                with pytest.raises(grpc.RpcError) as error:
                    channel.unary_unary(CONSUME)(b"", timeout=DEADLINE_S, metadata=metadata)
                assert error.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)

    def test_headers_without_end(self, gateway: GatewayProcess, transport: str, bounded: object) -> None:
        begin = http2.frame(http2.HEADERS, 0, 1, http2.literal("x", "y" * 10_000))
        more = http2.frame(http2.CONTINUATION, 0, 1, http2.literal("x", "y" * 10_000))
        assert ends(gateway, begin, more, 2_000) or transport == "grpcio"  # It reads on, and keeps nothing.


class TestFloods:
    def test_thousands_of_streams_on_one_connection(
        self, gateway: GatewayProcess, bounded: Callable[[int], None]
    ) -> None:
        bounded(256 * MIB)
        with Connection(gateway.address, timeout=DEADLINE_S) as connection:
            assert connection.until(lambda got: got.kind == http2.SETTINGS)
            blocks = [Connection.request_bytes(1 + 2 * n, STREAM, b"", end=False) for n in range(20_000)]
            try:
                connection.send(b"".join(blocks))
                beyond = connection.outcome(1 + 2 * (STREAMS + 500))
            except Closed:
                beyond = {"closed": ""}
        assert beyond.keys() <= {"closed", "goaway", "reset"}

    def test_as_many_streams_as_are_allowed_are_all_served(
        self, gateway: GatewayProcess, bounded: Callable[[int], None]
    ) -> None:
        bounded(256 * MIB)
        with Connection(gateway.address, window=1 << 20, timeout=DEADLINE_S) as connection:
            assert connection.until(lambda got: got.kind == http2.SETTINGS)
            connection.send(http2.frame(http2.WINDOW_UPDATE, 0, 0, (1 << 26).to_bytes(4, "big")))
            streams = [connection.request(STREAM, end=False) for _ in range(2_000)]
            for stream in streams:
                connection.upload([stream], frame(asked().SerializeToString()))
            answers = {got.stream for got in connection.seen if got.kind == http2.DATA}
            for got in connection.frames():
                if got.kind == http2.DATA and got.payload:
                    answers.add(got.stream)
                    if len(answers) == len(streams):
                        break
            assert answers == set(streams)

    def test_requests_that_are_never_finished(
        self, gateway: GatewayProcess, transport: str, bounded: Callable[[int], None]
    ) -> None:
        bounded(300 * MIB)
        half = b"\0" + (4_000_000).to_bytes(4, "big") + bytes(MIB)
        with Connection(gateway.address, timeout=3) as connection:
            assert connection.until(lambda got: got.kind == http2.SETTINGS)
            streams = [connection.request(CONSUME, end=False) for _ in range(150)]
            connection.upload(streams, half)
            refused = Counter(
                http2.decode(got.payload).get("grpc-status") for got in connection.seen if got.kind == http2.HEADERS
            )
        if transport == "envoy":  # All that is unfinished is bounded; grpcio bounds each call and their number.
            assert refused["8"] >= 150 - 64

    @pytest.mark.parametrize(
        "flood",
        [
            http2.frame(http2.PING, 0, 0, bytes(8)),
            http2.frame(http2.SETTINGS, 0, 0, http2.setting(http2.INITIAL_WINDOW_SIZE, 1)),
            http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\0\0\0\1"),
            http2.frame(http2.DATA, 0, 1),
            http2.frame(99, 0, 0, b"unknown"),
        ],
        ids=["ping", "settings", "window", "empty data", "unknown"],
    )
    def test_of_frames(self, gateway: GatewayProcess, bounded: Callable[[int], None], flood: bytes) -> None:
        bounded(128 * MIB)
        ends(gateway, Connection.request_bytes(1, STREAM, b"", end=False), flood, 50_000)

    def test_of_streams_that_are_reset_at_once(self, gateway: GatewayProcess, bounded: Callable[[int], None]) -> None:
        bounded(128 * MIB)
        flood = b"".join(
            Connection.request_bytes(stream, CONSUME, b"", end=False)
            + http2.frame(http2.RST_STREAM, 0, stream, bytes(4))
            for stream in range(1, 20_001, 2)
        )
        ends(gateway, b"", flood, 1)


class TestSlowAndGone:
    def test_a_reader_that_does_not_read_answers(self, gateway: GatewayProcess, bounded: Callable[[int], None]) -> None:
        bounded(128 * MIB)
        batch = pb.CheckAndConsumeBatchRequest(requests=[asked(mode=pb.MODE_CHECK_ONLY) for _ in range(500)])
        body = frame(batch.SerializeToString())
        with Connection(gateway.address, window=0, timeout=DEADLINE_S) as connection:
            assert connection.until(lambda got: got.kind == http2.SETTINGS)
            streams = [connection.request(BATCH, end=False) for _ in range(40)]
            connection.upload(streams, body)
            for stream in streams:
                connection.data(stream, b"", end=True)
            for stream in streams:  # The headers come; the answers must wait.
                assert connection.begins(stream)
            assert not any(connection.counts().values())

    def test_a_reader_that_does_not_read_a_stream(
        self, gateway: GatewayProcess, bounded: Callable[[int], None]
    ) -> None:
        bounded(96 * MIB)
        with Connection(gateway.address, window=0, timeout=1) as connection:
            assert connection.until(lambda got: got.kind == http2.SETTINGS)
            stream = connection.request(STREAM, end=False)
            body = b"".join(frame(asked(mode=pb.MODE_CHECK_ONLY).SerializeToString()) for _ in range(2_000))
            sent = list(itertools.takewhile(bool, (connection.upload([stream], body) for _ in range(100))))
            assert sum(sent) < 50 * len(body), "it goes on reading though nothing is taken of its answers"

    def test_a_sender_that_sends_a_byte_now_and_then(self, gateway: GatewayProcess, bounded: object) -> None:
        message = frame(asked().SerializeToString())
        with Connection(gateway.address, timeout=DEADLINE_S) as connection:
            streams = [connection.request(CONSUME, end=False) for _ in range(20)]
            for at in range(len(message)):
                for stream in streams:
                    connection.data(stream, message[at : at + 1], end=at + 1 == len(message))
            statuses = {connection.outcome(stream)["grpc-status"] for stream in streams}
        assert statuses == {"0"}

    def test_hundreds_of_connections_that_say_hardly_anything(
        self, gateway: GatewayProcess, bounded: object, steady: Steady
    ) -> None:
        """Half a greeting, half of the headers, half a message: a letter now and then, and never the end."""
        begin = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0)
        headers = http2.frame(http2.HEADERS, 0, 1, http2.literal("x", "y"))
        half = begin + Connection.request_bytes(1, CONSUME, frame(b"abc")[:4], end=False)
        before = gateway.sockets()
        slow = [
            (http2.connect(gateway.address, DEADLINE_S), said) for said in (begin[:10], begin + headers, half) * 100
        ]
        try:
            for at in range(0, len(half), 20):
                for sock, said in slow:
                    with suppress(OSError):  # It may be closed by now.
                        sock.sendall(said[at : at + 20])
                steady.goes_on(5)
        finally:
            for sock, _ in slow:
                sock.close()
        deadline = monotonic() + DEADLINE_S
        while gateway.sockets() > before + 2:
            steady.goes_on(1)
            assert monotonic() < deadline, "connections of clients that are gone are still open"

    @pytest.mark.parametrize("abrupt", [False, True])
    def test_clients_that_vanish_in_the_middle_of_a_call(
        self, gateway: GatewayProcess, bounded: object, steady: Steady, abrupt: bool
    ) -> None:
        steady.goes_on(1)
        before = gateway.sockets()
        message = frame(asked().SerializeToString())
        watch = frame(pb.GetBalanceRequest(customer=CUSTOMER).SerializeToString())
        for _ in range(30):
            for path, body, end in (
                (CONSUME, message, True),
                (CONSUME, message[:10], False),
                (CONSUME, b"", False),
                (STREAM, message + message[:3], False),
                (SERVICE + "WatchBalance", watch, True),
            ):
                connection = Connection(gateway.address, timeout=DEADLINE_S)
                connection.request(path, body, end=end)
                if abrupt:
                    connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
        deadline = monotonic() + DEADLINE_S
        while gateway.sockets() > before + 2:
            steady.goes_on(1)
            assert monotonic() < deadline, "connections of clients that are gone are still open"


def ends(gateway: GatewayProcess, begin: bytes, flood: bytes, times: int) -> bool:
    """Says something again and again. Answers whether the server put an end to it; if not, it has borne it."""
    with Connection(gateway.address, timeout=1) as connection:
        try:
            connection.send(begin)
            for _ in range(0, times, 100):
                connection.send(flood * min(times, 100))
            return any(got.kind == http2.GOAWAY for got in connection.frames())
        except Closed:
            return True
        except TimeoutError:
            return False
