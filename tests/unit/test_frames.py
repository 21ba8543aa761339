"""gRPC's framing: what was framed comes out whatever the cuts, and what a peer says of itself is never believed."""

from __future__ import annotations

import gzip
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.transport.frames import (
    PREFIX,
    BadFrame,
    Frames,
    Room,
    compressed_frame,
    decode_message,
    encode_message,
    frame,
    only,
    parse_timeout,
    unpack,
)

LIMIT = 10_000
messages = st.lists(st.binary(max_size=200), max_size=8)


def prefixed(flag: int, size: int, data: bytes = b"") -> bytes:
    """A frame that says what the test wants of itself."""
    return bytes([flag]) + size.to_bytes(4, "big") + data


def refused(work, *arguments, **named) -> BadFrame:
    with pytest.raises(BadFrame) as error:
        work(*arguments, **named)
    return error.value


class TestFrames:
    @given(messages, st.data())
    def test_messages_come_out_whatever_the_cuts(self, sent: list[bytes], data: st.DataObject) -> None:
        packed = data.draw(st.lists(st.booleans(), min_size=len(sent), max_size=len(sent)))
        pairs = zip(sent, packed, strict=True)
        body = b"".join(compressed_frame(message) if gzipped else frame(message) for message, gzipped in pairs)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
        frames, found = Frames(LIMIT, gzip=True), []
        for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
            found += frames.feed(body[start:end])
        frames.end()
        assert found == sent
        assert frames.held == 0

    def test_byte_by_byte(self) -> None:
        frames, found = Frames(LIMIT, gzip=False), []
        for byte in frame(b"abc") + frame(b"") + frame(b"d"):
            found += frames.feed(bytes([byte]))
        assert found == [b"abc", b"", b"d"]

    @given(st.binary(min_size=1, max_size=50), st.data())
    def test_a_body_that_ends_inside_a_message_is_refused(self, message: bytes, data: st.DataObject) -> None:
        body = frame(message)
        cut = data.draw(st.integers(1, len(body) - 1))
        frames = Frames(LIMIT, gzip=False)
        assert frames.feed(body[:cut]) == []
        assert frames.held == cut
        error = refused(frames.end)
        assert not error.oversized
        assert f"{cut} bytes into it" in str(error)

    @pytest.mark.parametrize("size", [LIMIT + 1, 2**31, 2**32 - 1])
    def test_a_length_over_the_limit_is_refused_before_its_bytes_come(self, size: int) -> None:
        error = refused(Frames(LIMIT, gzip=False).feed, prefixed(0, size))
        assert error.oversized
        assert str(error) == f"message has {size} bytes; the limit is {LIMIT}"

    def test_the_limit_itself_is_accepted(self) -> None:
        message = bytes(LIMIT)
        assert Frames(LIMIT, gzip=False).feed(frame(message)) == [message]
        assert Frames(LIMIT, gzip=True).feed(compressed_frame(message)) == [message]

    def test_a_length_that_says_too_little_leaves_garbage_behind_it(self) -> None:
        frames = Frames(LIMIT, gzip=False)
        refused(frames.feed, prefixed(0, 3, b"abcdef") + b"more")

    def test_never_holds_more_than_one_message(self) -> None:
        frames = Frames(LIMIT, gzip=False)
        for _ in range(100):
            frames.feed(frame(bytes(1000)) + prefixed(0, 1000))
            assert frames.held <= PREFIX + LIMIT
            frames.feed(bytes(1000))

    @given(st.binary(max_size=400), st.booleans())
    def test_garbage_is_refused_or_waited_for_and_nothing_else(self, data: bytes, gzipped: bool) -> None:
        frames = Frames(64, gzip=gzipped)
        try:
            found = frames.feed(data)
            frames.end()
        except BadFrame:
            return
        assert b"".join(map(frame, found)) == data or gzipped


class TestOnly:
    @given(st.binary(max_size=300))
    def test_the_single_message(self, message: bytes) -> None:
        assert only(frame(message), LIMIT, gzip=False) == message
        assert only(compressed_frame(message), LIMIT, gzip=True) == message

    @pytest.mark.parametrize(
        ("body", "problem"),
        [
            (b"", "holds no message"),
            (b"\0\0\0", "in the middle"),
            (prefixed(0, 5, b"abcd"), "says 5 bytes; the body has 4"),
            (prefixed(0, 2, b"abcd"), "says 2 bytes; the body has 4"),
            (frame(b"a") + frame(b"b"), "says 1 bytes; the body has 7"),
            (prefixed(1, 1, b"a"), "frame flag 1 without a grpc-encoding"),
            (prefixed(2, 1, b"a"), "frame flag 2"),
            (prefixed(255, 1, b"a"), "frame flag 255"),
        ],
    )
    def test_anything_else_is_refused_by_what_is_wrong_with_it(self, body: bytes, problem: str) -> None:
        error = refused(only, body, LIMIT, gzip=False)
        assert problem in str(error)
        assert not error.oversized

    def test_too_large_a_message_is_oversized(self) -> None:
        assert refused(only, prefixed(0, LIMIT + 1), LIMIT, gzip=False).oversized


