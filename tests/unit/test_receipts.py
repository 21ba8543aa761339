"""Receipts on real files: whose folder, what is durable when, and what a disk that fails or loses power leaves."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from entitlement.catalog import Durability
from entitlement.decision import Mode
from entitlement.errors import InvalidArgument, Unavailable
from entitlement.opening import Identity, Opening
from gateway.receipts import Receipts, folder, writer
from gateway.receipts.folder import Folder, Segment
from gateway.receipts.frames import FRAME_BYTES, HEADER_BYTES
from gateway.receipts.journal import ADOPT_S, SEAL_AFTER_S
from tests.hot_stores import TOKENS, charge, request

DEPLOYMENT, OTHER = "d" * 32, "e" * 32
DEADLINE_S = 20.0
StreamId = tuple[int, int]


def opening(number: int, deployment: str = DEPLOYMENT) -> Opening:
    return Opening(number, Identity("run", "repl"), deployment)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Streams:
    """What a hot store says of its journals: one record, which is not settled."""

    def __init__(self) -> None:
        self.ids: dict[int, StreamId] = {1: (1, 0)}
        self.reached: dict[int, tuple[int, StreamId]] = {}

    async def last_ids(self) -> dict[int, StreamId]:
        return dict(self.ids)

    async def settled(self) -> dict[int, tuple[int, StreamId]]:
        return dict(self.reached)


class Desk:
    """Receipts, and the words that the tests are written in."""

    def __init__(self, base: Path, max_bytes: int = 1 << 30) -> None:
        self.clock = Clock()
        self.receipts = Receipts(base, max_bytes=max_bytes, clock=self.clock)
        self.streams = Streams()

    def keep(self, *bodies: bytes) -> asyncio.Future[object]:
        """The future of an answer whose receipts these are."""
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.receipts.keep(list(bodies), [(future, bodies)])
        return future

    async def kept(self, *bodies: bytes) -> None:
        async with asyncio.timeout(DEADLINE_S):
            assert await self.keep(*bodies) == bodies

    async def tend(self) -> None:
        await self.receipts.tend(self.streams)

    async def sealed(self) -> None:
        """The segment in hand is finished, and it is noted what its end waits for."""
        self.clock.now_s += SEAL_AFTER_S + 0.1
        await self.tend()

    def draft(self, mode: Mode = Mode.NORMAL, durability: Durability = Durability.RECEIPT) -> bytes:
        asked = request("k1", (TOKENS, 1), mode=mode)
        return self.receipts.draft(asked, msgspec.structs.replace(charge(asked), durability=durability))


@asynccontextmanager
async def desk(
    base: Path, number: int = 1, *, deployment: str = DEPLOYMENT, max_bytes: int = 1 << 30
) -> AsyncIterator[Desk]:
    made = Desk(base, max_bytes)
    try:
        await made.receipts.begin(opening(number, deployment))
        yield made
    finally:
        await made.receipts.stop()


def held(segments: list[Segment]) -> list[bytes]:
    return [body for segment in segments for body in segment.read().bodies]


def files(base: Path) -> list[str]:
    """The segments on disk."""
    return sorted(str(path.relative_to(base)) for path in base.glob("*/*/*.receipts"))


async def left(base: Path, number: int = 99) -> list[bytes]:
    """What another gateway finds in the first folder."""
    async with desk(base, number) as found:
        return held(await found.receipts.begin(opening(number + 1)))


async def turns(count: int = 20) -> None:
    """Lets everything that is due happen."""
    for _ in range(count):
        await asyncio.sleep(0)


class TestFolders:
    async def test_each_gateway_has_its_own_the_first_that_is_free(self, tmp_path: Path) -> None:
        async with desk(tmp_path) as one, desk(tmp_path) as two:
            await one.kept(b"one")
            await two.kept(b"two")
            assert [Path(name).parent.name for name in files(tmp_path)] == ["0", "1"]
        assert await left(tmp_path) == [b"one", b"two"]

    async def test_what_gateways_left_that_do_not_come_back_is_taken_over_and_dropped(self, tmp_path: Path) -> None:
        async with desk(tmp_path) as one, desk(tmp_path) as two, desk(tmp_path) as three:
            for number, made in enumerate((one, two, three)):
                await made.kept(b"%d" % number)
        async with desk(tmp_path, 2) as only:
            owed = await only.receipts.begin(opening(3))
            assert held(owed) == [b"0", b"1", b"2"]
            async with desk(tmp_path, 2) as beside:
                assert await beside.receipts.begin(opening(3)) == []  # They are the first one's now.
            only.receipts.replayed_all(owed, opening(3))
            only.streams.ids, only.streams.reached = {1: (5, 0)}, {1: (3, (5, 0))}
            await only.tend()
            assert held(await only.receipts.begin(opening(4))) == []
        assert await left(tmp_path) == []

    async def test_one_that_lives_takes_over_from_one_that_died_beside_it(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 2) as alive:
            async with desk(tmp_path, 2) as beside:
                await beside.kept(b"same")
            async with desk(tmp_path, 1) as older:
                await older.kept(b"older")
            await alive.tend()
            assert not alive.receipts.owes  # Not yet: they may come back.
            alive.clock.now_s += ADOPT_S
            await alive.tend()
            assert alive.receipts.owes
            owed = await alive.receipts.begin(opening(2))
            assert held(owed) == [b"older"]  # What was decided under this opening, the hot store knows.
            alive.receipts.replayed_all(owed, opening(2))
            alive.streams.ids, alive.streams.reached = {1: (5, 0)}, {1: (2, (5, 0))}
            await alive.tend()
            assert [Path(name).parent.name for name in files(tmp_path)] == ["0"]  # Its own, in hand.

    async def test_what_a_gateway_left_is_taken_over_with_its_folder(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 1) as first:
            await first.kept(b"one", b"two")
            async with desk(tmp_path, 2) as beside:
                assert await beside.receipts.begin(opening(3)) == []  # Not what another still has.
        async with desk(tmp_path, 1) as again:
            assert held(await again.receipts.begin(opening(2))) == [b"one", b"two"]

    async def test_deployments_are_apart(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 1) as first:
            await first.kept(b"one")
        async with desk(tmp_path, 2, deployment=OTHER) as other:
            assert await other.receipts.begin(opening(3, OTHER)) == []
            assert held(await other.receipts.begin(opening(2))) == [b"one"]  # The same gateway, at the first again.

    def test_a_process_that_lives_keeps_its_folder_and_a_killed_one_does_not(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from gateway.receipts.folder import Folder;"
            f"print(Folder.claim(Path({str(tmp_path)!r}), {DEPLOYMENT!r}).path.name, flush=True); sys.stdin.read()"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            assert child.stdout.readline().strip() == "0"
            beside = Folder.claim(tmp_path, DEPLOYMENT)
            assert beside.path.name == "1"
        finally:
            child.kill()
            child.communicate(timeout=DEADLINE_S)
        after = Folder.claim(tmp_path, DEPLOYMENT)
        assert after.path.name == "0"
        for taken in (beside, after):
            taken.release()
            taken.release()

    def test_a_place_that_cannot_be_is_refused_with_its_setting(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for refused in (Receipts(tmp_path / "file" / "x").check, lambda: Folder.claim(tmp_path / "file", DEPLOYMENT)):
            with pytest.raises(InvalidArgument, match="receipts_dir"):
                refused()

    def test_the_most_there_may_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folder, "MAX_GATEWAYS", 2)
        taken = [Folder.claim(tmp_path, DEPLOYMENT) for _ in range(2)]
        with pytest.raises(InvalidArgument, match="in use by 2 gateways"):
            Folder.claim(tmp_path, DEPLOYMENT)
        for one in taken:
            one.release()

    def test_a_copy_that_is_kept_for_people_is_never_written_over(self, tmp_path: Path) -> None:
        for _ in range(2):  # Each time all of it is settled, and the gateway starts again.
            taken = Folder.claim(tmp_path, DEPLOYMENT)
            segment = taken.create(1)
            segment.close()
            taken.keep(segment)
            taken.discard(segment)
            taken.clear_spare()
            taken.release()
        assert len(list((tmp_path / DEPLOYMENT / "0").glob("*.kept"))) == 2


class Gate:
    """A disk that is held up."""

    def __init__(self) -> None:
        self.entered, self.free = threading.Event(), threading.Event()
        self.syncs = 0

    def __call__(self, fd: int) -> None:
        self.entered.set()
        assert self.free.wait(DEADLINE_S)
        os.fdatasync(fd)
        self.syncs += 1

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, DEADLINE_S)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(writer, "sync", made)
    yield made
    made.free.set()


class TestGroupCommit:
    async def test_what_gathers_while_the_disk_is_busy_is_one_write(
        self, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with desk(tmp_path) as made:
            writes: list[int] = []
            real = os.pwrite
            monkeypatch.setattr(os, "pwrite", lambda fd, data, at: writes.append(len(data)) or real(fd, data, at))
            first = made.keep(b"first")
            await gate.reached()
            bodies = [b"body-%d" % number for number in range(100)]
            waiting = [made.keep(body) for body in bodies]
            await turns()
            assert not any(future.done() for future in (first, *waiting))  # Nothing is told before it is durable.
            gate.free.set()
            async with asyncio.timeout(DEADLINE_S):
                assert await asyncio.gather(first, *waiting) == [(b"first",), *[(body,) for body in bodies]]
            assert gate.syncs == 2
            assert writes == [FRAME_BYTES + 5, sum(FRAME_BYTES + len(body) for body in bodies)]
        assert await left(tmp_path) == [b"first", *bodies]

    async def test_a_turn_among_them_parts_them(self, tmp_path: Path, gate: Gate) -> None:
        """What was decided under one opening is in its segment, what comes after the next one has begun is not."""
        async with desk(tmp_path, 1) as made:
            made.keep(b"first")
            await gate.reached()
            before = made.keep(b"before")
            begun = asyncio.create_task(made.receipts.begin(opening(2)))
            await turns()
            after = made.keep(b"after")
            gate.free.set()
            async with asyncio.timeout(DEADLINE_S):
                owed = await begun
                await asyncio.gather(before, after)
            assert [(segment.opening, segment.read().bodies) for segment in owed] == [(1, [b"first", b"before"])]

    async def test_a_caller_who_is_gone_disturbs_nobody(self, tmp_path: Path, gate: Gate) -> None:
        async with desk(tmp_path) as made:
            gone, there = made.keep(b"gone"), made.keep(b"there")
            await gate.reached()
            gone.cancel()
            gate.free.set()
            async with asyncio.timeout(DEADLINE_S):
                assert await there == (b"there",)
        assert await left(tmp_path) == [b"gone", b"there"]

    async def test_more_than_a_segment_at_once(self, tmp_path: Path) -> None:
        bodies = [bytes([number]) * (1 << 20) for number in range(20)]
        async with desk(tmp_path) as made:
            await made.kept(*bodies)
            await made.kept(b"next")
        assert await left(tmp_path) == [*bodies, b"next"]

    async def test_segments_are_filled_one_after_the_other_and_lose_nothing(self, tmp_path: Path) -> None:
        bodies = [bytes([number]) * (1 << 19) for number in range(40)]
        async with desk(tmp_path) as made:
            for body in bodies:
                await made.kept(body)
            assert len(files(tmp_path)) == 3
            await made.tend()
            assert made.receipts.size >= 40 << 19
        assert await left(tmp_path) == bodies


class TestStop:
    async def test_stop_makes_durable_what_was_kept(self, tmp_path: Path, gate: Gate) -> None:
        made = Desk(tmp_path)
        await made.receipts.begin(opening(1))
        futures = [made.keep(b"%d" % number) for number in range(10)]
        stopping = asyncio.create_task(made.receipts.stop())
        await gate.reached()
        assert not stopping.done()
        gate.free.set()
        async with asyncio.timeout(DEADLINE_S):
            await stopping
            await asyncio.gather(*futures)
        await made.receipts.stop()
        assert await left(tmp_path) == [b"%d" % number for number in range(10)]

    async def test_a_restart_under_the_same_opening_owes_nothing_and_keeps_all(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 1) as first:
            await first.kept(b"one")
        async with desk(tmp_path, 1) as again:
            assert await again.receipts.begin(opening(1)) == []
            await again.kept(b"two")
            assert held(await again.receipts.begin(opening(2))) == [b"one", b"two"]

    async def test_what_is_owed_is_owed_until_it_was_replayed(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 1) as made:
            await made.kept(b"one")
            assert held(await made.receipts.begin(opening(2))) == [b"one"]
            owed = await made.receipts.begin(opening(2))
            assert held(owed) == [b"one"]
            made.receipts.replayed_all(owed, opening(2))
            assert await made.receipts.begin(opening(2)) == []
            assert held(await made.receipts.begin(opening(3))) == [b"one"]  # Another hot store may not know it.

    async def test_a_damaged_header_is_of_an_unknown_opening_and_its_receipts_are_read(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 1) as first:
            await first.kept(b"one", b"two")
        (name,) = files(tmp_path)
        data = bytearray((tmp_path / name).read_bytes())
        data[3] ^= 1
        (tmp_path / name).write_bytes(data)
        async with desk(tmp_path, 1) as again:
            assert held(await again.receipts.begin(opening(1))) == [b"one", b"two"]


class BadDisk:
    """Fails at one place, and notes which files are written to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = ""  # at: write, torn, sync, create, name
        self.failed: set[int] = set()
        self.written: list[int] = []
        self.open: list[int] = []
        self._real = os.pwrite, os.fsync, os.posix_fallocate
        monkeypatch.setattr(os, "pwrite", self._write)
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(os, "posix_fallocate", self._allocate)
        monkeypatch.setattr(writer, "sync", self._sync)

    def _fail(self, fd: int, code: int) -> None:
        self.failed.add(os.fstat(fd).st_ino)
        self.open.append(os.dup(fd))  # So that no new file gets its number.
        raise OSError(code, os.strerror(code))

    def _write(self, fd: int, data: bytes | memoryview, at: int) -> int:
        self.written.append(os.fstat(fd).st_ino)
        if self.fails == "write":
            self._fail(fd, errno.ENOSPC)
        if self.fails == "torn" and at >= HEADER_BYTES:
            if len(data) <= 10:
                self._fail(fd, errno.ENOSPC)
            return self._real[0](fd, data[: len(data) // 2], at)
        return self._real[0](fd, data, at)

    def _sync(self, fd: int) -> None:
        if self.fails == "sync":
            self._fail(fd, errno.EIO)
        os.fdatasync(fd)

    def _fsync(self, fd: int) -> None:
        if self.fails == "name":
            self._fail(fd, errno.EIO)
        self._real[1](fd)

    def _allocate(self, fd: int, at: int, size: int) -> None:
        if self.fails == "create":
            self._fail(fd, errno.ENOSPC)
        self._real[2](fd, at, size)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadDisk]:
    made = BadDisk(monkeypatch)
    yield made
    for fd in made.open:
        os.close(fd)


async def refused(future: Awaitable[object]) -> str:
    with pytest.raises(Unavailable) as error:
        async with asyncio.timeout(DEADLINE_S):
            await future
    return str(error.value)


FAILURES = {"write": "No space left", "torn": "No space left", "sync": "Input/output error"}


class TestBadDisk:
    @pytest.mark.parametrize("fails", FAILURES)
    @pytest.mark.parametrize("before", [0, 1])
    async def test_whoever_waits_is_told_and_grants_stop_until_the_disk_is_well(
        self, tmp_path: Path, disk: BadDisk, fails: str, before: int
    ) -> None:
        async with desk(tmp_path) as made:
            for number in range(before):
                await made.kept(b"before-%d" % number)
            disk.fails = fails
            waiting = [made.keep(b"lost-%d" % number * 9) for number in range(5)]
            for future in waiting:
                text = await refused(future)
                assert FAILURES[fails] in text
                assert "outcome is unknown" in text
            with pytest.raises(Unavailable, match=f"receipts: {FAILURES[fails]}.*nothing is granted"):
                made.draft()
            assert made.draft(Mode.CHECK_ONLY) == made.draft(durability=Durability.REDIS) == b""
            disk.fails = ""
            await made.tend()
            assert made.receipts.problem == ""
            assert made.draft()
            await made.kept(b"after")
        found = await left(tmp_path)
        assert [body for body in found if not body.startswith(b"lost")] == [b"before-0"] * before + [b"after"]

    @pytest.mark.parametrize("fails", FAILURES)
    async def test_a_file_that_has_failed_is_never_written_again(
        self, tmp_path: Path, disk: BadDisk, fails: str
    ) -> None:
        async with desk(tmp_path) as made:
            await made.kept(b"before")
            await self._fail_and_recover(made, disk, fails)
            assert not disk.failed & set(disk.written)

    @pytest.mark.parametrize("fails", FAILURES)
    async def test_nor_one_that_held_nothing_before(self, tmp_path: Path, disk: BadDisk, fails: str) -> None:
        async with desk(tmp_path) as made:
            await self._fail_and_recover(made, disk, fails)
            for number in range(2, 4):
                await made.receipts.begin(opening(number))
                await made.kept(b"later")
            assert not disk.failed & set(disk.written)

    async def test_nor_when_what_it_holds_is_settled(self, tmp_path: Path, disk: BadDisk) -> None:
        async with desk(tmp_path) as made:
            made.streams.ids, made.streams.reached = {1: (5, 0)}, {1: (1, (5, 0))}
            await made.kept(b"before")
            await self._fail_and_recover(made, disk, "sync")
            await made.tend()
            for _ in range(3):
                await made.kept(b"later")
                await made.sealed()
            assert not disk.failed & set(disk.written)

    async def _fail_and_recover(self, made: Desk, disk: BadDisk, fails: str) -> None:
        disk.fails = fails
        await refused(made.keep(b"lost"))
        assert disk.failed
        disk.fails = ""
        disk.written.clear()
        await made.tend()
        await made.kept(b"after")
        assert disk.written

    @pytest.mark.parametrize("fails", ["create", "name", "write"])
    async def test_no_new_segment_means_no_grant(self, tmp_path: Path, disk: BadDisk, fails: str) -> None:
        async with desk(tmp_path) as made:
            await made.kept(b"before")
            disk.fails = fails
            await refused(made.receipts.begin(opening(2)))
            with pytest.raises(Unavailable, match="receipts"):
                made.draft()
            await refused(made.keep(b"lost"))
            for _ in range(3):
                await made.tend()
                assert made.receipts.problem
            disk.fails = ""
            await made.tend()
            assert made.receipts.problem == ""
            assert held(await made.receipts.begin(opening(3)))[0] == b"before"

    async def test_a_full_disk_is_not_filled_further_by_trying(self, tmp_path: Path, disk: BadDisk) -> None:
        async with desk(tmp_path) as made:
            await made.kept(b"before")
            disk.fails = "sync"
            await refused(made.keep(b"lost"))
            disk.fails = "create"
            for _ in range(20):
                await made.tend()
            assert len(files(tmp_path)) <= 2

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    @pytest.mark.parametrize("before", [0, 1])
    async def test_a_writer_that_has_ended_is_noticed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
    ) -> None:
        def broken(bodies: list[bytes], seed: int) -> bytes:
            raise ValueError("a broken promise")

        async with desk(tmp_path) as made:
            for _ in range(before):
                await made.kept(b"before")
            monkeypatch.setattr(writer, "pack_frames", broken)
            lost = made.keep(b"lost")
            ended = made.receipts._writer
            assert ended is not None
            await asyncio.to_thread(ended._thread.join, DEADLINE_S)
            async with asyncio.timeout(5.0):
                await made.sealed()
            with pytest.raises(Unavailable, match="receipts"):
                made.draft()
            assert not (lost.done() and lost.exception() is None)

    async def test_a_folder_that_cannot_be_had_is_unavailable(self, tmp_path: Path) -> None:
        (tmp_path / DEPLOYMENT).touch()
        made = Desk(tmp_path)
        assert "receipts" in await refused(made.receipts.begin(opening(1)))
        (tmp_path / DEPLOYMENT).unlink()
        await made.receipts.begin(opening(1))
        await made.kept(b"after")
        await made.receipts.stop()


