"""The lane: who leaves with whom and when. The test moves the clock and says when a batch is answered."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import count

import grpc
import pytest

from entitlement.v1 import gateway_pb2 as pb
from gateway.client import Backoff, ClientClosed, DeadlineExceeded, EntitlementCallError, Overloaded, Unavailable
from gateway.client.errors import call_error
from gateway.client.lane import MAX_AWAY, MAX_BATCH_BYTES, PATIENCE_S, WORTH_A_BATCH, Lane

Status = grpc.StatusCode
Answer = asyncio.Future[pb.CheckAndConsumeResponse]
TIMEOUT_S = 1.0
PAUSE_S = 0.01  # after a first failure


class Clock:
    """Timers that are due when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None], /) -> None:
        heapq.heappush(self._due, (when, next(self._ids), callback))

    async def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            self.now, _, callback = heapq.heappop(self._due)
            callback()
            await turn()
        self.now = end


class Trip:
    """One batch on its way."""

    def __init__(self, requests: Sequence[bytes], timeout_s: float) -> None:
        self.keys = [request.decode() for request in requests]
        self.timeout_s = timeout_s
        self.end: asyncio.Future[list[pb.CheckAndConsumeResponse]] = asyncio.get_running_loop().create_future()

    async def answered(self, **errors: Status) -> None:
        self.end.set_result([_answer(key, errors.get(key)) for key in self.keys])
        await turn()

    async def failed(self, code: Status) -> None:
        self.end.set_exception(call_error(code, "told to"))
        await turn()


class Road:
    def __init__(self) -> None:
        self.trips: list[Trip] = []

    async def decide(self, requests: Sequence[bytes], timeout_s: float) -> Sequence[pb.CheckAndConsumeResponse]:
        self.trips.append(Trip(requests, timeout_s))
        return await self.trips[-1].end

    @property
    def keys(self) -> list[list[str]]:
        return [trip.keys for trip in self.trips]

    @property
    def away(self) -> list[Trip]:
        return [trip for trip in self.trips if not trip.end.done()]


rigs: list[Rig] = []


@pytest.fixture(autouse=True)
async def nothing_is_left_away() -> AsyncIterator[None]:
    yield
    for rig in rigs:
        for trip in rig.road.away:
            trip.end.cancel()
    await turn()
    rigs.clear()


class Rig:
    """A lane, and what a test does with it."""

    def __init__(self, *, max_batch: int = 256, max_in_flight: int = 10_000, pipeline: int = 1) -> None:
        self.clock = Clock()
        self.road = Road()
        self.lane = Lane(
            self.road,
            timeout_s=TIMEOUT_S,
            max_batch=max_batch,
            max_in_flight=max_in_flight,
            pipeline=pipeline,
            backoff=Backoff(first_ms=10, most_ms=40, jitter=lambda: 1.0),
            timers=self.clock,
        )
        rigs.append(self)

    def submit(self, *keys: str) -> list[Answer]:
        answers: list[Answer] = []
        for key in keys:
            answers.append(asyncio.get_running_loop().create_future())
            self.lane.submit(key, key.encode(), answers[-1])
        return answers


def _answer(key: str, error: Status | None) -> pb.CheckAndConsumeResponse:
    if error is None:
        return pb.CheckAndConsumeResponse(idempotency_key=key)
    return pb.CheckAndConsumeResponse(
        idempotency_key=key, error=pb.CallError(code=error.value[0], message=f"about {key}")
    )


async def turn() -> None:
    """Lets the loop do all it can do now."""
    for _ in range(6):
        await asyncio.sleep(0)


def names(number: int, prefix: str = "k") -> list[str]:
    return [f"{prefix}{n}" for n in range(number)]


def outcome(answer: Answer) -> str | EntitlementCallError:
    """The key that was answered, or the error."""
    error = answer.exception()
    assert error is None or isinstance(error, EntitlementCallError)
    return answer.result().idempotency_key if error is None else error


# Leaving


async def test_what_comes_in_one_turn_leaves_in_the_next_together() -> None:
    rig = Rig()
    answers = rig.submit("a", "b", "c")
    assert rig.road.keys == []
    await turn()
    assert rig.road.keys == [["a", "b", "c"]]
    await rig.road.trips[0].answered()
    assert [outcome(answer) for answer in answers] == ["a", "b", "c"]


async def test_what_comes_while_the_pipeline_is_full_leaves_together_when_a_batch_returns() -> None:
    rig = Rig(pipeline=2)
    for keys in (["a"], ["b"], ["c"], ["d", "e"]):
        rig.submit(*keys)
        await turn()
    assert rig.road.keys == [["a"], ["b"]]
    await rig.road.trips[1].answered()
    assert rig.road.keys == [["a"], ["b"], ["c", "d", "e"]]


