"""From a trace to requests to a tally: rows, the draw of customers and models, retries and what is counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import pairwise

import grpc
import pytest

from entitlement.rating import Rate, cost
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2 as pb
from gateway.cli.replay import Pace, Tally, drive
from gateway.cli.trace import BadTrace, Mapping, Row, generate, read_trace, trace_name

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
TRACE = HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"


def rows_of(text: str) -> list[Row]:
    return list(read_trace(text.splitlines(keepends=True)))


def payload(mapping: Mapping, row: Row) -> bytes:
    return mapping.request(row).SerializeToString(deterministic=True)


def test_a_trace_is_read_row_by_row_with_its_times_in_microseconds() -> None:
    assert rows_of(TRACE) == [Row(1, 0, 374, 44), Row(2, 4_314_579, 396, 109)]


def test_columns_are_found_by_name_and_times_may_have_a_zone() -> None:
    text = (
        "GeneratedTokens,x,TIMESTAMP,ContextTokens\n7,-,2024-05-12 00:00:00+00:00,5\n8,-,2024-05-12 01:00:01+01:00,6\n"
    )
    assert rows_of(text) == [Row(1, 0, 5, 7), Row(2, 1_000_000, 6, 8)]


def test_a_row_without_tokens_is_left_out_and_keeps_its_number() -> None:
    text = HEADER + "2023-11-16 18:00:00,0,0\n2023-11-16 18:00:01,0,3\n"
    assert rows_of(text) == [Row(2, 1_000_000, 0, 3)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "line 1: no column 'TIMESTAMP'"),
        ("TIMESTAMP,ContextTokens\n", "line 1: no column 'GeneratedTokens'"),
        (HEADER + "yesterday,1,2\n", "line 2: Invalid isoformat string: 'yesterday'"),
        (HEADER + "2023-11-16,1,2\n2023-11-16,1\n", "line 3: 2 columns; expected 3"),
        (HEADER + "2023-11-16,1.5,2\n", "line 2: ContextTokens: '1.5' is not a plain decimal integer"),
        (HEADER + "2023-11-16,1,-2\n", "line 2: GeneratedTokens: -2 is outside 0..1000000000000000"),
        (HEADER + "2023-11-16,nan,2\n", "line 2: ContextTokens: 'nan' is not a plain decimal integer"),
    ],
)
def test_a_bad_row_is_named_with_what_was_expected(text: str, expected: str) -> None:
    with pytest.raises(BadTrace, match=expected):
        rows_of(text)


def test_a_row_becomes_one_request_with_input_and_output_of_one_model() -> None:
    mapping = Mapping("conv", seed=7, customers=3, models=("m1", "m2"))
    request = mapping.request(Row(12, 0, 374, 44))
    assert request.idempotency_key == "conv-7-12"
    assert request.customer in {"cust-0001", "cust-0002", "cust-0003"}
    assert [(line.feature, line.quantity) for line in request.usage] == [("tokens", 374), ("tokens", 44)]
    model = request.usage[0].dimensions["model"]
    assert model in {"m1", "m2"}
    assert dict(request.usage[0].dimensions) == {"model": model, "token_type": "input"}
    assert dict(request.usage[1].dimensions) == {"model": model, "token_type": "output"}
    parse_consume("default", request)  # The gateway takes it.


def test_the_same_seed_gives_the_same_bytes_in_any_order() -> None:
    rows = list(generate(200, seed=3))
    first = {row.number: Mapping("t", seed=3).request(row).SerializeToString(deterministic=True) for row in rows}
    again = {
        row.number: Mapping("t", seed=3).request(row).SerializeToString(deterministic=True) for row in reversed(rows)
    }
    assert first == again
    other = [Mapping("t", seed=4).request(row).SerializeToString(deterministic=True) for row in rows]
    assert other != list(first.values())


def test_the_draw_is_the_one_that_was_published() -> None:
    """Keys and customers of a seed stay the same from release to release: offline sums rely on it."""
    mapping = Mapping("conv", seed=42)
    drawn = [mapping.draw(Row(number, 0, 1, 1)) for number in range(1, 7)]
    assert drawn == [
        ("cust-0028", "gpt-4o-mini"),
        ("cust-0007", "gpt-4o-mini"),
        ("cust-0002", "gpt-4o"),
        ("cust-0001", "gpt-4o-mini"),
        ("cust-0004", "gpt-4o"),
        ("cust-0025", "gpt-4o-mini"),
    ]


@pytest.mark.parametrize("zipf", [0.0, 0.99, 1.1, 2.0])
def test_customers_are_drawn_by_zipf(zipf: float) -> None:
    mapping = Mapping("t", seed=1, customers=20, zipf=zipf)
    count = 20_000
    drawn = Counter(mapping.draw(Row(number, 0, 1, 1))[0] for number in range(1, count + 1))
    total = sum(rank**-zipf for rank in range(1, 21))
    for rank in (1, 2, 5, 20):
        expected = count * rank**-zipf / total
        assert abs(drawn[f"cust-{rank:04d}"] - expected) < 6 * expected**0.5 + 1


def test_generated_rows_are_reproducible_and_shaped_like_the_trace() -> None:
    rows = list(generate(5_000, seed=42))
    assert rows == list(generate(5_000, seed=42))
    assert rows[:10] == list(generate(10, seed=42))
    assert [row.number for row in rows] == list(range(1, 5_001))
    assert all(a.at_us <= b.at_us for a, b in pairwise(rows))
    assert 900 < sum(row.context_tokens for row in rows) / len(rows) < 1_500
    assert 150 < sum(row.generated_tokens for row in rows) / len(rows) < 300
    assert all(row.context_tokens > 0 and row.generated_tokens > 0 for row in rows)


def test_a_file_name_becomes_part_of_an_idempotency_key() -> None:
    assert trace_name("conv") == "conv"
    assert trace_name("my trace: (final)") == "my-trace-final"
    assert trace_name("{}") == "trace"
    assert len(trace_name("x" * 500)) == 64


class Gateway:
    """Answers like a gateway that charges 3 nanos for an input and 10 for an output token, once for each key."""

    INPUT, OUTPUT = Rate("tokens", 3), Rate("tokens", 10)

    def __init__(self) -> None:
        self.first: dict[str, pb.CheckAndConsumeResponse] = {}
        self.in_flight = self.most_in_flight = 0

    async def decide(self, request: pb.CheckAndConsumeRequest) -> pb.CheckAndConsumeResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0)
        self.in_flight -= 1
        if request.customer == "cust-0002":
            return pb.CheckAndConsumeResponse(verdict=pb.VERDICT_DENY, reason=pb.REASON_INSUFFICIENT_CREDITS)
        if known := self.first.get(request.idempotency_key):
            answer = pb.CheckAndConsumeResponse()
            answer.CopyFrom(known)
            answer.replayed = True
            return answer
        amounts = [
            cost(rate, line.quantity) for rate, line in zip((self.INPUT, self.OUTPUT), request.usage, strict=True)
        ]
        answer = pb.CheckAndConsumeResponse(
            verdict=pb.VERDICT_ALLOW, consumed=[pb.Consumed(amount_nanos=amount) for amount in amounts]
        )
        self.first[request.idempotency_key] = answer
        return answer


def run(decide: Callable[[pb.CheckAndConsumeRequest], Awaitable[pb.CheckAndConsumeResponse]], rows: list[Row]) -> Tally:
    mapping = Mapping("t", seed=5, customers=2)
    return asyncio.run(drive(decide, rows, mapping, Pace(concurrency=8), lambda steps=1: None))


def test_every_row_is_sent_once_and_counted() -> None:
    rows, gateway = list(generate(300, seed=5)), Gateway()
    tally = run(gateway.decide, rows)
    allowed = [row for row in rows if Mapping("t", seed=5, customers=2).draw(row)[0] == "cust-0001"]
    assert tally.allowed == len(allowed) == len(gateway.first)
    assert tally.denied == {"INSUFFICIENT_CREDITS": 300 - len(allowed)}
    assert tally.amount_nanos == sum(3 * row.context_tokens + 10 * row.generated_tokens for row in allowed)
    assert tally.rows == 300 and not tally.errors and not tally.replayed
    assert gateway.most_in_flight == 8
    again = run(gateway.decide, rows)
    assert (again.allowed, again.replayed, again.amount_nanos) == (len(allowed), len(allowed), tally.amount_nanos)


def test_an_unknown_outcome_is_asked_for_again_with_the_same_key() -> None:
    gateway, asked = Gateway(), Counter[str]()

    async def loses_every_first_answer(request: pb.CheckAndConsumeRequest) -> pb.CheckAndConsumeResponse:
        answer = await gateway.decide(request)
        asked[request.idempotency_key] += 1
        if asked[request.idempotency_key] == 1:
            raise broken(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
        return answer

    rows = list(generate(20, seed=5))
    tally = run(loses_every_first_answer, rows)
    assert set(asked.values()) == {2} and len(asked) == 20
    assert tally.retried == 20 and not tally.errors
    assert tally.allowed == tally.replayed == len(gateway.first)


def test_a_refused_call_is_an_error_and_is_not_tried_again() -> None:
    asked = Counter[str]()

    async def refuses(request: pb.CheckAndConsumeRequest) -> pb.CheckAndConsumeResponse:
        asked[request.idempotency_key] += 1
        raise broken(grpc.StatusCode.ALREADY_EXISTS, "idempotency_key: was used\nbefore")

    tally = run(refuses, list(generate(3, seed=5)))
    assert tally.errors == {"ALREADY_EXISTS": 3} and set(asked.values()) == {1}
    assert tally.first_error == "row 1: ALREADY_EXISTS: idempotency_key: was used before"
    assert tally.rows == 3


def test_percentiles_are_of_the_nearest_rank() -> None:
    tally = Tally(latencies_ms=[float(value) for value in range(100, 0, -1)])
    assert (tally.percentile_ms(50), tally.percentile_ms(99), tally.percentile_ms(100)) == (50.0, 99.0, 100.0)
    assert Tally().percentile_ms(99) == 0.0


def broken(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
