"""The pipelined connection on a server that hangs, stutters, lies or goes away."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator

import pytest

from entitlement.decision import Limits
from entitlement.errors import CorruptRecord, Unavailable
from entitlement.redis_address import Endpoint
from gateway.store.connection import connect, pack
from gateway.store.redis_store import RedisStore
from tests.contract.test_connection import SECRET, cancel_some
from tests.fake_redis import Command, FakeServer, bulk, echo, fake_redis
from tests.hot_stores import TOKENS, charge, request

SHORT_MS, LONG_MS = 60, 10_000


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_redis() as made:
        yield made


def hold(_: Command) -> None:
    """No answer until it is released."""


async def elapsed(call: asyncio.Future[object]) -> float:
    """How long it took until the call was Unavailable."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(Unavailable, match="no answer within"):
        await call
    return loop.time() - started


async def test_a_deadline_is_kept_when_the_server_hangs(server: FakeServer) -> None:
    connection = await connect(server.endpoint, SHORT_MS)
    server.answer = hold
    took = await elapsed(connection.call(pack("ECHO", 1)))
    assert SHORT_MS / 1000 - 0.01 <= took < SHORT_MS / 1000 + 1
    connection.close()


async def test_a_late_answer_is_dropped_and_the_next_call_gets_its_own(server: FakeServer) -> None:
    connection = await connect(server.endpoint, SHORT_MS)
    server.answer = hold
    late = [connection.call(pack("ECHO", number)) for number in range(3)]
    many = connection.call_many([pack("ECHO", number) for number in range(3, 6)])
    for call in (*late, many):
        await elapsed(call)  # type: ignore[arg-type]
    following = connection.call(pack("ECHO", "mine"))
    await server.hears(7)
    server.last.release()
    assert await following == b"mine"
    server.answer = echo
    assert await connection.call(pack("ECHO", "again")) == b"again"
    connection.close()


async def test_a_list_that_is_overdue_halfway_through_is_dropped_whole(server: FakeServer) -> None:
    connection = await connect(server.endpoint, SHORT_MS)
    server.answer = lambda command: echo(command) if command[-1] in b"01" else None
    many = connection.call_many([pack("ECHO", number) for number in range(4)])
    await elapsed(many)  # type: ignore[arg-type]
    following = connection.call_many([pack("ECHO", "a"), pack("ECHO", "b")])
    await server.hears(6)
    server.last.release()
    assert await following == [b"a", b"b"]
    connection.close()


async def test_a_server_that_never_reads_leaves_no_call_waiting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        connection = await connect(Endpoint(*deaf.getsockname()), SHORT_MS)
        for _ in range(5):  # More than the sockets' buffers hold.
            calls = [connection.call(pack("ECHO", bytes(1_000_000))) for _ in range(4)]
            outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
            assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
        connection.close()


async def test_a_server_that_stays_silent_is_given_up(server: FakeServer) -> None:
    connection = await connect(server.endpoint, 20)
    server.answer = hold
    with pytest.raises(Unavailable):
        await connection.call(pack("ECHO", 1))
    await asyncio.wait_for(connection.lost, 10)


async def test_a_connection_cut_in_flight_is_unavailable_for_all_that_was_asked(server: FakeServer) -> None:
    connection = await connect(server.endpoint, LONG_MS)
    server.answer = hold
    calls = [connection.call(pack("ECHO", number)) for number in range(100)]
    many = connection.call_many([pack("ECHO", 1), pack("ECHO", 2)])
    await server.hears(102)
    unsent = connection.call(pack("ECHO", "unsent"))
    server.last.cut()
    outcomes = await asyncio.gather(*calls, many, unsent, return_exceptions=True)
    assert {str(outcome) for outcome in outcomes} == {"hot store: connection lost; the outcome is unknown"}
    await asyncio.wait_for(connection.lost, 10)


async def test_answers_before_the_cut_are_given_and_those_after_it_are_not(server: FakeServer) -> None:
    connection = await connect(server.endpoint, LONG_MS)
    server.answer = lambda command: echo(command) if command[-1] < b"5" else None
    calls = [connection.call(pack("ECHO", number)) for number in range(10)]
    assert await asyncio.gather(*calls[:5]) == [b"%d" % number for number in range(5)]
    server.last.send(b"$1\r")  # Half an answer.
    server.last.cut()
    outcomes = await asyncio.gather(*calls[5:], return_exceptions=True)
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)


@pytest.mark.parametrize(
    "garbage",
    [b"garbage\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\0" * 32, b"$-7\r\n", b"*-9\r\n", b":1x\r\n"],
    ids=ascii,
)
async def test_garbage_closes_the_connection(server: FakeServer, garbage: bytes) -> None:
    connection = await connect(server.endpoint, LONG_MS)
    server.answer = lambda _: garbage
    call = connection.call(pack("ECHO", 1))
    with pytest.raises(Unavailable):
        await call
    await asyncio.wait_for(connection.lost, 10)