class TestLimit:
    async def test_beyond_the_limit_nothing_is_granted_until_the_ledger_has_come_on(self, tmp_path: Path) -> None:
        async with desk(tmp_path, max_bytes=1_000) as made:
            made.streams.ids = {1: (5, 0)}
            await made.kept(bytes(900))
            await made.sealed()
            assert made.draft()
            await made.kept(bytes(200))
            await made.tend()
            with pytest.raises(Unavailable, match="wait for the ledger, the limit is 1000"):
                made.draft()
            assert made.draft(durability=Durability.REDIS) == b""
            made.streams.reached = {1: (1, (5, 0))}
            await made.tend()
            assert made.receipts.size < 300
            assert made.draft()

    async def test_what_a_restart_finds_counts(self, tmp_path: Path) -> None:
        async with desk(tmp_path) as first:
            await first.kept(bytes(2_000))
        async with desk(tmp_path, max_bytes=1_000) as again:
            with pytest.raises(Unavailable, match="the limit is 1000"):
                again.draft()


class TestDropping:
    async def test_a_segment_goes_when_every_partition_is_settled(self, tmp_path: Path) -> None:
        async with desk(tmp_path) as made:
            made.streams.ids = {1: (5, 0), 2: (7, 3)}
            await made.kept(b"one")
            await made.sealed()
            for reached in (
                {},
                {1: (1, (5, 0))},
                {1: (1, (5, 0)), 2: (1, (7, 2))},
                {1: (1, (4, 9)), 2: (1, (7, 3))},
            ):
                made.streams.reached = reached
                await made.tend()
                assert made.receipts.size > 0, reached
            made.streams.reached = {1: (1, (5, 0)), 2: (1, (7, 3)), 3: (1, (0, 0))}
            await made.tend()
            assert made.receipts.size == 0
            assert len(files(tmp_path)) == 1  # The one in hand.

    async def test_what_comes_later_is_not_waited_for(self, tmp_path: Path) -> None:
        async with desk(tmp_path) as made:
            made.streams.ids = {1: (5, 0)}
            await made.kept(b"one")
            await made.sealed()
            made.streams.ids, made.streams.reached = {1: (9, 0)}, {1: (1, (5, 0))}
            await made.tend()
            assert made.receipts.size == 0

    async def test_the_segment_in_hand_stays_whatever_is_settled(self, tmp_path: Path) -> None:
        async with desk(tmp_path) as made:
            made.streams.ids, made.streams.reached = {1: (5, 0)}, {1: (1, (99, 0))}
            await made.kept(b"one")
            await made.tend()
            assert held(await made.receipts.begin(opening(2))) == [b"one"]

    async def test_what_was_settled_under_another_opening_never_counts(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 1) as made:
            made.streams.ids = {1: (5, 0)}
            await made.kept(b"one")
            await made.sealed()
            for other in (0, 2, 11):
                made.streams.reached = {1: (other, (99, 0))}
                await made.tend()
                assert made.receipts.size > 0

    async def test_marks_that_were_taken_under_another_opening_never_count(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 1) as made:
            made.streams.ids = {1: (5, 0)}
            await made.kept(b"one")
            await made.sealed()
            owed = await made.receipts.begin(opening(2))
            made.streams.ids, made.streams.reached = {1: (9, 0)}, {1: (2, (7, 0))}
            await made.tend()
            assert held(await made.receipts.begin(opening(2))) == [b"one"]  # It has not been replayed.
            made.receipts.replayed_all(owed, opening(2))
            await made.tend()
            assert made.receipts.size > 0  # Where its replay stands in the journal is at most (9, 0), and not settled.
            made.streams.reached = {1: (2, (9, 0))}
            await made.tend()
            assert made.receipts.size == 0

    async def test_an_opening_that_begins_while_the_hot_store_is_asked_is_noticed(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 1) as made:
            made.streams.ids, made.streams.reached = {1: (5, 0)}, {1: (1, (9, 0))}
            await made.kept(b"one")
            real = made.streams.settled

            async def slow() -> dict[int, tuple[int, StreamId]]:
                await made.receipts.begin(opening(2))
                return await real()

            made.streams.settled = slow  # type: ignore[method-assign]
            await made.sealed()
            assert held(await made.receipts.begin(opening(2))) == [b"one"]

    async def test_an_emptied_hot_store_settles_nothing(self, tmp_path: Path) -> None:
        """FLUSHALL: there is no stream and no word of what is settled, until the ledger has opened it again."""
        async with desk(tmp_path, 1) as made:
            await made.kept(b"one")
            made.streams.ids, made.streams.reached = {}, {}
            await made.sealed()
            await made.tend()
            assert held(await made.receipts.begin(opening(2))) == [b"one"]

    async def test_files_of_dropped_segments_serve_again_and_hold_nothing_old(self, tmp_path: Path) -> None:
        async with desk(tmp_path, 1) as made:
            for number in range(1, 8):
                made.streams.ids, made.streams.reached = {1: (number, 0)}, {1: (1, (number, 0))}
                await made.kept(*[b"round-%d" % number] * (20 - number))
                await made.sealed()
            assert sum(path.is_file() for path in (tmp_path / DEPLOYMENT / "0").iterdir()) <= folder.MAX_SPARE + 2
            await made.kept(b"last")
            assert held(await made.receipts.begin(opening(2))) == [b"last"]


