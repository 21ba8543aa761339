"""Commands that correct what is booked: rerate, backfill."""

from __future__ import annotations

from typing import Final

import click
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.quantity import format_amount
from entitlement.v1.ledger_pb2 import Backfill, BackfillRequest, RerateReport, RerateRequest
from gateway.cli import calls, show
from gateway.cli.options import admin_option, moment

CORRECT_DEADLINE_S: Final = 600.0  # a call that broke off is carried on by the same call


@click.command("rerate")
@click.argument("rate_card")
@click.option("--from", "since", required=True, callback=moment, metavar="TIME", help="Of the first events.")
@click.option("--to", "until", default="", callback=moment, metavar="TIME", help="Of the first events beyond; now.")
@click.option("--customer", default="", help="One of them; all by default.")
@click.option("--preview", is_flag=True, help="Only say what would be booked.")
@click.option("--adjust-final", is_flag=True, help="Also what final invoices have told; the open one adjusts it.")
@click.option("--key", default="", help="The idempotency key: needed to book; the same again books nothing more.")
@admin_option
def rerate_command(
    rate_card: str,
    since: Timestamp,
    until: Timestamp | None,
    customer: str,
    preview: bool,
    adjust_final: bool,
    key: str,
    admin: str,
) -> None:
    """Prices past usage on RATE_CARD by the versions in force at its time, as the catalogue is now."""
    if preview == bool(key):
        raise click.UsageError("Give --preview to see, or --key to book.")
    request = RerateRequest(
        rate_card=rate_card, customer=customer, to=until, idempotency_key=key, adjust_final=adjust_final
    )
    getattr(request, "from").CopyFrom(since)
    with calls.admin(admin) as stub, show.progress("re-rating"):
        call = stub.PreviewRerate if preview else stub.Rerate
        report = call(request, timeout=CORRECT_DEADLINE_S)
    _show_report(report)


def _show_report(report: RerateReport) -> None:
    columns = ("customer", "feature", ">events", ">before", ">after", ">difference")
    show.table(
        columns,
        [
            (
                *(line.customer, line.feature, str(line.events)),
                *map(format_amount, (line.before_nanos, line.after_nanos, line.after_nanos - line.before_nanos)),
            )
            for line in report.lines
        ],
    )
    show.line(f"events={report.events} delta={format_amount(report.delta_nanos)}")


@click.group("backfill")
def backfill_command() -> None:
    """Makes what was gathered under a backfill id visible, or takes it back."""


@backfill_command.command("close")
@click.argument("backfill")
@admin_option
def close_command(backfill: str, admin: str) -> None:
    """Records the events that were gathered as BACKFILL."""
    with calls.admin(admin) as stub, show.progress("closing"):
        found = stub.CloseBackfill(BackfillRequest(id=backfill), timeout=CORRECT_DEADLINE_S)
    _show_backfill(found)


@backfill_command.command("revert")
@click.argument("backfill")
@click.option("--reason", default="", help="For the audit log.")
@admin_option
def revert_command(backfill: str, reason: str, admin: str) -> None:
    """Takes BACKFILL back: its events come to nothing."""
    with calls.admin(admin) as stub, show.progress("reverting"):
        found = stub.RevertBackfill(BackfillRequest(id=backfill, reason=reason), timeout=CORRECT_DEADLINE_S)
    _show_backfill(found)


def _show_backfill(backfill: Backfill) -> None:
    show.facts(
        [
            ("backfill", backfill.id),
            ("status", Backfill.Status.Name(backfill.status)),
            ("events", f"{backfill.events} gathered, {backfill.recorded} recorded, {backfill.duplicates} duplicates"),
            ("amount", format_amount(backfill.amount_nanos)),
        ]
    )
    for rejected in backfill.rejected:
        show.line(f"rejected  {rejected.idempotency_key}: {rejected.error}")
