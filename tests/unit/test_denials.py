"""Which denials are told: those for want of credit, once for each place in an account's journal."""

from __future__ import annotations

import pytest

from entitlement.decision import Consume, Decision, Line, Mode, Reason, Verdict
from gateway import denials
from gateway.denials import Denials


def request(customer: str = "bob", mode: Mode = Mode.NORMAL) -> Consume:
    return Consume("acme", customer, "", "k", mode, 0, (Line("calls", 1),), b"")


def denied(reason: Reason = Reason.INSUFFICIENT_CREDITS, sequence: int = 7) -> Decision:
    return Decision(Verdict.DENY, reason, 0, False, 1, sequence, "USD", 0, 0, 5, 0, 0, "1", (), (), False)


def test_a_customer_is_told_once_until_something_happens_to_it() -> None:
    noted = Denials()
    for _ in range(3):
        noted.note(request(), denied())
    assert noted.take() == [("acme", "bob")]
    noted.note(request(), denied())
    assert noted.take() == []
    noted.note(request(), denied(Reason.ARREARS_GATE, sequence=8))
    noted.note(request("ann"), denied())
    assert noted.take() == [("acme", "ann"), ("acme", "bob")]


def test_other_denials_and_checks_are_not_told() -> None:
    noted = Denials()
    for reason in set(Reason) - {Reason.INSUFFICIENT_CREDITS, Reason.ARREARS_GATE}:
        noted.note(request(), denied(reason))
    noted.note(request(mode=Mode.CHECK_ONLY), denied())
    assert noted.take() == []


def test_what_could_not_be_told_is_told_later() -> None:
    noted = Denials()
    noted.note(request(), denied())
    noted.put_back(noted.take())
    assert noted.take() == [("acme", "bob")]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denials, "MAX_REMEMBERED", 10)
    noted = Denials()
    for number in range(100):
        noted.note(request(f"c{number}"), denied())
    assert len(noted._seen) <= 10 and len(noted.take()) == 100
