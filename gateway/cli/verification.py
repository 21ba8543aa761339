"""The conservation proof, as the command line asks for it and shows it."""

from __future__ import annotations

import time
from typing import Final

from entitlement.quantity import format_amount
from entitlement.v1.ledger_pb2 import VerifyReport, VerifyRequest
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.cli import show
from gateway.cli.calls import VERIFY_DEADLINE_S

WAIT_S: Final = 10.0  # for the journal to be settled
_LOOK_AGAIN_S: Final = 0.1
_SHOWN: Final = 20  # drifts, and findings; more are only counted


def verify(stub: LedgerAdminStub, customer: str = "", *, repair: bool = False, wait_s: float = WAIT_S) -> VerifyReport:
    """The report once the journal is settled, or as it is when `wait_s` have passed.

    With `repair`, drift is booked as entries and the report is of what it is afterwards.
    """
    report = _settled(stub, customer, wait_s)
    if not repair or is_clean(report):
        return report
    _ask(stub, customer, repair=True)
    return _settled(stub, customer, wait_s)


def _settled(stub: LedgerAdminStub, customer: str, wait_s: float) -> VerifyReport:
    """A report's totals are of when it began: the report after one without lag has all that was waited for."""
    deadline = time.monotonic() + wait_s
    with show.progress("waiting for the journal to be settled"):
        while _ask(stub, customer).journal_lag and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN_S)
        return _ask(stub, customer)


def _ask(stub: LedgerAdminStub, customer: str, *, repair: bool = False) -> VerifyReport:
    return stub.Verify(VerifyRequest(customer=customer, repair=repair), timeout=VERIFY_DEADLINE_S)


def is_clean(report: VerifyReport) -> bool:
    return not any(number for _, number in _faults(report))


def show_report(report: VerifyReport) -> None:
    """The report, and as its last line the proof in one."""
    show.facts(
        [
            ("customers", f"{report.customers:,}"),
            ("events", f"{report.events:,} booked, {format_amount(report.total_nanos)} in total"),
            ("outbox", f"{report.outbox_pending:,} events not yet published"),
            ("quarantine", f"{report.quarantined:,} records"),
            ("sequence gaps", f"{report.sequence_gaps:,}"),
        ]
    )
    for drift in report.drifts[:_SHOWN]:
        hot, ledger = (_figure(drift.part, number) for number in (drift.hot_nanos, drift.ledger_nanos))
        show.line(f"drift  {drift.customer} {drift.part}: hot {hot}, ledger {ledger} at sequence {drift.sequence}")
    if report.drifted > _SHOWN:
        show.line(f"drift  and {report.drifted - _SHOWN} more customers")
    for found in report.findings[:_SHOWN]:
        show.line(f"found  {found.customer} {found.name}: {found.detail}")
    if len(report.findings) > _SHOWN:
        show.line(f"found  and {len(report.findings) - _SHOWN} more")
    faults = ", ".join(f"{name} {number}" for name, number in _faults(report) if number)
    if faults:
        show.line(f"not clean: {faults}")
    show.line(summary(report))


def _figure(part: str, number: int) -> str:
    """Meters and places in the journal are plain numbers; everything else is an amount."""
    return str(number) if part.startswith("meter:") or part == "place" else format_amount(number)


def summary(report: VerifyReport) -> str:
    return (
        f"verified customers={report.customers} events={report.events} drift_nanos={report.drift_nanos}"
        f" unbalanced={report.unbalanced_transactions} lag={report.journal_lag}"
    )


def _faults(report: VerifyReport) -> list[tuple[str, int]]:
    return [
        ("drifted customers", report.drifted),
        ("drift in nanos", report.drift_nanos),
        ("unbalanced transactions", report.unbalanced_transactions),
        ("unsettled records", report.journal_lag),
        ("records in quarantine", report.quarantined),
        ("sequence gaps", report.sequence_gaps),
        ("findings", len(report.findings)),
    ]
