"""A receipt's bytes: what is drafted before the answer, what is read back, and what replay.lua is told of it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement import keys
from entitlement.decision import (
    Charge,
    Charged,
    Consume,
    Decision,
    Limits,
    Mode,
    Price,
    Reason,
    Verdict,
    pack_answer,
    parse_answer,
)
from entitlement.errors import CorruptRecord
from entitlement.identity import fingerprint, key_digest
from entitlement.quantity import MAX_NANOS, MAX_QUANTITY
from entitlement.receipt import Receipt, draft, is_due, parse, prices, replay_arguments, replay_keys
from tests.hot_stores import CUSTOMER, IMAGES, PLAN, TENANT, TOKENS, charge, request

AT_MS = 1_750_000_000_123
LIMITS = Limits(remember_ms=60_000)
LINE_BYTES = 16  # of an answer

amounts = st.integers(-(2**62), 2**62)
lines = st.builds(Charged, st.integers(0, MAX_QUANTITY), amounts)


@st.composite
def decisions(draw: st.DrawFn, count: int | None = None) -> Decision:
    verdict = draw(st.sampled_from(Verdict)) if count is None else draw(st.sampled_from(list(Verdict)[:2]))
    return Decision(
        verdict,
        draw(st.sampled_from(Reason)),
        failed_line=draw(st.integers(-1, 63)),
        shadow=draw(st.booleans()),
        epoch=draw(st.integers(0, 2**32 - 1)),
        sequence=draw(st.integers(0, 2**48 - 1)),
        credit_type=draw(st.sampled_from(["USD", "EUR", "tokens"])),
        available=draw(amounts),
        held=draw(st.just(0) | amounts),
        settled=draw(amounts),
        overage=draw(st.just(0) | amounts),
        gate=draw(st.just(0) | st.integers(0, MAX_NANOS)),
        rate_version=draw(st.integers(1, 2**32 - 1).map(str) | st.just("")),
        charged=tuple(
            draw(st.lists(lines, max_size=8) if count is None else st.lists(lines, min_size=count, max_size=count))
        ),
        quotas=(),
        replayed=False,
    )


def reply(decision: Decision, sign: bytes = b"=") -> bytes:
    """What consume.lua would have returned."""
    return sign + decision.credit_type.encode() + b"\0" + pack_answer(decision)


def receipt(asked: Consume, paid: Charge, decision: Decision, sign: bytes = b"=") -> bytes:
    return draft(asked, prices(paid), AT_MS) + reply(decision, sign)


def parsed(data: bytes) -> Receipt:
    found = parse(data, TENANT)
    assert isinstance(found, Receipt)
    return found


def granted(*charged: Charged, version: int = 3, verdict: Verdict = Verdict.ALLOW, shadow: bool = False) -> Decision:
    return Decision(
        verdict, Reason.NONE, -1, shadow, 1, 5, "USD", 900, 0, 100, 0, 0, str(version), charged, (), replayed=False
    )  # fmt: skip


class TestAnswer:
    @given(decisions())
    def test_packing_is_the_inverse_of_reading(self, decision: Decision) -> None:
        asked = request("k1", (TOKENS, 1))
        packed = reply(decision)
        start = packed.index(b"\0") + 1
        assert parse_answer(packed, start, decision.credit_type, asked, replayed=False) == decision

    @given(decisions())
    def test_and_what_was_read_packs_to_the_same_bytes(self, decision: Decision) -> None:
        packed = pack_answer(decision)
        again = parse_answer(packed, 0, decision.credit_type, request("k1", (TOKENS, 1)), replayed=True)
        assert pack_answer(again) == packed


class TestReceipt:
    @given(decisions(count=2), st.sampled_from([b"=", b"~"]), st.sampled_from(["", "key-1"]), st.integers(0, 2**48))
    def test_round_trip(self, decision: Decision, sign: bytes, subject: str, at_ms: int) -> None:
        asked = request("k1", (TOKENS, 4), (IMAGES, 2), subject=subject, mode=Mode.BEST_EFFORT)
        data = draft(asked, prices(charge(asked)), at_ms) + reply(decision, sign)
        found = parsed(data)
        assert found == Receipt(
            at_ms, PLAN, decision.rate_version or "3", (TOKENS, IMAGES), asked, pack_answer(decision), decision
        )

    def test_what_a_later_version_appends_is_passed_over(self) -> None:
        asked = request("k1", (TOKENS, 4))
        paid, decision = charge(asked), granted(Charged(4, 8))
        later = draft(asked, prices(paid) + b"\nregion=eu\0x", AT_MS) + reply(decision)
        assert parsed(later) == parsed(receipt(asked, paid, decision))

    def test_the_meter_is_that_of_the_rate_and_not_the_feature(self) -> None:
        asked = request("k1", (TOKENS, 4))
        paid = Charge(PLAN, 3, 0, 0, (Price(f"{TOKENS},model=m3", "U 3 1"),))
        assert parsed(receipt(asked, paid, granted(Charged(4, 12)))).meters == (f"{TOKENS},model=m3",)

    def test_the_request_is_kept_as_it_came(self) -> None:
        asked = request("k" * 128, (TOKENS, MAX_QUANTITY), event_ms=AT_MS - 5, subject="s", mode=Mode.ADJUST_ONLY)
        assert parsed(receipt(asked, charge(asked), granted(Charged(1, 1)))).request == asked

    def test_a_cut_anywhere_is_corrupt_and_never_another_receipt(self) -> None:
        asked = request("k1", (TOKENS, 4), (IMAGES, 2))
        whole = receipt(asked, charge(asked), granted(Charged(4, 4), Charged(2, 2_000)))
        for cut in range(len(whole)):
            if cut != len(whole) - LINE_BYTES:
                with pytest.raises(CorruptRecord):
                    parse(whole[:cut], TENANT)

    def test_an_answer_with_fewer_lines_than_the_request_is_corrupt(self) -> None:
        asked = request("k1", (TOKENS, 4), (IMAGES, 2))
        with pytest.raises(CorruptRecord):
            parse(receipt(asked, charge(asked), granted(Charged(4, 4))), TENANT)

    @pytest.mark.parametrize("kind", [0, 6, 255])
    def test_a_kind_that_is_unknown_is_corrupt(self, kind: int) -> None:
        asked = request("k1", (TOKENS, 4))
        data = bytearray(receipt(asked, charge(asked), granted(Charged(4, 4))))
        data[0] = kind
        with pytest.raises(CorruptRecord, match=f"kind {kind}"):
            parse(bytes(data), TENANT)

    @given(st.binary(max_size=200))
    def test_noise_is_corrupt_or_a_receipt_but_nothing_else_is_raised(self, noise: bytes) -> None:
        for data in (noise, b"\1" + noise, b"\2" + noise):
            try:
                parse(data, TENANT)
            except CorruptRecord:
                continue

    @given(st.data())
    def test_a_receipt_with_changed_bytes_raises_nothing_else_either(self, data: st.DataObject) -> None:
        asked = request("k1", (TOKENS, 4), (IMAGES, 2), subject="key-1")
        file = bytearray(receipt(asked, charge(asked), granted(Charged(4, 4), Charged(2, 2_000))))
        for _ in range(data.draw(st.integers(1, 3))):
            file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
        try:
            parse(bytes(file), TENANT)
        except CorruptRecord as error:
            assert "receipt" in str(error) or "answer" in str(error)


class TestIsDue:
    ONE = granted(Charged(4, 4))
    DENIED = msgspec.structs.replace(ONE, verdict=Verdict.DENY, reason=Reason.INSUFFICIENT_CREDITS, charged=())

    @pytest.mark.parametrize(
        "answer",
        [
            reply(ONE),
            reply(ONE, b"~"),
            reply(msgspec.structs.replace(ONE, verdict=Verdict.ALLOW_WITH_CAPS)),
            reply(msgspec.structs.replace(ONE, verdict=Verdict.ALLOW_WITH_CAPS), b"~"),
            reply(msgspec.structs.replace(ONE, credit_type="")),  # a repeat whose account is not there
            reply(msgspec.structs.replace(ONE, shadow=True)),
        ],
    )
    def test_what_was_granted_now_or_before_is(self, answer: bytes) -> None:
        assert is_due(answer)

    @pytest.mark.parametrize(
        "answer",
        [
            *(reply(DENIED), reply(DENIED, b"~"), b"=\0\3\1"),
            *(b"!NOT_LOADED", b"!MISMATCH", b"!STALE standard 1", b"!TIME 1", b"!RANGE 0"),
            *(b"", None, 0, 1, [], [reply(ONE)], Exception("OOM"), "=USD\0\1"),
        ],
    )
    def test_nothing_else_is(self, answer: object) -> None:
        assert not is_due(answer)


class TestReplay:
    def test_its_keys_are_those_of_the_decision(self) -> None:
        asked = request("k1", (TOKENS, 4))
        found = parsed(receipt(asked, charge(asked), granted(Charged(4, 4))))
        partition = keys.partition_of(TENANT, CUSTOMER)
        assert replay_keys(found, partition) == (
            keys.account(partition, TENANT, CUSTOMER),
            keys.idempotency(partition, key_digest(TENANT, CUSTOMER, "k1")),
            keys.journal(partition),
        )

    def test_its_arguments_are_what_was_answered(self) -> None:
        asked = request("k1", (TOKENS, 9), (IMAGES, 2), event_ms=AT_MS - 7, subject="key-1", mode=Mode.BEST_EFFORT)
        decision = granted(Charged(4, 4), Charged(2, 2_000), verdict=Verdict.ALLOW_WITH_CAPS, shadow=True)
        found = replay_arguments(parsed(receipt(asked, charge(asked), decision)), LIMITS)
        assert found == [
            *(fingerprint(asked.payload), asked.payload, pack_answer(decision), AT_MS, AT_MS - 7),
            *(f"{TENANT} {CUSTOMER}", 60_000, PLAN, "3", 2, 1, "key-1", 2),
            *(TOKENS, TOKENS, 4, 4),  # as it was capped, not as it was asked for
            *(IMAGES, IMAGES, 2, 2_000),
        ]

    def test_without_subject_and_event_time(self) -> None:
        asked = request("k1", (TOKENS, 4))
        found = replay_arguments(parsed(receipt(asked, charge(asked), granted(Charged(4, 4)))), LIMITS)
        assert (found[4], found[11]) == (0, "")

    def test_a_repeated_key_is_replayed_with_the_version_that_priced_it(self) -> None:
        """The first answer was priced by version 3; the retry came when version 4 was in force."""
        asked = request("k1", (TOKENS, 4))
        data = receipt(asked, charge(asked, version=4), granted(Charged(4, 4), version=3), b"~")
        found = parsed(data)
        assert found.decision.rate_version == "3"
        assert replay_arguments(found, LIMITS)[8] == "3"