async def test_a_batch_that_returns_takes_along_what_its_answers_lead_to() -> None:
    rig = Rig()
    (first,) = rig.submit("a")
    await turn()
    rig.submit("b")
    first.add_done_callback(lambda _: rig.submit("c"))
    await rig.road.trips[0].answered()
    assert rig.road.keys == [["a"], ["b", "c"]]


@pytest.mark.parametrize(
    ("calls", "pipeline", "sizes"),
    [
        (2 * WORTH_A_BATCH - 1, 2, [63]),
        (2 * WORTH_A_BATCH, 2, [32, 32]),
        (2 * WORTH_A_BATCH + 1, 2, [33, 32]),
        (2 * WORTH_A_BATCH, 1, [64]),
        (200, 4, [50, 50, 50, 50]),
        (100, 4, [34, 34, 32]),
    ],
)
async def test_calls_are_spread_over_free_places_when_there_are_enough(
    calls: int, pipeline: int, sizes: list[int]
) -> None:
    rig = Rig(pipeline=pipeline)
    rig.submit(*names(calls))
    await turn()
    assert [len(keys) for keys in rig.road.keys] == sizes
    assert [key for keys in rig.road.keys for key in keys] == names(calls)


async def test_a_batch_has_at_most_so_many_requests() -> None:
    rig = Rig(max_batch=3)
    rig.submit(*names(7))
    await turn()
    for trip in range(3):
        await rig.road.trips[trip].answered()
    assert rig.road.keys == [["k0", "k1", "k2"], ["k3", "k4", "k5"], ["k6"]]