class PowerLoss:
    """Knows what is on the disk for good, and what may or may not be: makes the folder as a power cut leaves it."""

    SECTOR = 512

    def __init__(self, home: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, *, honest: bool) -> None:
        self._home, self._rng, self._honest = home, rng, honest
        self._safe: dict[int, dict[int, bytes]] = {}  # by file: its sectors
        self._loose: dict[int, list[tuple[int, bytes]]] = {}  # written, not synced
        self._names: dict[str, int] = {}  # that are on the disk for good
        self._write, self._flush = os.pwrite, os.fsync
        self.moment: Callable[[], None] = lambda: None  # called wherever power may fail
        monkeypatch.setattr(os, "pwrite", self._on_write)
        monkeypatch.setattr(os, "fsync", self._on_fsync)
        monkeypatch.setattr(writer, "sync", self._on_sync)

    def _on_write(self, fd: int, data: bytes | memoryview, at: int) -> int:
        if self._rng.random() < 0.2:
            data = data[: self._rng.randint(1, len(data))]  # The system may take a part.
        written = self._write(fd, data, at)
        self._loose.setdefault(os.fstat(fd).st_ino, []).append((at, bytes(data[:written])))
        self.moment()
        return written

    def _on_sync(self, fd: int) -> None:
        self.moment()
        if self._honest:
            self._settle(os.fstat(fd).st_ino)
        self.moment()

    def _on_fsync(self, fd: int) -> None:
        self.moment()
        inode = os.fstat(fd).st_ino
        if inode == (self._home / DEPLOYMENT / "0").stat().st_ino:
            self._names = self._now()
        else:
            self._settle(inode)
        self.moment()

    def _now(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in (self._home / DEPLOYMENT / "0").iterdir()}

    def _settle(self, inode: int) -> None:
        for at, data in self._loose.pop(inode, []):
            self._put(self._safe.setdefault(inode, {}), at, data)

    def _put(self, sectors: dict[int, bytes], at: int, data: bytes) -> None:
        while data:
            number, begin = divmod(at, self.SECTOR)
            part, data = data[: self.SECTOR - begin], data[self.SECTOR - begin :]
            was = sectors.get(number, bytes(self.SECTOR))
            sectors[number] = was[:begin] + part + was[begin + len(part) :]
            at += len(part)

    def image(self, to: Path) -> None:
        """As the disk is found after the power has failed now."""
        rng = self._rng
        names = dict(self._names) if rng.random() < 0.5 else self._now()
        target = to / DEPLOYMENT / "0"
        target.mkdir(parents=True)
        for name, inode in names.items():
            sectors = dict(self._safe.get(inode, {}))
            for at, data in self._loose.get(inode, []):
                how = rng.choice(["none", "all", "prefix", "sectors"])
                if how in ("all", "prefix"):
                    self._put(sectors, at, data if how == "all" else data[: rng.randrange(len(data) + 1)])
                elif how == "sectors":
                    new: dict[int, bytes] = dict(sectors)
                    self._put(new, at, data)
                    sectors |= {number: part for number, part in new.items() if rng.random() < 0.5}
            with (target / name).open("wb") as file:
                for number, part in sectors.items():
                    file.seek(number * self.SECTOR)
                    file.write(part)
                if name.endswith((".receipts", ".spare")):
                    file.truncate(max(SMALL, file.seek(0, os.SEEK_END)))


