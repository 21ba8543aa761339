"""What an examination of one part of a deployment has found. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import msgspec


class Outcome(IntEnum):
    """The numbers of ledger.proto's Check.Outcome."""

    OK = 1
    WARN = 2  # it works, and something about it will hurt one day
    FAIL = 3  # something does not work, or money is at risk


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at. `found` holds no secret; `fix` says what to do, and is empty where all is well."""

    component: str
    name: str
    outcome: Outcome
    found: str
    fix: str = ""


def ok(component: str, name: str, found: str) -> Check:
    return Check(component, name, Outcome.OK, found)


def warn(component: str, name: str, found: str, fix: str) -> Check:
    return Check(component, name, Outcome.WARN, found, fix)


def fail(component: str, name: str, found: str, fix: str) -> Check:
    return Check(component, name, Outcome.FAIL, found, fix)


def worst(checks: Iterable[Check]) -> Outcome:
    """Of none: OK."""
    return max([check.outcome for check in checks], default=Outcome.OK)
