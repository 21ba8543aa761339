"""What a process says of itself over HTTP: /livez, /readyz and, from whoever counts, the figures. A WSGI application
that reads what it is given and does nothing else. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeAlias

import msgspec

LONGEST_TURN_S: Final = 5.0  # an event loop that has not turned for longer is not alive

StartResponse: TypeAlias = Callable[[str, list[tuple[str, str]]], object]
Application: TypeAlias = Callable[[dict[str, object], StartResponse], Iterable[bytes]]


class Component(msgspec.Struct, frozen=True):
    """A part by its state. `detail`: why it is not well, or what is worth to know."""

    ok: bool
    detail: str = ""


Components: TypeAlias = Mapping[str, Component]


class Pulse:
    """How long ago an event loop has turned: it calls `beat`, and any thread may look."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_s = clock()

    def beat(self) -> None:
        self._last_s = self._clock()

    @property
    def silent_s(self) -> float:
        return max(0.0, self._clock() - self._last_s)

    @property
    def component(self) -> Component:
        silent_s = self.silent_s
        slow = silent_s > LONGEST_TURN_S
        return Component(not slow, f"has not turned for {silent_s:.1f} s" if slow else "")


class Probes:
    """`live` and `ready` are asked in the server's thread, and must not wait. Every other path is the figures'."""

    def __init__(
        self,
        live: Callable[[], Components],
        ready: Callable[[], Components],
        figures: Application,
        redact: Callable[[str], str],
    ) -> None:
        self._asked = {"/livez": live, "/readyz": ready}
        self._figures = figures
        self._redact = redact

    def __call__(self, environ: dict[str, object], start: StartResponse) -> Iterable[bytes]:
        path = str(environ.get("PATH_INFO", ""))
        if (ask := self._asked.get(path)) is not None:
            return self._answer(ask(), start)
        if path == "/metrics":
            return self._figures(environ, start)
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"known are /metrics, /livez and /readyz\n"]

    def _answer(self, components: Components, start: StartResponse) -> Iterable[bytes]:
        well = all(component.ok for component in components.values())
        told = {name: {"ok": part.ok, "detail": self._redact(part.detail)} for name, part in components.items()}
        start("200 OK" if well else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps({"ok": well, "components": told}).encode() + b"\n"]
