"""Journal records: what is written is read, byte for byte; what is damaged is named, never guessed at."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.errors import CorruptRecord
from entitlement.journal import (
    OVERAGE,
    Adjusted,
    Burn,
    BurnedLine,
    Close,
    Consumed,
    Crossing,
    Ended,
    Held,
    HeldLine,
    Record,
    Rolled,
    Settled,
    decode,
    encode,
)
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS, MAX_QUANTITY

counters = st.integers(0, 2**53 - 1)
amounts = st.one_of(st.sampled_from([0, 1, 10**9, 2**53 + 1, MAX_NANOS]), st.integers(0, MAX_NANOS))
signed = st.integers(-MAX_NANOS, MAX_NANOS)
ids = st.from_regex(r"[A-Za-z0-9._~@/+=-]{1,20}", fullmatch=True)
sources = st.one_of(st.just(OVERAGE), st.integers(1, 2**53 - 1))
burns = st.lists(st.builds(Burn, sources, amounts), max_size=4).map(tuple)
names = st.from_regex(r"[a-z][a-z0-9._-]{0,20}(,[a-z]{1,5}=[A-Za-z0-9./@~+-]{1,9})?", fullmatch=True)
lines = st.builds(
    lambda meter, quantity, parts: BurnedLine(meter, quantity, sum(part.amount for part in parts), parts),
    names,
    st.integers(0, MAX_QUANTITY),
    burns,
)
crossings = st.lists(st.builds(Crossing, st.integers(1, 1000), st.booleans(), counters), max_size=4).map(tuple)
header = {
    "tenant": ids,
    "customer": ids,
    "epoch": counters,
    "sequence": counters,
    "version": counters,
    "recorded_ms": counters,
}
consumed = st.builds(
    Consumed,
    **header,  # type: ignore[arg-type]
    event_ms=counters,
    period_start=counters,
    verdict=st.integers(1, 3),
    shadow=st.booleans(),
    credit_type=st.sampled_from(["USD", "tokens"]),
    plan=ids,
    rate_version=st.integers(0, MAX_CUMULATIVE).map(str),
    lines=st.lists(lines, max_size=16).map(tuple),
    crossings=crossings,
    settled=amounts,
    allowance=amounts,
    cycle_start=counters,
    request=st.binary(max_size=200),
)
rolled = st.builds(
    Rolled,
    **header,  # type: ignore[arg-type]
    period_start=counters,
    period_end=counters,
    closed_overage=amounts,
    allowance=amounts,
)
adjusted = st.builds(
    Adjusted,
    **header,  # type: ignore[arg-type]
    settled_adjustment=signed,
    overage_adjustment=signed,
    removed=burns,
    reclassed=burns,
    repaid=burns,
    crossings=crossings,
    settled=signed,
    allowance=amounts,
    cycle_start=counters,
)
settled = st.builds(
    lambda used, hold, subject, taken, returned, final, late: Settled(
        **{name: getattr(used, name) for name in Consumed.__struct_fields__},
        hold=hold,
        subject=subject,
        taken=taken,
        returned=returned,
        final=final,
        late=late,
    ),
    *(consumed, ids, ids, amounts, amounts, st.booleans(), st.booleans()),
)
held = st.builds(
    Held,
    **header,  # type: ignore[arg-type]
    event_ms=counters,
    created_ms=counters,
    expires_ms=counters,
    extension=st.booleans(),
    amount=amounts,
    credit_type=st.sampled_from(["USD", "tokens", ""]),
    plan=ids,
    rate_version=st.integers(0, MAX_CUMULATIVE).map(str),
    hold=ids,
    subject=ids,
    lines=st.lists(st.builds(HeldLine, names, st.integers(0, MAX_QUANTITY), amounts), max_size=16).map(tuple),
    request=st.binary(max_size=200),
)
ended = st.builds(
    Ended,
    **header,  # type: ignore[arg-type]
    how=st.sampled_from(Close),
    returned=amounts,
    hold=ids,
    subject=ids,
)
records = st.one_of(consumed, rolled, adjusted, settled, held, ended)

EXAMPLE = Consumed(
    tenant="acme",
    customer="bob",
    epoch=1,
    sequence=7,
    version=3,
    recorded_ms=1_700_000_000_123,
    event_ms=1_700_000_000_100,
    period_start=1_698_796_800_000,
    verdict=1,
    shadow=False,
    credit_type="USD",
    plan="standard",
    rate_version="4",
    lines=(BurnedLine("tokens,model=m1", 1_000, 2**53 + 2, (Burn(5, 2**53 + 1), Burn(OVERAGE, 1))),),
    crossings=(Crossing(80, True, 1), Crossing(90, False, 2)),
    settled=2**60,
    allowance=2**61,
    cycle_start=1_698_796_800_000,
    request=b"\x0a\x01k",
)


@given(records)
def test_a_record_survives_its_codec_byte_for_byte(record: Record) -> None:
    data = encode(record)
    assert decode(data) == record
    assert encode(decode(data)) == data


@given(records, st.data())
def test_a_truncated_record_decodes_or_is_corrupt_and_never_another_error(record: Record, draw: st.DataObject) -> None:
    data = encode(record)
    cut = draw.draw(st.integers(0, max(0, len(data) - 1)))
    try:
        found = decode(data[:cut])
    except CorruptRecord:
        return
    # The request is the rest of a consumed record: it alone may be short, and is parsed by the one who posts it.
    assert isinstance(record, Consumed | Held) and type(found) is type(record)
    assert isinstance(found, Consumed | Held)
    assert record.request.startswith(found.request)


def test_every_truncation_before_the_request_is_corrupt() -> None:
    data = encode(EXAMPLE)
    for cut in range(len(data) - len(EXAMPLE.request)):
        with pytest.raises(CorruptRecord):
            decode(data[:cut])


@given(records, st.integers(0, 2**32))
def test_a_record_with_flipped_bits_decodes_or_is_corrupt_and_never_another_error(record: Record, seed: int) -> None:
    rng, data = random.Random(seed), encode(record)
    for _ in range(20):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            decode(bytes(damaged))
        except CorruptRecord as corrupt:
            assert str(corrupt)


def test_every_single_flipped_bit_of_a_record_decodes_or_is_corrupt() -> None:
    data = encode(EXAMPLE)
    corrupt = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decode(bytes(damaged))
        except CorruptRecord:
            corrupt += 1
    assert corrupt > 100


@given(st.binary(max_size=300))
def test_garbage_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptRecord):
        decode(data)


def test_an_unknown_version_of_the_codec_is_named() -> None:
    with pytest.raises(CorruptRecord, match="version 2 is unknown; this reader knows 1"):
        decode(b"\x02" + encode(EXAMPLE)[1:])


def test_an_unknown_kind_is_corrupt() -> None:
    with pytest.raises(CorruptRecord):
        decode(b"\x01\x09" + encode(EXAMPLE)[2:])


def test_burns_that_do_not_sum_to_their_line_are_corrupt() -> None:
    data = encode(EXAMPLE)
    wrong = data.replace(struct.pack("<d", 5.0), struct.pack("<d", 6.0))  # Another grant: still in balance.
    assert isinstance(decode(wrong), Consumed)
    wrong = data.replace(struct.pack("<3d", 0, 0, 1), struct.pack("<3d", 0, 0, 2))
    assert wrong != data
    with pytest.raises(CorruptRecord, match="do not sum"):
        decode(wrong)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("field", range(4))
def test_a_number_that_is_none_is_corrupt(field: int, number: str) -> None:
    data = encode(EXAMPLE)
    at = 2 + 8 * field
    with pytest.raises(CorruptRecord):
        decode(data[:at] + struct.pack("<d", float(number)) + data[at + 8 :])
