"""Requests as bytes: read without making a message, they say what the decoded message says, or the long way is gone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.errors import InvalidArgument
from entitlement.quantity import MAX_QUANTITY
from entitlement.request import MAX_BATCH, MAX_REQUEST_BYTES, _read, decode, parse_consume, read_consume, split_batch
from entitlement.v1 import gateway_pb2 as pb

TENANT = "acme"
IDS = st.one_of(st.text("ab-9", min_size=0, max_size=4), st.sampled_from(["x" * 128, "x" * 129, "ü", "a b", "k-1"]))
QUANTITIES = st.one_of(
    st.sampled_from([0, 1, 127, 128, 16_383, 16_384, MAX_QUANTITY, MAX_QUANTITY + 1, 2**53, 2**63 - 1, -1]),
    st.integers(0, 300),
)
USAGES = st.builds(
    pb.Usage,
    feature=st.sampled_from(["tokens", "calls", "", "f" * 64, "f" * 65, "Ä"]),
    quantity=QUANTITIES,
    dimensions=st.dictionaries(
        st.sampled_from(["model", "kind", "9"]), st.sampled_from(["gpt", "v" * 100, ""]), max_size=3
    ),
)


@st.composite
def requests(draw: st.DrawFn) -> pb.CheckAndConsumeRequest:
    request = pb.CheckAndConsumeRequest(
        idempotency_key=draw(IDS),
        customer=draw(IDS),
        subject=draw(st.one_of(st.just(""), IDS)),
        usage=draw(st.lists(USAGES, max_size=3)),
        mode=draw(st.integers(0, 6)),
    )
    if draw(st.booleans()) and draw(st.booleans()):
        request.event_time.seconds = draw(st.integers(-1, 2_000_000_000))
    return request


def outcome(read: object, data: bytes) -> object:
    try:
        return read(TENANT, data)  # type: ignore[operator]
    except InvalidArgument as error:
        return str(error)


def the_long_way(tenant: str, data: bytes) -> object:
    return parse_consume(tenant, decode(data))


def good(**more: object) -> pb.CheckAndConsumeRequest:
    usage = [pb.Usage(feature="tokens", quantity=300, dimensions={"model": "gpt"})]
    return pb.CheckAndConsumeRequest(**{"idempotency_key": "k", "customer": "c", "usage": usage} | more)  # type: ignore[arg-type]


@given(requests())
def test_the_short_way_says_what_the_long_way_says(request: pb.CheckAndConsumeRequest) -> None:
    data = request.SerializeToString(deterministic=True)
    expected = outcome(the_long_way, data)  # Remembers the shapes too.
    assert outcome(read_consume, data) == expected
    short = _read(TENANT, data)
    assert short is None or short == expected


@given(requests(), st.data())
def test_whatever_the_bytes_are(request: pb.CheckAndConsumeRequest, data: st.DataObject) -> None:
    """Cut, changed, repeated: neither way knows more than the other, and no other error comes out."""
    raw = bytearray(request.SerializeToString(deterministic=True))
    outcome(the_long_way, bytes(raw))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        kind = data.draw(st.sampled_from(["cut", "change", "repeat", "insert"]))
        if kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 4))]
        elif kind == "change" and raw:
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "repeat":
            raw += raw[at:]
        else:
            raw[at:at] = data.draw(st.binary(max_size=3))
    assert outcome(read_consume, bytes(raw)) == outcome(the_long_way, bytes(raw))


@pytest.mark.parametrize(
    "request_",
    [
        good(),
        good(mode=3),
        good(subject="u-1"),
        good(usage=[pb.Usage(feature="calls", quantity=1), pb.Usage(feature="tokens", quantity=MAX_QUANTITY)]),
    ],
    ids=["plain", "mode", "subject", "lines"],
)
def test_the_usual_form_goes_the_short_way(request_: pb.CheckAndConsumeRequest) -> None:
    data = request_.SerializeToString(deterministic=True)
    parse_consume(TENANT, request_)
    assert _read(TENANT, data) == parse_consume(TENANT, request_)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\x30\x00",  # A mode that is there, at its default.
        lambda data: data + b"\x12\x01d",  # Another customer: the last one counts.
        lambda data: b"\x12\x01c" + data,
        lambda data: data.replace(b"\x10\xac\x02", b"\x10\xac\x82\x00").replace(b"\x22\x19", b"\x22\x1a"),
        lambda data: data + b"\x7a\x01x",  # A field of later times.
    ],
    ids=["default", "twice", "order", "long number", "unknown"],
)
def test_another_form_goes_the_long_way_and_counts_the_same(change: object) -> None:
    data = change(good().SerializeToString(deterministic=True))  # type: ignore[operator]
    parse_consume(TENANT, good())
    assert _read(TENANT, data) is None
    assert read_consume(TENANT, data) == parse_consume(TENANT, decode(data))


def test_a_request_over_the_limit() -> None:
    usage = [pb.Usage(feature="tokens", quantity=1, dimensions={"model": "g" * 100}) for _ in range(16)]
    long = good(usage=usage * 10)
    parse_consume(TENANT, good(usage=usage))
    with pytest.raises(InvalidArgument, match=f"request: has .* expected at most {MAX_REQUEST_BYTES}"):
        read_consume(TENANT, long.SerializeToString(deterministic=True))


class TestBatches:
    @given(st.lists(requests(), min_size=1, max_size=5))
    def test_are_cut_into_their_requests(self, batch: list[pb.CheckAndConsumeRequest]) -> None:
        data = pb.CheckAndConsumeBatchRequest(requests=batch).SerializeToString(deterministic=True)
        assert [decode(part) for part in split_batch(data)] == batch

    @given(st.binary(max_size=40))
    def test_whatever_the_bytes_are(self, data: bytes) -> None:
        try:
            parts = split_batch(data)
        except InvalidArgument:
            return
        try:
            found = pb.CheckAndConsumeBatchRequest.FromString(data).requests
        except Exception:
            for part in parts:  # One of them does not decode either.
                if isinstance(outcome(read_consume, part), str):
                    return
            raise
        assert [decode(part) for part in parts] == list(found)

    @pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 20_000])
    def test_of_requests_of_any_length(self, size: int) -> None:
        batch = [good(idempotency_key="k" * size), good()]
        data = pb.CheckAndConsumeBatchRequest(requests=batch).SerializeToString()
        assert [decode(part) for part in split_batch(data)] == batch

    @pytest.mark.parametrize("count", [0, MAX_BATCH + 1, 3 * MAX_BATCH])
    def test_too_few_or_many(self, count: int) -> None:
        data = pb.CheckAndConsumeBatchRequest(requests=[good()] * count).SerializeToString()
        with pytest.raises(InvalidArgument, match=f"requests: has {count} requests; expected 1..{MAX_BATCH}"):
            split_batch(data)

    @pytest.mark.parametrize("data", [b"\x7a\x01x", b""])
    def test_of_nothing_that_is_known(self, data: bytes) -> None:
        with pytest.raises(InvalidArgument, match="requests: has 0 requests"):
            split_batch(data)

    @pytest.mark.parametrize("data", [b"\x0a\x05abc", b"\x0a", b"\x0a\xff", b"\x0a\xff\xff\xff", b"\xff"])
    def test_that_are_broken(self, data: bytes) -> None:
        with pytest.raises(InvalidArgument, match="request: does not decode"):
            split_batch(data)
