"""Frames of a receipt segment: whatever becomes of a file, what is whole is read, and nothing else passes for one."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.receipts.frames import (
    FRAME_BYTES,
    HEADER_BYTES,
    MARK,
    MAX_BODY,
    Header,
    Scan,
    pack_frames,
    pack_header,
    read_header,
    scan,
    seed_of,
)

PAGE = 4_096
NUMBER, OPENING = 7, 3
SEED = seed_of(NUMBER)

bodies = st.lists(
    st.binary(max_size=300) | st.just(MARK) | st.binary(max_size=20).map(lambda data: data + MARK), max_size=12
)
some = st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=12)


def segment(sent: list[bytes], number: int = NUMBER, room: int = 0) -> bytes:
    """A file as the writer leaves it: header, frames, and zeros where nothing was written yet."""
    return pack_header(Header(number, OPENING)) + pack_frames(sent, seed_of(number)) + bytes(room)


def ends(sent: list[bytes]) -> list[int]:
    """Where each frame ends."""
    at, found = HEADER_BYTES, []
    for body in sent:
        at += FRAME_BYTES + len(body)
        found.append(at)
    return found


def hit(sent: list[bytes], first: int, last: int) -> set[int]:
    """The frames that have a byte in [first, last)."""
    starts = [HEADER_BYTES, *ends(sent)[:-1]]
    return {
        index for index, (start, end) in enumerate(zip(starts, ends(sent), strict=True)) if start < last and first < end
    }


def places(lost: set[int], count: int) -> int:
    """How many runs of lost frames have a whole one behind them."""
    return sum(index in lost and index + 1 not in lost and index + 1 < count for index in range(count))


class TestScan:
    @given(bodies, st.integers(0, 2 * PAGE))
    def test_what_was_written_is_read(self, sent: list[bytes], room: int) -> None:
        assert scan(segment(sent, room=room), SEED) == Scan(sent, (ends(sent) or [HEADER_BYTES])[-1], 0)

    @given(some)
    def test_a_torn_end_loses_what_is_torn_and_is_no_damage(self, sent: list[bytes]) -> None:
        whole, stops = segment(sent), ends(sent)
        for cut in range(HEADER_BYTES, len(whole) + 1):
            kept = sum(stop <= cut for stop in stops)
            expected = Scan(sent[:kept], (stops[kept - 1] if kept else HEADER_BYTES), 0)
            assert scan(whole[:cut], SEED) == expected
            # The file is preallocated: what was not written is zeros.
            torn = scan(whole[:cut].ljust(len(whole) + PAGE, b"\0"), SEED)
            assert torn.damaged == 0
            assert torn.bodies[:kept] == sent[:kept]
            # Zeros may have been what was missing.
            assert torn.bodies == sent[: len(torn.bodies)]

    @given(some, st.data())
    def test_a_flipped_bit_loses_the_frame_that_it_hits(self, sent: list[bytes], data: st.DataObject) -> None:
        file = bytearray(segment(sent, room=PAGE))
        at = data.draw(st.integers(HEADER_BYTES, ends(sent)[-1] - 1))
        file[at] ^= 1 << data.draw(st.integers(0, 7))
        lost = hit(sent, at, at + 1)
        found = scan(bytes(file), SEED)
        assert found.bodies == [body for index, body in enumerate(sent) if index not in lost]
        assert found.damaged == places(lost, len(sent))

    @given(st.lists(st.binary(min_size=200, max_size=2_000), min_size=4, max_size=20), st.data())
    def test_a_zeroed_page_loses_what_lay_on_it(self, sent: list[bytes], data: st.DataObject) -> None:
        whole = segment(sent, room=PAGE)
        page = data.draw(st.integers(0, (ends(sent)[-1] - 1) // PAGE))
        first, last = max(HEADER_BYTES, page * PAGE), (page + 1) * PAGE
        file = whole[:first] + bytes(last - first) + whole[last:]
        # A byte that was zero before is none the worse for it.
        lost = {index for at in range(first, last) if whole[at] for index in hit(sent, at, at + 1)}
        found = scan(file, SEED)
        assert found.bodies == [body for index, body in enumerate(sent) if index not in lost]
        assert found.damaged == places(lost, len(sent))

    @given(some, st.data())
    def test_bytes_that_are_missing_in_the_middle_lose_what_they_were_of(
        self, sent: list[bytes], data: st.DataObject
    ) -> None:
        whole = segment(sent)
        first = data.draw(st.integers(HEADER_BYTES, len(whole) - 1))
        last = data.draw(st.integers(first + 1, len(whole)))
        found = scan(whole[:first] + whole[last:], SEED).bodies
        lost = hit(sent, first, last)
        before, behind = sent[: min(lost)], sent[max(lost) + 1 :]
        assert found[: len(before)] == before
        assert found[len(found) - len(behind) :] == behind
        # Two halves make a whole only where both frames begin alike.
        middle = found[len(before) : len(found) - len(behind)]
        assert len(middle) <= 1
        assert set(middle) <= set(sent)

    @given(some, some, st.data())
    def test_a_file_in_its_second_use_yields_nothing_of_its_first(
        self, old: list[bytes], new: list[bytes], data: st.DataObject
    ) -> None:
        """Whatever of the new frames has reached the disk, also where a torn one ends where an old one begins."""
        fresh = segment(new)
        cut = data.draw(st.integers(0, len(fresh)))
        was = segment(old, number=NUMBER - 1, room=PAGE)
        found = scan(fresh[:cut] + was[cut:], SEED)
        kept = sum(stop <= cut for stop in ends(new))
        assert found.bodies[:kept] == new[:kept]
        assert len(found.bodies) <= len(new)
        # Beyond the cut only bytes that happen to be the same can make a frame of this segment whole.
        assert found.bodies == new[: len(found.bodies)]
        assert found.damaged == 0

    @given(bodies)
    def test_frames_of_another_number_are_none_of_this_one(self, sent: list[bytes]) -> None:
        """Bites: without the number in the checksum every one of them would be read."""
        file = segment(sent)
        assert scan(file, seed_of(NUMBER + 1)).bodies == []
        without = pack_header(Header(NUMBER, OPENING)) + pack_frames(sent, 0)
        assert scan(without, 0).bodies == sent

    @given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=64))
    def test_no_body_has_the_same_checksum_under_two_numbers(self, one: int, other: int, body: bytes) -> None:
        same = zlib.crc32(body, seed_of(one)) == zlib.crc32(body, seed_of(other))
        assert same == (one == other)

    def test_a_whole_frame_inside_a_body_is_not_a_frame(self) -> None:
        inner = pack_frames([b"inner"], SEED)
        assert scan(segment([b"a", inner, b"b"]), SEED) == Scan([b"a", inner, b"b"], ends([b"a", inner, b"b"])[-1], 0)

    def test_a_mark_whose_size_reaches_over_its_neighbours_hides_none_of_them(self) -> None:
        file = bytearray(segment([b"first", b"second", b"third"]))
        file[HEADER_BYTES + 4 : HEADER_BYTES + 8] = (60).to_bytes(4, "little")
        found = scan(bytes(file), SEED)
        assert (found.bodies, found.damaged) == ([b"second", b"third"], 1)

    def test_a_size_beyond_the_bound_is_damage_and_not_memory(self) -> None:
        file = bytearray(segment([b"first", b"second"]))
        file[HEADER_BYTES + 4 : HEADER_BYTES + 8] = (MAX_BODY + 1).to_bytes(4, "little")
        assert scan(bytes(file), SEED).bodies == [b"second"]

    def test_two_places_are_counted_as_two(self) -> None:
        sent = [b"%d" % number * 20 for number in range(7)]
        file = bytearray(segment(sent))
        for index in (1, 2, 4):  # 1 and 2 are one place
            file[ends(sent)[index] - 1] ^= 1
        found = scan(bytes(file), SEED)
        assert (found.bodies, found.damaged) == ([sent[0], sent[3], sent[5], sent[6]], 2)

    @given(st.binary(max_size=3_000))
    def test_noise_is_no_receipt(self, noise: bytes) -> None:
        assert scan(bytes(HEADER_BYTES) + noise, SEED).bodies == []

    @pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + FRAME_BYTES - 1])
    def test_a_file_that_is_too_short_holds_nothing(self, size: int) -> None:
        assert scan(segment([b"x"])[:size], SEED).bodies == []


class TestHeader:
    @given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
    def test_round_trip(self, number: int, opening: int) -> None:
        packed = pack_header(Header(number, opening))
        assert len(packed) == HEADER_BYTES
        assert read_header(packed) == Header(number, opening)

    @pytest.mark.parametrize("bit", range(28 * 8))
    def test_any_flipped_bit_is_seen(self, bit: int) -> None:
        packed = bytearray(pack_header(Header(NUMBER, OPENING)))
        packed[bit // 8] ^= 1 << bit % 8
        assert read_header(bytes(packed)) is None

    @pytest.mark.parametrize("size", range(HEADER_BYTES))
    def test_a_header_that_is_not_whole_is_none(self, size: int) -> None:
        assert read_header(pack_header(Header(NUMBER, OPENING))[:size]) is None

    def test_zeros_are_no_header(self) -> None:
        assert read_header(bytes(HEADER_BYTES)) is None