async def test_a_batch_has_at_most_so_many_bytes_and_one_request_at_least() -> None:
    rig = Rig(pipeline=4)
    sizes = (MAX_BATCH_BYTES // 2, MAX_BATCH_BYTES // 2, 1, MAX_BATCH_BYTES + 1, 1)
    rig.submit(*["x" * size for size in sizes])
    await turn()
    assert [[len(key) for key in keys] for keys in rig.road.keys] == [[*sizes[:2]], [1], [sizes[3]], [1]]


async def test_slow_batches_are_overtaken_by_one_batch_for_each_patience() -> None:
    rig = Rig()
    rig.submit("slow")
    await turn()
    rig.submit("a", "b")
    await turn()
    await rig.clock.advance(PATIENCE_S * 0.9)
    rig.submit("c")
    assert rig.road.keys == [["slow"]]
    await rig.clock.advance(PATIENCE_S * 0.2)
    assert rig.road.keys == [["slow"], ["a", "b", "c"]]
    rig.submit("d")
    await turn()
    await rig.clock.advance(PATIENCE_S * 1.1)
    assert rig.road.keys == [["slow"], ["a", "b", "c"], ["d"]]


async def test_a_pipeline_that_moves_is_not_overtaken() -> None:
    rig = Rig()
    for n in range(10):
        rig.submit(f"k{n}")
        await turn()
        if n:
            await rig.road.away[0].answered()
        await rig.clock.advance(PATIENCE_S * 0.6)
        assert len(rig.road.away) == 1


async def test_however_slow_there_are_only_so_many_batches_away() -> None:
    rig = Rig()
    for n in range(MAX_AWAY + 8):
        rig.submit(f"k{n}")
        await turn()
        await rig.clock.advance(PATIENCE_S)
    assert len(rig.road.away) == MAX_AWAY


# Trying again


async def test_what_is_unavailable_is_tried_again_with_the_same_bytes_after_growing_pauses() -> None:
    rig = Rig()
    answers = rig.submit("a")
    await turn()
    for attempt, pause_s in enumerate((0.01, 0.02, 0.04, 0.04), start=1):
        await rig.road.trips[-1].failed(Status.UNAVAILABLE)
        await rig.clock.advance(pause_s * 0.9)
        assert len(rig.road.trips) == attempt
        await rig.clock.advance(pause_s * 0.2)
        assert rig.road.keys == [["a"]] * (attempt + 1)
    await rig.road.trips[-1].answered()
    assert [outcome(answer) for answer in answers] == ["a"]


async def test_what_waits_for_another_attempt_leaves_room_for_others_and_goes_first_then() -> None:
    rig = Rig()
    rig.submit("a")
    await turn()
    await rig.road.trips[0].failed(Status.UNAVAILABLE)
    rig.submit("c")
    await turn()
    rig.submit("d")
    await rig.clock.advance(PAUSE_S)
    await rig.road.trips[1].answered()
    assert rig.road.keys == [["a"], ["c"], ["a", "d"]]


async def test_one_call_of_a_batch_is_tried_again_or_fails_alone() -> None:
    rig = Rig()
    a, b, c, d = rig.submit("a", "b", "c", "d")
    await turn()
    await rig.road.trips[0].answered(b=Status.UNAVAILABLE, c=Status.ALREADY_EXISTS, d=Status.RESOURCE_EXHAUSTED)
    assert (outcome(a), b.done(), d.done()) == ("a", False, False)
    failed = outcome(c)
    assert isinstance(failed, EntitlementCallError)
    assert (failed.code, failed.message, failed.key) == (Status.ALREADY_EXISTS, "about c", "c")
    await rig.clock.advance(PAUSE_S)
    assert rig.road.keys[1:] == [["b", "d"]]
    await rig.road.trips[1].answered()
    assert (outcome(b), outcome(d)) == ("b", "d")


@pytest.mark.parametrize("code", [code for code in Status if code.name not in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")])
async def test_nothing_else_is_tried_again(code: Status) -> None:
    rig = Rig()
    answers = rig.submit("a", "b")
    await turn()
    await rig.road.trips[0].failed(code)
    for answer, key in zip(answers, "ab", strict=True):
        error = outcome(answer)
        assert isinstance(error, EntitlementCallError)
        assert (error.code, error.key) == (code, key)
    await rig.clock.advance(TIMEOUT_S)
    assert len(rig.road.trips) == 1


@pytest.mark.parametrize("code", [Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE])
async def test_a_gateway_without_room_or_time_is_sent_half_as_many_and_then_one_more_each_time(code: Status) -> None:
    rig = Rig()
    rig.submit(*names(20))
    await turn()
    await rig.road.trips[0].failed(code)
    await rig.clock.advance(PAUSE_S)
    await rig.road.trips[1].failed(code)
    for trip in (2, 3, 4):
        await rig.clock.advance(2 * PAUSE_S)
        await rig.road.trips[trip].answered()
    assert [len(keys) for keys in rig.road.keys] == [20, 10, 5, 6, 7, 2]
    assert sorted(key for keys in rig.road.keys[2:] for key in keys) == sorted(names(20))


# Deadlines


async def test_every_call_ends_by_its_own_deadline_and_a_late_answer_is_dropped() -> None:
    rig = Rig()
    (first,) = rig.submit("a")
    await turn()
    await rig.clock.advance(TIMEOUT_S / 2)
    (second,) = rig.submit("b")  # Overtakes.
    await rig.clock.advance(TIMEOUT_S * 0.49)
    assert not first.done()
    await rig.clock.advance(TIMEOUT_S * 0.02)
    error = outcome(first)
    assert isinstance(error, DeadlineExceeded) and error.key == "a"
    assert error.message == "no answer within 1000 ms; the outcome is unknown, retry with the same key"
    await rig.road.trips[0].answered()
    assert not second.done()
    await rig.clock.advance(TIMEOUT_S / 2)
    assert isinstance(outcome(second), DeadlineExceeded)


async def test_a_deadline_that_grpc_sees_first_is_told_in_the_same_words() -> None:
    rig = Rig()
    (answer,) = rig.submit("a")
    await turn()
    rig.clock.now += TIMEOUT_S  # The lane's own timer has not run.
    await rig.road.trips[0].failed(Status.DEADLINE_EXCEEDED)
    assert str(outcome(answer)).startswith("DEADLINE_EXCEEDED: no answer within 1000 ms; the outcome is unknown")


async def test_a_batch_may_take_as_long_as_its_youngest_call() -> None:
    rig = Rig()
    rig.submit("a")
    await turn()
    rig.submit("b")
    await rig.clock.advance(PATIENCE_S / 4)
    rig.submit("c")
    await rig.clock.advance(PATIENCE_S / 4)
    await rig.road.trips[0].answered()
    assert [trip.timeout_s for trip in rig.road.trips] == pytest.approx([TIMEOUT_S, TIMEOUT_S - PATIENCE_S / 4])


async def test_what_stays_unavailable_until_its_deadline_says_so() -> None:
    rig = Rig()
    (answer,) = rig.submit("a")
    await turn()
    while not answer.done():
        if rig.road.away:
            await rig.road.away[0].failed(Status.UNAVAILABLE)
        await rig.clock.advance(PAUSE_S)
    error = outcome(answer)
    assert isinstance(error, Unavailable)
    assert error.message == f"told to (tried {len(rig.road.trips)} times within 1000 ms)"
    assert 24 <= len(rig.road.trips) <= 28  # 10, 20 and then 40 ms apart


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (Status.UNAVAILABLE, "UNAVAILABLE: told to (tried 1 times within 1000 ms)"),
        (
            Status.RESOURCE_EXHAUSTED,
            "DEADLINE_EXCEEDED: no answer within 1000 ms, after 1 failed attempts; the outcome",
        ),
    ],
)
async def test_a_last_attempt_without_an_answer_is_an_unknown_outcome(code: Status, message: str) -> None:
    rig = Rig()
    (answer,) = rig.submit("a")
    await turn()
    await rig.road.trips[0].failed(code)
    await rig.clock.advance(TIMEOUT_S)
    assert len(rig.road.trips) == 2
    assert str(outcome(answer)).startswith(message)


async def test_overload_until_the_deadline_says_so() -> None:
    rig = Rig()
    (answer,) = rig.submit("a")
    await turn()
    await rig.clock.advance(TIMEOUT_S - PAUSE_S / 2)
    await rig.road.trips[0].failed(Status.RESOURCE_EXHAUSTED)
    await rig.clock.advance(PAUSE_S)
    assert str(outcome(answer)).startswith("RESOURCE_EXHAUSTED: told to (tried 1 times within 1000 ms)")


# Losing interest, limits, the end


async def test_a_caller_that_leaves_while_waiting_is_not_sent_and_one_in_flight_disturbs_nobody() -> None:
    rig = Rig()
    a, b = rig.submit("a", "b")
    await turn()
    c, d = rig.submit("c", "d")
    a.cancel()
    c.cancel()
    await rig.road.trips[0].answered()
    assert rig.road.keys == [["a", "b"], ["d"]]
    await rig.road.trips[1].answered()
    assert (outcome(b), outcome(d)) == ("b", "d")
    assert not rig.lane.full


async def test_a_call_beyond_the_limit_is_refused_at_once_and_not_sent() -> None:
    rig = Rig(max_in_flight=2)
    rig.submit("a", "b")
    assert rig.lane.full
    with pytest.raises(Overloaded) as refused:
        rig.submit("c")
    assert (refused.value.key, refused.value.message) == ("c", "2 calls of this client are in flight, its limit")
    await turn()
    await rig.road.trips[0].answered()
    rig.submit("d")
    await turn()
    assert rig.road.keys == [["a", "b"], ["d"]]


async def test_closing_waits_for_what_is_open_and_takes_nothing_new() -> None:
    rig = Rig()
    (paused,) = rig.submit("a")
    await turn()
    await rig.road.trips[0].failed(Status.UNAVAILABLE)
    (waiting,) = rig.submit("b")
    closing = [asyncio.create_task(rig.lane.close()) for _ in range(2)]
    await turn()
    with pytest.raises(ClientClosed):
        rig.submit("c")
    await rig.road.trips[1].answered()
    assert (outcome(waiting), [task.done() for task in closing]) == ("b", [False, False])
    await rig.clock.advance(PAUSE_S)
    await rig.road.trips[2].answered()
    assert outcome(paused) == "a"
    await asyncio.gather(*closing)
    await rig.lane.close()


async def test_closing_ends_by_the_last_deadline_whatever_the_gateway_does() -> None:
    rig = Rig()
    (answer,) = rig.submit("a")
    await turn()
    closing = asyncio.create_task(rig.lane.close())
    await rig.clock.advance(TIMEOUT_S)
    await closing
    assert isinstance(outcome(answer), DeadlineExceeded)
    assert rig.road.trips[0].end.cancelled()


async def test_closing_an_idle_lane_ends_at_once() -> None:
    await Rig().lane.close()


async def test_closing_does_not_wait_for_callers_that_have_left() -> None:
    rig = Rig()
    rig.submit("a")[0].cancel()
    closing = asyncio.create_task(rig.lane.close())
    await turn()
    assert closing.done() and rig.road.trips == []


@pytest.fixture
async def chance(seed: int) -> AsyncIterator[random.Random]:
    yield random.Random(seed)


async def test_whatever_happens_every_call_ends_once_with_its_own_answer(chance: random.Random) -> None:
    rig = Rig(max_batch=16, pipeline=3)
    answers: dict[str, Answer] = {}
    for step in range(400):
        for n in range(chance.randrange(8)):
            answers[f"s{step}-{n}"] = rig.submit(f"s{step}-{n}")[0]
        if chance.random() < 0.2 and answers:
            answers[chance.choice(list(answers))].cancel()
        if rig.road.away and chance.random() < 0.8:
            trip = chance.choice(rig.road.away)
            codes = (Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED, Status.INTERNAL)
            if chance.random() < 0.3:
                await trip.failed(chance.choice(codes))
            else:
                await trip.answered(**{key: chance.choice(codes) for key in trip.keys if chance.random() < 0.1})
        await rig.clock.advance(chance.random() * 0.02)
    await rig.clock.advance(2 * TIMEOUT_S)
    assert all(answer.done() for answer in answers.values())
    for key, answer in answers.items():
        if not answer.cancelled():
            ended = outcome(answer)
            assert ended == key if isinstance(ended, str) else ended.key == key
    for trip in rig.road.away:
        await trip.answered()
    await rig.lane.close()