class TestGzip:
    @pytest.mark.parametrize("size", [LIMIT + 1, 100 * LIMIT, 50_000_000])
    def test_a_bomb_is_refused_at_the_limit(self, size: int) -> None:
        packer = zlib.compressobj(9, wbits=31)
        packed = b"".join(packer.compress(bytes(min(1 << 20, size - at))) for at in range(0, size, 1 << 20))
        error = refused(unpack, 1, packed + packer.flush(), LIMIT, gzip=True)
        assert error.oversized
        assert str(error) == f"message inflates to more than the limit of {LIMIT} bytes"

    def test_what_is_not_gzip_is_refused(self) -> None:
        for data in (b"not gzip", zlib.compress(b"zlib, not gzip"), b"\x1f\x8b\x08"):
            assert not refused(unpack, 1, data, LIMIT, gzip=True).oversized

    @given(st.binary(max_size=300), st.integers(1, 30))
    def test_cut_short_is_refused(self, message: bytes, missing: int) -> None:
        packed = gzip.compress(message)
        refused(unpack, 1, packed[: max(0, len(packed) - missing)], LIMIT, gzip=True)

    @given(st.binary(max_size=300), st.binary(min_size=1, max_size=40))
    def test_bytes_behind_the_message_are_not_ignored(self, message: bytes, more: bytes) -> None:
        for behind in (more, gzip.compress(more)):
            refused(unpack, 1, gzip.compress(message) + behind, LIMIT, gzip=True)

    @given(st.binary(max_size=300), st.data())
    def test_a_changed_byte_never_changes_the_message(self, message: bytes, data: st.DataObject) -> None:
        packed = bytearray(gzip.compress(message))
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at] ^= data.draw(st.integers(1, 255))
        with suppress(BadFrame):  # A byte of the header that means nothing is not noticed.
            assert unpack(1, bytes(packed), LIMIT, gzip=True) == message


class TestRoom:
    def test_what_is_over_the_limit_is_refused_and_given_back(self) -> None:
        room = Room(100)
        room.take(60)
        room.take(40)
        assert refused(room.take, 1).oversized
        assert room.taken == 101
        room.give(101)
        room.take(100)


class TestTimeout:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("1H", 3600.0),
            ("2M", 120.0),
            ("3S", 3.0),
            ("250m", 0.25),
            ("500u", 0.0005),
            ("7n", 7e-9),
            ("0S", 0.0),
            ("00000001S", 1.0),
            ("99999999H", 99_999_999 * 3600.0),
        ],
    )
    def test_read(self, text: str, seconds: float) -> None:
        assert parse_timeout(text.encode()) == pytest.approx(seconds, rel=1e-12)

    @pytest.mark.parametrize(
        "text",
        ["", "1", "S", "-1S", "+1S", "1.5S", "1e3S", "123456789S", " 1S", "1S ", "1s", "0x1S", "١S", "²S", "1_0S"],
    )
    def test_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="grpc-timeout"):
            parse_timeout(text.encode())

    @given(st.text(max_size=12))
    def test_never_anything_else(self, text: str) -> None:
        try:
            assert parse_timeout(text.encode()) >= 0
        except ValueError:
            return
        assert text[:-1].isascii() and text[:-1].isdigit() and len(text) <= 9


class TestMessage:
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_round_trip_in_printable_ascii(self, text: str) -> None:
        encoded = encode_message(text)
        assert all(0x20 <= byte < 0x7F for byte in encoded)
        assert decode_message(encoded) == text

    def test_as_the_protocol_writes_it(self) -> None:
        assert encode_message("a b: 100%\r\nü€") == b"a b: 100%25%0D%0A%C3%BC%E2%82%AC"
        assert encode_message('/\\"~') == b'/\\"~'

    @given(st.text(st.characters(categories=["Cs", "L"])))
    def test_half_a_surrogate_pair_harms_nobody(self, text: str) -> None:
        decode_message(encode_message(text))

    @given(st.binary(max_size=60))
    def test_whatever_a_peer_wrote_is_text(self, data: bytes) -> None:
        decode_message(data)
