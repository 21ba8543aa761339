"""The command `invoice`, and an invoice as text, JSON, CSV or a page of HTML. Amounts are exact decimals."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Final

import click
from google.protobuf.json_format import MessageToJson
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.quantity import format_amount
from entitlement.v1.ledger_pb2 import GetInvoiceRequest, Invoice, InvoiceLine, InvoiceTier
from gateway.cli import calls, show
from gateway.cli.calls import DEADLINE_S
from gateway.cli.options import admin_option, moment

COLUMNS: Final = ("period", "feature", "dimensions", ">quantity", ">amount", "version", "text")
CSV_COLUMNS: Final = ("period_start", "feature", "dimensions", "quantity", "amount", "credit_type", "version", "text")
TIER_COLUMNS: Final = ("feature", "dimensions", ">quantity", ">price", ">per", ">flat", ">amount")

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
"""


@click.command("invoice")
@click.argument("customer")
@click.option("--at", default="", callback=moment, metavar="TIME", help="Of the period that holds it; now by default.")
@click.option("--id", "invoice", default="", help="A final or void one.")
@click.option(
    *("--format", "form"), type=click.Choice(["text", "json", "csv", "html"]), default="text", show_default=True
)
@admin_option
def invoice_command(customer: str, at: Timestamp | None, invoice: str, form: str, admin: str) -> None:
    """CUSTOMER's invoice: the draft of the current period, or the final one of an earlier period."""
    with calls.admin(admin) as stub:
        found = stub.GetInvoice(GetInvoiceRequest(customer=customer, at=at, id=invoice), timeout=DEADLINE_S)
    if form == "text":
        _show(found)
    else:
        click.echo(_FORMS[form](found), nl=form != "csv")


def as_json(invoice: Invoice) -> str:
    """The JSON form of the message: amounts are nanos, as decimal strings."""
    return MessageToJson(invoice)


def as_csv(invoice: Invoice) -> str:
    """One row a line. No cell begins with what a customer has chosen, so that none is taken for a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for line in invoice.lines:
        period, feature, dimensions, quantity, amount, version, text = _row(line, invoice)
        writer.writerow((period, feature, dimensions, quantity, amount, invoice.credit_type, version, text))
    return out.getvalue()


def as_html(invoice: Invoice) -> str:
    """A page that needs nothing else. Everything in it is escaped."""
    title = escape(_title(invoice))
    facts = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in _facts(invoice)
    )
    parts = [f"<h1>{title}</h1>", f"<table>\n{facts}\n</table>", _html_table(COLUMNS, _rows(invoice))]
    if tiers := _tier_rows(invoice):
        parts += ["<h2>Tiers</h2>", _html_table(TIER_COLUMNS, tiers)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>"
    )


_FORMS: Final[dict[str, Callable[[Invoice], str]]] = {"json": as_json, "csv": as_csv, "html": as_html}


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    classes = [' class="number"' if name.startswith(">") else "" for name in columns]
    head = "".join(
        f"<th{kind}>{escape(name.removeprefix('>'))}</th>" for kind, name in zip(classes, columns, strict=True)
    )
    lines = (
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(classes, row, strict=True)) + "</tr>"
        for row in rows
    )
    return "\n".join((f"<table>\n<tr>{head}</tr>", *lines, "</table>"))


def _show(invoice: Invoice) -> None:
    show.facts(_facts(invoice))
    show.table(COLUMNS, _rows(invoice))
    if tiers := _tier_rows(invoice):
        show.table(TIER_COLUMNS, tiers)


def _title(invoice: Invoice) -> str:
    return f"Invoice {invoice.id}" if invoice.id else f"Draft invoice of {invoice.customer}"


def _facts(invoice: Invoice) -> list[tuple[str, str]]:
    credit = invoice.credit_type
    facts = [
        ("invoice", invoice.id or "-"),
        ("customer", invoice.customer),
        ("status", Invoice.Status.Name(invoice.status)),
        ("period", f"{show.moment(invoice.period_start)} to {show.moment(invoice.period_end)}"),
        ("total", show.money(invoice.total_nanos, credit)),
        ("credits applied", show.money(invoice.credits_applied_nanos, credit)),
        ("due", show.money(invoice.due_nanos, credit)),
    ]
    if invoice.minimum_commit_nanos:
        facts.append(("minimum commit", f"{show.money(invoice.minimum_commit_nanos, credit)} lacked, part of due"))
    if invoice.replaces:
        facts.append(("replaces", invoice.replaces))
    if invoice.HasField("finalized_at"):
        facts.append(("finalized", show.moment(invoice.finalized_at)))
    if invoice.HasField("voided_at"):
        facts.append(("voided", " ".join(filter(None, (show.moment(invoice.voided_at), invoice.void_reason)))))
    return facts


def _rows(invoice: Invoice) -> list[tuple[str, ...]]:
    return [_row(line, invoice) for line in invoice.lines]


def _row(line: InvoiceLine, invoice: Invoice) -> tuple[str, ...]:
    return (
        show.moment(line.period_start if line.HasField("period_start") else invoice.period_start),
        line.feature,
        show.dimensions(line.dimensions.items()),
        str(line.quantity),
        format_amount(line.amount_nanos),
        line.rate_card_version,
        line.text,
    )


def _tier_rows(invoice: Invoice) -> list[tuple[str, ...]]:
    return [_tier_row(line, tier) for line in invoice.lines for tier in line.tiers]


def _tier_row(line: InvoiceLine, tier: InvoiceTier) -> tuple[str, ...]:
    return (
        line.feature,
        show.dimensions(line.dimensions.items()),
        str(tier.quantity),
        format_amount(tier.price_nanos),
        str(tier.per),
        format_amount(tier.flat_nanos),
        format_amount(tier.amount_nanos),
    )
