"""The pipelined connection on the real server: one write a turn, order, cancellation, cuts, forgotten scripts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator

import pytest

from entitlement.account import HotGrant
from entitlement.decision import Limits, Verdict
from entitlement.errors import Unavailable
from entitlement.redis_address import Endpoint
from gateway.store.connection import Connection, StoreError, connect, pack
from gateway.store.redis_store import RedisStore
from tests.conftest import start_or_skip
from tests.hot_stores import TOKENS, Hot, RedisBench, account, charge, redis_bench, request
from tests.servers import ValkeyProcess, free_port

SECRET = "hunter2-canary"
CALLS, CANCELLED = 3_000, 500


@pytest.fixture
async def connection(valkey_url: str) -> AsyncIterator[Connection]:
    made = await connect(Endpoint.parse(valkey_url), 10_000)
    yield made
    made.close()


class Wire(asyncio.WriteTransport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def abort(self) -> None:
        self.aborted = True


async def turn() -> None:
    """One turn of the loop."""
    await asyncio.sleep(0)


async def test_the_commands_of_one_loop_turn_leave_in_one_write_in_their_order() -> None:
    connection, wire = Connection(asyncio.get_running_loop(), 1_000), Wire()
    connection.connection_made(wire)
    commands = [pack("ECHO", number) for number in range(100)]
    for command in commands[:50]:
        connection.call(command)
    connection.call_many(commands[50:])
    assert wire.writes == []
    await turn()
    assert wire.writes == [b"".join(commands)]
    connection.call(commands[0])
    await turn()
    assert wire.writes[1:] == [commands[0]]
    await turn()
    assert len(wire.writes) == 2
    connection.connection_lost(None)


async def test_every_caller_gets_its_own_answer(connection: Connection) -> None:
    answers = await asyncio.gather(*(connection.call(pack("ECHO", number)) for number in range(10_000)))
    assert answers == [b"%d" % number for number in range(10_000)]
    assert connection.in_flight == 0


async def test_many_commands_get_their_answers_as_one_list_with_errors_among_them(connection: Connection) -> None:
    one = connection.call(pack("ECHO", "before"))
    many = connection.call_many([pack("ECHO", 1), pack("NOSUCH"), pack("ECHO", 3), pack("TIME")])
    other = connection.call(pack("ECHO", "after"))
    answers = await many
    assert (answers[0], answers[2]) == (b"1", b"3")
    assert isinstance(answers[1], StoreError)
    assert isinstance(answers[3], list)
    assert [await one, await other] == [b"before", b"after"]


async def test_an_error_answer_is_raised_to_its_caller_and_to_nobody_else(connection: Connection) -> None:
    answers = await asyncio.gather(
        connection.call(pack("ECHO", 1)),
        connection.call(pack("NOSUCH", "x")),
        connection.call(pack("EVAL", "return redis.error_reply('MY own')", 0)),
        connection.call(pack("ECHO", 4)),
        return_exceptions=True,
    )
    assert (answers[0], answers[3]) == (b"1", b"4")
    assert str(answers[1]).startswith("ERR unknown command") and str(answers[2]) == "MY own"


async def cancel_some(connection: Connection, rng: random.Random, calls: int, cancelled: int) -> None:
    """Callers come over many turns, some alone and some in lists; at random moments some go away."""
    answered = 0

    async def caller(number: int) -> None:
        nonlocal answered
        if number % 3:
            assert await connection.call(pack("ECHO", number)) == b"%d" % number
        else:
            expected = [b"%d.%d" % (number, part) for part in range(4)]
            assert await connection.call_many([pack("ECHO", text) for text in expected]) == expected
        answered += 1

    tasks: list[asyncio.Task[None]] = []
    victims = rng.sample(range(calls), cancelled)
    waiting_victims = iter(victims)
    while len(tasks) < calls:
        tasks += [
            asyncio.create_task(caller(number))
            for number in range(len(tasks), min(calls, len(tasks) + rng.randint(1, 40)))
        ]
        await turn()
        for victim in [number for number in victims if number < len(tasks) and rng.random() < 0.2]:
            tasks[victim].cancel()
    for victim in waiting_victims:
        tasks[victim].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    wrong = [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, asyncio.CancelledError)]
    assert not wrong, wrong[:3]
    assert answered >= calls - cancelled
    assert await connection.call(pack("ECHO", "last")) == b"last"


async def test_a_cancelled_call_never_gives_its_answer_to_another_caller(connection: Connection, seed: int) -> None:
    await cancel_some(connection, random.Random(seed), CALLS, CANCELLED)


async def test_a_call_cancelled_before_it_was_written_changes_nothing_for_its_neighbours(
    connection: Connection,
) -> None:
    calls = [connection.call(pack("ECHO", number)) for number in range(5)]
    for call in (calls[0], calls[2], calls[4]):
        call.cancel()
    assert [await calls[1], await calls[3]] == [b"1", b"3"]
    assert await connection.call(pack("ECHO", 9)) == b"9"


async def test_a_large_answer_and_a_large_command_arrive_whole(connection: Connection) -> None:
    text = random.Random(1).randbytes(3_000_000)
    first, second = connection.call(pack("ECHO", text)), connection.call(pack("ECHO", "small"))
    assert await first == text
    assert await second == b"small"


async def test_after_closing_every_call_is_unavailable_at_once(connection: Connection) -> None:
    flying = connection.call(pack("ECHO", 1))
    connection.close()
    connection.close()
    with pytest.raises(Unavailable, match="outcome is unknown"):
        await flying
    await connection.lost
    with pytest.raises(Unavailable, match="not connected"):
        await connection.call(pack("ECHO", 1))
    with pytest.raises(Unavailable, match="not connected"):
        await connection.call_many([pack("ECHO", 1)])


async def test_the_database_of_the_url_is_used(valkey_server: ValkeyProcess) -> None:
    with ValkeyProcess(port=free_port()) as server:
        connection = await connect(Endpoint.parse(f"redis://127.0.0.1:{server.port}/3"), 10_000)
        assert b" db=3 " in await connection.call(pack("CLIENT", "INFO"))  # type: ignore[operator]
        connection.close()


# The store on top of it.


@pytest.fixture
async def bench(valkey_url: str) -> AsyncIterator[RedisBench]:
    async with redis_bench(valkey_url) as made:
        made.put(account(HotGrant(1, 10**6)))
        yield made


async def test_a_forgotten_script_is_sent_again(bench: RedisBench) -> None:
    hot = Hot(bench)
    for number in range(3):
        bench.client.script_flush()
        assert (await hot.decide(f"k{number}", (TOKENS, 1))).sequence == number + 1
    calls = bench.client.info("commandstats")
    await hot.decide("k9", (TOKENS, 1))
    after = bench.client.info("commandstats")
    assert after["cmdstat_eval"]["calls"] == calls["cmdstat_eval"]["calls"]  # By its name again.


async def test_many_callers_of_a_forgotten_script_are_all_decided(bench: RedisBench) -> None:
    hot = Hot(bench)
    bench.client.script_flush()
    answers = await asyncio.gather(*(hot.decide(f"k{number}", (TOKENS, 1)) for number in range(200)))
    assert sorted(answer.sequence for answer in answers) == list(range(1, 201))
    bench.client.script_flush()
    calls = [request(f"m{number}", (TOKENS, 1)) for number in range(20)]
    outcomes = await bench.store.consume_many([(call, charge(call)) for call in calls])
    assert [outcome.sequence for outcome in outcomes] == list(range(201, 221))  # type: ignore[union-attr]


def store_of(bench: RedisBench) -> RedisStore:
    assert isinstance(bench.store, RedisStore)
    return bench.store


async def reconnected(store: RedisStore) -> None:
    async with asyncio.timeout(10):
        await store._up.wait()


async def test_a_cut_connection_is_made_again(bench: RedisBench) -> None:
    store, hot = store_of(bench), Hot(bench)
    for number in range(5):
        lost = store._connection.lost  # type: ignore[union-attr]
        bench.client.client_kill_filter(skipme=True, _type="normal")
        await lost
        await turn()
        await reconnected(store)
        assert (await hot.decide(f"k{number}", (TOKENS, 1))).verdict is Verdict.ALLOW


async def test_every_answer_given_around_a_cut_is_true(bench: RedisBench, seed: int) -> None:
    """Callers that hear Unavailable repeat their key: in the end each is charged once."""
    store, hot, rng = store_of(bench), Hot(bench), random.Random(seed)

    async def caller(number: int) -> int:
        while True:
            try:
                return (await hot.decide(f"k{number}", (TOKENS, 1))).sequence
            except Unavailable:
                await turn()  # The store has not noticed yet.
                await reconnected(store)

    callers = [asyncio.create_task(caller(number)) for number in range(400)]
    for _ in range(5):
        for _ in range(rng.randrange(5)):
            await turn()
        bench.client.client_kill_filter(skipme=True, _type="normal")
    sequences = await asyncio.gather(*callers)
    assert sorted(sequences) == list(range(1, 401))
    assert (await hot.account()).settled == 400


async def test_a_store_starts_and_stops_twice(valkey_url: str) -> None:
    store = RedisStore(Endpoint.parse(valkey_url), limits=Limits(), timeout_ms=10_000)
    assert not store.connected
    for _ in range(2):
        await store.start()
        await store.start()
        assert store.connected
        await store.stop()
        await store.stop()
        assert not store.connected
    with pytest.raises(Unavailable, match="not connected"):
        await store.read("acme", "bob")


async def test_a_store_that_cannot_be_reached_does_not_start() -> None:
    store = RedisStore(Endpoint("127.0.0.1", free_port()), limits=Limits(), timeout_ms=1_000)
    with pytest.raises(Unavailable, match=r"^hot store at 127\.0\.0\.1:"):
        await store.start()
    await store.stop()
    with pytest.raises(Unavailable, match="not connected"):
        await store.consume(request("k1", (TOKENS, 1)), charge(request("k1", (TOKENS, 1))))


@pytest.fixture(scope="module")
def guarded() -> Iterator[ValkeyProcess]:
    with start_or_skip(lambda: ValkeyProcess(requirepass=SECRET, port=free_port())) as server:
        yield server


async def test_a_password_opens_the_door(guarded: ValkeyProcess) -> None:
    for url in (f"redis://:{SECRET}@127.0.0.1:{guarded.port}", f"unix://default:{SECRET}@{guarded.path}"):
        connection = await connect(Endpoint.parse(url), 10_000)
        assert await connection.call(pack("PING")) == "PONG" or await connection.call(pack("PING")) == b"PONG"
        connection.close()


@pytest.mark.parametrize("userinfo", [":wrong-{}", "nobody:{}", "default:wrong-{}", ""])
async def test_a_wrong_password_is_refused_and_never_shown(guarded: ValkeyProcess, userinfo: str) -> None:
    url = f"redis://{userinfo.format(SECRET)}@127.0.0.1:{guarded.port}"
    store = RedisStore(Endpoint.parse(url), limits=Limits(), timeout_ms=10_000)
    with pytest.raises(Unavailable) as error:
        await store.start()
    assert SECRET not in f"{error.value}{error.value!r}{store!r}"
    assert error.value.__suppress_context__