SMALL = 4_096  # of a segment, so that many are begun


async def lost_by_power(tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, *, honest: bool) -> int:
    """One run with power cuts at random moments: how many answers had been given whose receipts are not readable."""
    home, images = tmp_path / "home", []
    home.mkdir()
    power = PowerLoss(home, rng, monkeypatch, honest=honest)
    told: list[bytes] = []

    def moment() -> None:
        if len(images) < 6 and rng.random() < 0.1:
            image = tmp_path / f"image-{len(images)}"
            before = list(told)  # Whoever is told while the image is made had a receipt before.
            power.image(image)
            images.append((image, before))

    async with desk(home) as made:
        power.moment = moment
        for number in range(40):
            groups = [
                [
                    b"%d-%d-%d " % (number, group, index) + rng.randbytes(rng.randrange(400))
                    for index in range(rng.randint(1, 3))
                ]
                for group in range(rng.randint(1, 4))
            ]
            futures = [made.keep(*group) for group in groups]
            for group, future in zip(groups, futures, strict=True):
                future.add_done_callback(lambda _, bodies=group: told.extend(bodies))  # type: ignore[misc]
            await asyncio.gather(*futures)
            if rng.random() < 0.05:
                await made.receipts.begin(opening(made.receipts.opening + 1))
            if rng.random() < 0.1:  # All is settled, and files serve again.
                told.clear()
                made.receipts.replayed_all(
                    await made.receipts.begin(opening(made.receipts.opening)), opening(made.receipts.opening)
                )
                made.streams.reached = {1: (made.receipts.opening, (1, 0))}
                await made.sealed()
                made.streams.reached = {}
        power.moment = lambda: None
    monkeypatch.undo()
    lost = 0
    for image, before in images:
        found = set(await left(image))
        lost += sum(body not in found for body in before)
    return lost


class TestPowerLoss:
    async def test_every_answer_that_was_given_has_its_receipt(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        for run in range(20):
            with monkeypatch.context() as patch:
                patch.setattr(writer, "SEGMENT_BYTES", SMALL)
                patch.setattr(Folder.create, "__defaults__", (SMALL,))
                place = tmp_path / str(run)
                place.mkdir()
                assert await lost_by_power(place, random.Random(f"{seed} {run}"), patch, honest=True) == 0

    async def test_without_the_sync_answers_are_lost(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The test bites."""
        lost = 0
        for run in range(5):
            with monkeypatch.context() as patch:
                place = tmp_path / str(run)
                place.mkdir()
                lost += await lost_by_power(place, random.Random(run), patch, honest=False)
        assert lost > 0
