"""What `status` and `doctor` ask the two processes, and how both show what they found. Nothing here raises for a
process that is away: that is a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entitlement.examination import Check, Outcome, fail, ok
from entitlement.v1 import ledger_pb2
from entitlement.v1.ledger_pb2 import Examination, ExamineRequest
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.cli import calls, show

GATEWAY: Final = "gateway"
SYNC: Final = "ledger_sync"
HEALTH_S: Final = 3.0
EXIT_UNWELL: Final = 1

Figure = Literal[
    "customers",
    "journal_lag",
    "drifted",
    "drift_nanos",
    "quarantined",
    "outbox_pending",
    "holds_open",
    "webhooks_given_up",
    "invoices_due",
]

_START: Final = "start it (entitlement sync), or correct --admin; decisions go on, and nothing is booked meanwhile"
_LET_IN: Final = "give --token-file, or --tls-cert and --tls-key, of an identity with the scope read and all customers"
_FIXES: Final = {
    grpc.StatusCode.UNAUTHENTICATED: _LET_IN,
    grpc.StatusCode.PERMISSION_DENIED: _LET_IN,
    grpc.StatusCode.UNIMPLEMENTED: "it is older than this command: update it",
}
_COLOUR: Final = {Outcome.OK: "green", Outcome.WARN: "yellow", Outcome.FAIL: "red"}


def gateway(address: str) -> Check:
    try:
        with calls.channel_to(address, "gateway") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_S)
    except grpc.RpcError as error:
        fix = "start it (entitlement gateway), or correct --gateway; its log says why it ended"
        return fail(GATEWAY, "health", calls.describe(error, address, GATEWAY), fix)
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ok(GATEWAY, "health", f"serving at {address}")
    fix = "entitlement doctor on its machine looks at the hot store and at the folder of receipts"
    return fail(GATEWAY, "health", f"at {address}: NOT_SERVING, it grants nothing or is about to end", fix)


def sync(address: str, timeout_s: float = calls.DEADLINE_S) -> tuple[list[Check], Examination | None]:
    """What ledger_sync found, and its figures; None: it could not be asked."""
    try:
        with calls.channel_to(address, "admin") as channel:
            found = LedgerAdminStub(channel).Examine(ExamineRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        fix = _FIXES.get(error.code(), _START) if isinstance(error, grpc.Call) else _START
        return [fail(SYNC, "reachable", calls.describe(error, address, "admin"), fix)], None
    told = f"at {address}, version {found.version or 'not told'}"
    return [ok(SYNC, "reachable", told), *map(_check, found.checks)], found


def known(figures: Examination | None, name: Figure) -> int | None:
    """None: the store that has it is away."""
    return int(getattr(figures, name)) if figures is not None and figures.HasField(name) else None


def _check(found: ledger_pb2.Check) -> Check:
    outcome = Outcome(found.outcome) if found.outcome else Outcome.WARN
    return Check(found.component, found.name, outcome, found.found, found.fix)


def show_checks(checks: Iterable[Check]) -> None:
    """Each on its line, and below it what to do."""
    shown = list(checks)
    widths = [max((len(text) for text in column), default=0) for column in zip(*map(_words, shown), strict=True)]
    for check in shown:
        component, name = (word.ljust(width) for word, width in zip(_words(check), widths, strict=True))
        show.line(f"{mark(check.outcome)}  {component}  {name}  {check.found}".rstrip())
        if check.fix:
            show.line(f"      {'':{widths[0]}}  {'':{widths[1]}}  fix: {check.fix}")


def _words(check: Check) -> tuple[str, str]:
    return check.component, check.name


def mark(outcome: Outcome) -> str:
    return click.style(f"{outcome.name.lower():<4}", fg=_COLOUR[outcome], bold=outcome is Outcome.FAIL)


def as_json(checks: Sequence[Check]) -> list[dict[str, str]]:
    return [
        {"component": c.component, "check": c.name, "outcome": c.outcome.name.lower(), "found": c.found, "fix": c.fix}
        for c in checks
    ]
