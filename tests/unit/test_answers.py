"""What is put together as bytes is, byte for byte, what the message would have been."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.decision import Charged, Consume, Decision, Line, Mode, QuotaState, Reason, Verdict
from entitlement.quantity import MAX_NANOS, MAX_QUANTITY
from entitlement.v1 import gateway_pb2 as pb
from gateway.answers import join_batch, response, usual, varint

IDS = st.text("abz-9", min_size=1, max_size=128)
NANOS = st.one_of(st.integers(-5, 300), st.integers(-MAX_NANOS, MAX_NANOS), st.sampled_from([MAX_NANOS, 2**14, 2**28]))


@st.composite
def decided(draw: st.DrawFn) -> tuple[Consume, Decision]:
    """Mostly what is usual; each thing that is not comes now and then."""

    def rare(usual: object, strategy: st.SearchStrategy[object]) -> object:
        return draw(strategy) if draw(st.integers(0, 9)) == 0 else usual

    count = draw(st.sampled_from([1, 1, 1, 1, 2, 0]))
    lines = tuple(Line(draw(st.sampled_from(["calls", "f" * 64])), 1) for _ in range(max(1, count)))
    charged = tuple(Charged(draw(st.integers(0, MAX_QUANTITY)), draw(NANOS)) for _ in range(count))
    decision = Decision(
        verdict=draw(st.sampled_from([Verdict.ALLOW, Verdict.ALLOW_WITH_CAPS])) if count else Verdict.DENY,
        reason=Reason.NONE if count else draw(st.sampled_from(Reason)),
        failed_line=-1 if count else 0,
        shadow=bool(rare(False, st.booleans())),
        epoch=draw(st.integers(0, 2**32 - 1)),
        sequence=draw(st.integers(0, 2**48 - 1)),
        credit_type=draw(st.sampled_from(["USD", "c" * 128, ""])),
        available=draw(NANOS),
        held=rare(0, NANOS),  # type: ignore[arg-type]
        settled=draw(NANOS),
        overage=rare(0, NANOS),  # type: ignore[arg-type]
        gate=rare(0, NANOS),  # type: ignore[arg-type]
        rate_version=draw(st.sampled_from(["", "1", "4294967295"])),
        charged=charged,
        quotas=rare((), st.just((QuotaState("calls", 1, 2, 3, False),))),  # type: ignore[arg-type]
        replayed=bool(rare(False, st.booleans())),
    )
    return Consume("acme", "bob", "", draw(IDS), Mode.NORMAL, 0, lines, b""), decision


@given(decided())
def test_an_answer_is_the_message_byte_for_byte(given_: tuple[Consume, Decision]) -> None:
    request, decision = given_
    message = response(request, decision, {}).SerializeToString(deterministic=True)
    assert usual(request, decision) in (message, b"")


def test_a_static_feature_carries_its_value() -> None:
    request = Consume("acme", "bob", "", "k", Mode.NORMAL, 0, (Line("retention", 1), Line("calls", 1)), b"")
    charged = (Charged(1, 0), Charged(1, 5))
    decision = Decision(*(Verdict.ALLOW, Reason.NONE, -1, False, 1, 2, "USD", 9, 0, 5, 0, 0, "7", charged, (), False))
    answer = response(request, decision, {"retention": "90d"})
    assert [consumed.value for consumed in answer.consumed] == ["90d", ""]


def test_the_usual_answer_goes_the_short_way() -> None:
    request = Consume("acme", "bob", "", "k", Mode.NORMAL, 0, (Line("calls", 3),), b"")
    decision = Decision(
        *(Verdict.ALLOW, Reason.NONE, -1, False, 1, 2, "USD", 10**18, 0, 5, 0, 0, "7", (Charged(3, 5),), (), False)
    )
    assert pb.CheckAndConsumeResponse.FromString(usual(request, decision)).consumed[0].quantity == 3


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_answers_are_joined_into_a_batch(parts: list[bytes]) -> None:
    answers = [pb.CheckAndConsumeResponse(idempotency_key=part.hex()) for part in parts]
    joined = join_batch([answer.SerializeToString() for answer in answers])
    assert joined == pb.CheckAndConsumeBatchResponse(responses=answers).SerializeToString()


@pytest.mark.parametrize("bits", range(64))
def test_numbers_of_every_length(bits: int) -> None:
    for number in {max(0, (1 << bits) + near) for near in (-1, 0, 1)}:
        if number < 1 << 63:
            expected = pb.CheckAndConsumeResponse(sequence=number).SerializeToString()
            assert b"\x58" + varint(number) == (expected or b"\x58\x00")
