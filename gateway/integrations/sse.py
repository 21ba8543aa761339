"""Server-sent events in a stream of bytes: whole events out, as they were, with their data. Pure."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

MAX_EVENT_BYTES: Final = 16_777_216
_END: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class Event(NamedTuple):
    """`raw` with its empty line; `data`: its data lines, joined; None: it has none (a comment, say)."""

    raw: bytes
    data: bytes | None


class Splitter:
    """Of one stream. Holds back what is not a whole event yet."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Event]:
        """Events that are whole now. An event that grows beyond MAX_EVENT_BYTES comes in parts, without data."""
        text = self._rest + data if self._rest else data
        events, at = [], 0
        for end in _END.finditer(text):
            events.append(_event(text[at : end.end()]))
            at = end.end()
        self._rest = text[at:]
        if len(self._rest) > MAX_EVENT_BYTES:
            events.append(Event(self.rest(), None))
        return events

    def rest(self) -> bytes:
        """What is held back; it is not any more."""
        rest, self._rest = self._rest, b""
        return rest


def _event(raw: bytes) -> Event:
    lines = [line for line in raw.splitlines() if line.startswith(b"data:")]
    if not lines:
        return Event(raw, None)
    return Event(raw, b"\n".join(line[6:] if line[5:6] == b" " else line[5:] for line in lines))
