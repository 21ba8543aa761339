"""How a loop shows that it goes round, and how one that hangs is noticed. Pure: whoever looks brings the clock."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, Self

DEADLINE_S: Final = 90.0  # longer than a connection is waited for and one statement may run
STEP_S: Final = 1.0  # between two beats of a loop that waits
LONGEST_LOOK_S: Final = 1.0  # a process that was stopped does not take all of its loops for hung


class Beat:
    """Counts the rounds of one loop: call it in each. It is watched while a `with` of it is open."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s  # how long a round may take
        self.rounds = 0
        self.running = False

    def __call__(self) -> None:
        """Raises CancelledError when the loop was told to end and has not noticed."""
        if cancelled():
            raise asyncio.CancelledError
        self.rounds += 1

    def __enter__(self) -> Self:
        self.running = True
        self()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False

    async def sleep(self, seconds: float) -> None:
        """However long: a loop that waits does not hang."""
        while seconds > 0:
            await asyncio.sleep(min(seconds, STEP_S))
            seconds -= STEP_S
            self()

    async def wait(self, event: asyncio.Event) -> None:
        """Until the event is set, however long that is."""
        while not event.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(STEP_S):
                    await event.wait()
            self()


def cancelled() -> bool:
    """Whether this task shall end. On Python 3.11 asyncio.wait_for may swallow a cancellation (cpython gh-86296), and
    client libraries use it: a loop that calls them looks here.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return False  # No task: nothing to end.
    return task is not None and task.cancelling() > 0


class Watch:
    """How long the parts of a loop have been silent, as far as somebody looked. Of one that does not run: 0."""

    def __init__(self, beats: Mapping[str, Beat]) -> None:
        self.silent_s = dict.fromkeys(beats, 0.0)
        self._beats = beats
        self._rounds = dict.fromkeys(beats, -1)

    def look(self, elapsed_s: float) -> list[str]:
        """So long after the last look: those that have been silent for longer than they may."""
        for name, beat in self._beats.items():
            if not beat.running or beat.rounds != self._rounds[name]:
                self.silent_s[name] = 0.0
            else:
                self.silent_s[name] += min(elapsed_s, LONGEST_LOOK_S)
            self._rounds[name] = beat.rounds
        return [name for name, beat in self._beats.items() if self.silent_s[name] > beat.deadline_s]

    def forgive(self) -> None:
        """Each has its whole deadline again."""
        self.silent_s = dict.fromkeys(self._beats, 0.0)
