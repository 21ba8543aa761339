"""Commands about records that could not be booked: which they are, booking them after all, giving them up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import click

from entitlement.quantity import format_amount
from entitlement.v1.ledger_pb2 import QuarantinedRecord, QuarantineRequest
from gateway.cli import calls, show
from gateway.cli.apply import pages
from gateway.cli.options import admin_option

DEADLINE_S: Final = 600.0  # what was done until then stays done
EXIT_LEFT: Final = 1

_id = click.IntRange(1, 2**63 - 1)


@click.group("quarantine")
def quarantine_command() -> None:
    """Journal records that could not be booked."""


@quarantine_command.command("list")
@click.argument("customer", default="")
@admin_option
def list_command(customer: str, admin: str) -> None:
    """What is in quarantine, of all customers or one, as far as it can be read."""
    with calls.admin(admin) as stub:
        _show([record for page in pages(stub.ListQuarantine, customer) for record in page.records])


@quarantine_command.command("retry")
@click.argument("ids", nargs=-1, type=_id, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="Everything that is in quarantine.")
@admin_option
def retry_command(ids: tuple[int, ...], everything: bool, admin: str) -> None:
    """Books what can be booked by now. Exits with 1 when something is left, and shows it."""
    if bool(ids) == everything:
        raise click.UsageError("Give IDs, or --all.")
    with calls.admin(admin) as stub, show.progress("booking"):
        answer = stub.RetryQuarantine(QuarantineRequest(ids=ids, all=everything), timeout=DEADLINE_S)
    if answer.left:
        _show(answer.left)
    show.line(f"booked {answer.resolved}, left {len(answer.left)}")
    if answer.left:
        click.get_current_context().exit(EXIT_LEFT)


@quarantine_command.command("drop")
@click.argument("ids", nargs=-1, type=_id, required=True, metavar="ID...")
@click.option("--reason", required=True, help="Why, for whoever asks later.")
@admin_option
def drop_command(ids: tuple[int, ...], reason: str, admin: str) -> None:
    """Gives records up. A customer who has paid for one gets it back."""
    with calls.admin(admin) as stub, show.progress("dropping"):
        answer = stub.DropQuarantine(QuarantineRequest(ids=ids, reason=reason), timeout=DEADLINE_S)
    show.line(f"dropped {answer.resolved}")


def _show(records: Iterable[QuarantinedRecord]) -> None:
    show.table((">id", "customer", "key", ">amount", "kept", "entry", "reason"), map(_row, records))


def _row(record: QuarantinedRecord) -> tuple[str, ...]:
    return (
        *(str(record.id), record.customer or "-", record.idempotency_key or "-", format_amount(record.amount_nanos)),
        *(show.moment(record.created_at), f"{record.stream} {record.entry_id}", record.reason),
    )
