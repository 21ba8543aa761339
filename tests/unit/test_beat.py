"""A loop that does not go round in time is found; one that waits, rests or was stopped is not."""

from __future__ import annotations

import asyncio

from ledger_sync.beat import LONGEST_LOOK_S, Beat, Watch

DEADLINE_S = 10.0


def test_what_does_not_go_round_in_time_is_named() -> None:
    slow, quick = Beat(deadline_s=2.0), Beat(deadline_s=2.0)
    watch = Watch({"slow": slow, "quick": quick})
    with slow, quick:
        assert watch.look(1.0) == []  # The first look counts from here.
        for _ in range(2):
            quick()
            assert watch.look(1.0) == []
        quick()
        assert watch.look(0.5) == ["slow"]
        assert watch.silent_s == {"slow": 2.5, "quick": 0.0}
        slow()
        assert watch.look(0.5) == [] and watch.silent_s["slow"] == 0.0


def test_what_does_not_run_is_not_watched() -> None:
    beat = Beat(deadline_s=1.0)
    watch = Watch({"it": beat})
    for _ in range(5):
        assert watch.look(1.0) == []
    with beat:
        assert [watch.look(1.0) for _ in range(3)] == [[], [], ["it"]]
    assert watch.look(1.0) == [] and watch.silent_s["it"] == 0.0


def test_a_process_that_was_stopped_does_not_take_its_loops_for_hung() -> None:
    beat = Beat(deadline_s=LONGEST_LOOK_S + 0.1)
    watch = Watch({"it": beat})
    with beat:
        watch.look(0.25)
        assert watch.look(3_600.0) == []
        assert watch.look(0.25) == ["it"]  # Now it had its time.


def test_what_is_started_again_has_its_whole_deadline() -> None:
    beat = Beat(deadline_s=1.0)
    watch = Watch({"it": beat})
    with beat:
        assert [watch.look(1.0) for _ in range(3)][-1] == ["it"]
        watch.forgive()
        assert [watch.look(1.0) for _ in range(2)] == [[], ["it"]]


async def test_a_loop_that_waits_goes_round() -> None:
    beat, event = Beat(), asyncio.Event()
    waiting = asyncio.create_task(beat.wait(event))
    async with asyncio.timeout(DEADLINE_S):
        while beat.rounds < 2:  # noqa: ASYNC110  It is not told otherwise.
            await asyncio.sleep(0.01)
        assert not waiting.done()
        event.set()
        await waiting
        rounds = beat.rounds
        await beat.sleep(1.5)
    assert beat.rounds == rounds + 2
