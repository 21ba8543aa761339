"""Commands about the audit log: who changed what and who was refused, and whether the log is what was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import click
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.v1.ledger_pb2 import AuditLine, AuditReport, ListRequest, VerifyAuditRequest
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.cli import calls, show
from gateway.cli.options import admin_option, moment

DEADLINE_S: Final = 600.0  # it reads every line
PAGE_SIZE: Final = 1_000
EXIT_BROKEN: Final = 1


@click.group("audit")
def audit_command() -> None:
    """Who changed what, and who was refused."""


@audit_command.command("list")
@click.option("--from", "start", default="", callback=moment, help="Lines since then.")
@click.option("--to", "end", default="", callback=moment, help="Lines before then.")
@admin_option
def list_command(start: Timestamp | None, end: Timestamp | None, admin: str) -> None:
    """The log, oldest first."""
    request = ListRequest(page_size=PAGE_SIZE, to=end)
    if start:
        getattr(request, "from").CopyFrom(start)
    with calls.admin(admin) as stub:
        lines = list(_lines(stub, request))
    show.table((">id", "at", "actor", "source", "action", "subject", "outcome", "detail"), map(_row, lines))


@audit_command.command("verify")
@click.option("--expect-head", default="", metavar="HASH", help="A head that was kept elsewhere: it has to be there.")
@admin_option
def verify_command(expect_head: str, admin: str) -> None:
    """Proves that no line was changed, taken out or moved since it was sealed. Exits with 1 when it cannot.

    A log whose end was cut off, or that was written anew as a whole, is told by a head that was kept elsewhere alone.
    """
    with calls.admin(admin) as stub, show.progress("reading"):
        report = stub.VerifyAudit(VerifyAuditRequest(expect_head=expect_head), timeout=DEADLINE_S)
    show.line(_verdict(report))
    if report.broken or report.head_missing:
        click.get_current_context().exit(EXIT_BROKEN)


def _lines(stub: LedgerAdminStub, request: ListRequest) -> Iterator[AuditLine]:
    while True:
        page = stub.ListAudit(request, timeout=calls.DEADLINE_S)
        yield from page.lines
        request.page_token = page.next_page_token
        if not request.page_token:
            return


def _row(line: AuditLine) -> tuple[str, ...]:
    return (
        *(str(line.id), show.moment(line.at), line.actor, line.source or "-"),
        *(line.action, line.subject, line.outcome, line.detail),
    )


def _verdict(report: AuditReport) -> str:
    facts = f"sealed={report.sealed} unsealed={report.unsealed} broken={report.broken} head={report.head}"
    if report.broken:
        return f"BROKEN {facts}\n{report.problem}"
    if report.head_missing:
        return f"CUT OFF {facts}\nthe expected head is not in the log: its end is gone, or it was written anew"
    return f"verified {facts}"
