"""/livez and /readyz, as a probe sees them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from entitlement.probes import LONGEST_TURN_S, Component, Components, Probes, Pulse, StartResponse
from entitlement.redaction import Redactor


def figures(environ: dict[str, object], start: StartResponse) -> Iterable[bytes]:
    start("200 OK", [])
    return [b"figures"]


def ask(path: str, ready: Components, pulse: Pulse | None = None) -> tuple[str, bytes]:
    said: list[str] = []
    live = {"loop": (pulse or Pulse(lambda: 0.0)).component}
    probes = Probes(lambda: live, lambda: ready, figures, Redactor(["hunter22"]).text)
    body = b"".join(probes({"PATH_INFO": path}, lambda status, headers: said.append(status)))
    return said[0], body


def test_it_is_ready_while_every_component_is_well() -> None:
    status, body = ask("/readyz", {"redis": Component(True), "fence": Component(True)})
    assert status == "200 OK"
    assert json.loads(body)["components"].keys() == {"redis", "fence"}


def test_one_component_that_is_not_well_is_named_with_why_and_without_secrets() -> None:
    status, body = ask("/readyz", {"redis": Component(False, "hunter22 was refused"), "fence": Component(True)})
    told = json.loads(body)
    assert status.startswith("503") and told["ok"] is False
    assert told["components"]["redis"] == {"ok": False, "detail": "*** was refused"}
    assert told["components"]["fence"]["ok"] is True


def test_a_loop_that_does_not_turn_is_not_alive_and_one_that_turns_again_is() -> None:
    now = [0.0]
    pulse = Pulse(lambda: now[0])
    now[0] = LONGEST_TURN_S
    assert ask("/livez", {}, pulse)[0] == "200 OK"
    now[0] += 0.1
    status, body = ask("/livez", {}, pulse)
    assert status.startswith("503") and b"has not turned for 5.1 s" in body
    pulse.beat()
    assert ask("/livez", {}, pulse)[0] == "200 OK"


def test_figures_have_their_path_and_nothing_else_is_served() -> None:
    assert ask("/metrics", {}) == ("200 OK", b"figures")
    assert ask("/", {})[0].startswith("404")
