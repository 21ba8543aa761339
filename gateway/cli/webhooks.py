"""Commands about webhooks: which were given up, and sending them anew."""

from __future__ import annotations

import click

from entitlement.v1.ledger_pb2 import DeadLetter, RetryDeadLettersRequest
from gateway.cli import calls, show
from gateway.cli.apply import pages
from gateway.cli.calls import DEADLINE_S
from gateway.cli.options import admin_option


@click.group("webhooks")
def webhooks_command() -> None:
    """Webhooks that were given up."""


@webhooks_command.command("list")
@click.argument("customer", default="")
@admin_option
def list_command(customer: str, admin: str) -> None:
    """The dead letters, of all customers or one, with what the receiver said last."""
    with calls.admin(admin) as stub:
        found = [letter for page in pages(stub.ListDeadLetters, customer) for letter in page.dead_letters]
    show.table((">id", "type", "customer", ">attempts", "error", "failed", "event"), map(_row, found))


@webhooks_command.command("retry")
@click.argument("ids", nargs=-1, type=click.IntRange(1, 2**63 - 1), metavar="[ID]...")
@admin_option
def retry_command(ids: tuple[int, ...], admin: str) -> None:
    """Sends dead letters anew: those with the IDs, or all."""
    with calls.admin(admin) as stub:
        answer = stub.RetryDeadLetters(RetryDeadLettersRequest(ids=ids), timeout=DEADLINE_S)
    show.line(f"retried {answer.retried}")


def _row(letter: DeadLetter) -> tuple[str, ...]:
    return (
        *(str(letter.id), letter.type, letter.customer, str(letter.attempts), letter.error),
        *(show.moment(letter.failed_at), letter.event_id),
    )