@pytest.mark.parametrize("unasked", [b"+OK\r\n", b":1\r\n", b"-ERR shutting down\r\n", b"$2\r\nhi\r\n"])
async def test_an_answer_that_nobody_asked_for_closes_the_connection(
    server: FakeServer, unasked: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    connection = await connect(server.endpoint, LONG_MS)
    assert await connection.call(pack("ECHO", 1)) == b"1"
    server.last.send(unasked)
    await asyncio.wait_for(connection.lost, 10)
    assert not caplog.records  # Closed on purpose, not by accident.


async def test_answers_in_the_smallest_pieces_reach_their_callers(server: FakeServer, seed: int) -> None:
    rng = random.Random(seed)
    connection = await connect(server.endpoint, LONG_MS)
    server.answer = hold
    calls = [connection.call(pack("ECHO", rng.randbytes(rng.randrange(50)))) for _ in range(200)]
    await server.hears(200)
    whole = b"".join(echo(command) for command in server.last.held)
    server.last.held.clear()
    pieces = sorted(rng.sample(range(1, len(whole)), 300))
    for start, end in zip([0, *pieces], [*pieces, len(whole)], strict=True):
        connection.data_received(whole[start:end])
    assert [await call for call in calls] == [command[-1] for command in server.commands]
    connection.close()


async def test_cancelling_never_crosses_answers_on_a_server_that_answers_late(server: FakeServer, seed: int) -> None:
    rng, loop = random.Random(seed), asyncio.get_running_loop()
    connection = await connect(server.endpoint, LONG_MS)

    def late(command: Command) -> bytes | None:
        if rng.random() < 0.8:
            return echo(command)
        loop.call_later(rng.random() / 500, lambda: server.last.release())
        return None

    server.answer = late
    await cancel_some(connection, rng, 2_000, 600)
    connection.close()


async def test_a_connection_that_is_given_up_while_it_is_made_is_closed(server: FakeServer) -> None:
    server.answer = hold
    making = asyncio.create_task(connect(Endpoint(server.endpoint.host, server.endpoint.port, password="x"), LONG_MS))
    await server.hears(1)
    making.cancel()
    await asyncio.gather(making, return_exceptions=True)
    await asyncio.wait_for(server.last.closed, 10)


async def test_no_door_that_fails_to_open_shows_the_password(server: FakeServer) -> None:
    endpoint = Endpoint(server.endpoint.host, server.endpoint.port, "", "user", SECRET, 5)
    answers = [
        b"-ERR unknown command 'AUTH', with args beginning with: 'user' '%b' \r\n" % SECRET.encode(),
        b"-WRONGPASS no\r\n",
        b"garbage %b\r\n" % SECRET.encode(),
    ]
    for answer in answers:
        server.answer = lambda _, answer=answer: answer  # type: ignore[misc]
        with pytest.raises(Unavailable) as error:
            await connect(endpoint, LONG_MS)
        assert SECRET not in f"{error.value}{error.value!r}"
        assert error.value.__suppress_context__
    server.answer = lambda command: b"+OK\r\n" if command[0] == b"AUTH" else b"-ERR DB index is out of range\r\n"
    with pytest.raises(Unavailable, match="out of range"):
        await connect(endpoint, LONG_MS)


# The store on top of it.


def store_at(endpoint: Endpoint) -> RedisStore:
    return RedisStore(endpoint, limits=Limits(), timeout_ms=LONG_MS, jitter=lambda: 0.0)


@pytest.mark.parametrize(
    "answer", [b":7\r\n", b"*0\r\n", b"$-1\r\n", bulk(b"what"), bulk(b"="), bulk(b""), bulk(b"!STALE")]
)
async def test_an_answer_that_is_none_of_the_script_s_is_corrupt(server: FakeServer, answer: bytes) -> None:
    server.answer = lambda command: bulk(b"sha") if command[0] == b"SCRIPT" else answer
    store, call = store_at(server.endpoint), request("k1", (TOKENS, 1))
    await store.start()
    with pytest.raises(CorruptRecord):
        await store.consume(call, charge(call))
    await store.stop()


@pytest.mark.parametrize(
    "error", ["OOM command not allowed", "MISCONF disk", "LOADING", "READONLY replica", "ERR script"]
)
async def test_an_error_of_the_server_is_unavailable_and_names_it(server: FakeServer, error: str) -> None:
    server.answer = lambda command: bulk(b"sha") if command[0] == b"SCRIPT" else f"-{error}\r\n".encode()
    store, call = store_at(server.endpoint), request("k1", (TOKENS, 1))
    await store.start()
    for asked in (store.consume(call, charge(call)), store.consume_many([(call, charge(call))]), store.read("a", "b")):
        with pytest.raises(Unavailable, match=f"^hot store: {error}"):
            await asked
    await store.stop()


async def test_a_store_that_stops_while_it_reconnects_leaves_no_connection(server: FakeServer) -> None:
    server.answer = lambda _: bulk(b"sha")
    store = store_at(server.endpoint)
    await store.start()
    server.answer = hold
    server.last.cut()
    await server.hears(2)  # Its second SCRIPT LOAD, unanswered.
    await store.stop()
    for connection in server.connections:
        await asyncio.wait_for(connection.closed, 10)
