"""Commands that ask the two processes: balance, grants, check, explain, verify."""

from __future__ import annotations

import secrets

import click

from entitlement.errors import InvalidArgument
from entitlement.identity import check_name, check_value
from entitlement.quantity import MAX_QUANTITY, format_amount
from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.ledger_pb2 import ExplainRequest, Explanation, Grant, Transaction
from gateway.cli import calls, show
from gateway.cli.apply import pages
from gateway.cli.calls import DEADLINE_S
from gateway.cli.options import admin_option, gateway_option
from gateway.cli.verification import WAIT_S, is_clean, show_report, verify


@click.command("balance")
@click.argument("customer")
@gateway_option
def balance_command(customer: str, gateway: str) -> None:
    """What CUSTOMER has left, now."""
    with calls.gateway(gateway) as stub:
        answer = stub.GetBalance(pb.GetBalanceRequest(customer=customer), timeout=DEADLINE_S)
    _show_balance(answer.balance)


@click.command("grants")
@click.argument("customer")
@admin_option
def grants_command(customer: str, admin: str) -> None:
    """CUSTOMER's blocks of credit, as the ledger has settled them."""
    with calls.admin(admin) as stub:
        found = [grant for page in pages(stub.ListGrants, customer) for grant in page.grants]
    columns = (">remaining", ">amount", "category", ">priority", "effective", "expires", "features", "grant")
    show.table(columns, map(_grant_row, found))


@click.command("check")
@click.argument("customer")
@click.argument("feature")
@click.argument("quantity", type=click.IntRange(0, MAX_QUANTITY))
@click.option("--dimension", "-d", "pairs", multiple=True, metavar="NAME=VALUE", help="May be given several times.")
@click.option("--consume", is_flag=True, help="Debit it, too.")
@click.option("--key", default="", help="The idempotency key; a new one by default.")
@gateway_option
def check_command(
    customer: str, feature: str, quantity: int, pairs: tuple[str, ...], consume: bool, key: str, gateway: str
) -> None:
    """Asks whether CUSTOMER may use QUANTITY units of FEATURE. Exits with 1 when denied."""
    request = pb.CheckAndConsumeRequest(
        idempotency_key=key or f"cli-{secrets.token_hex(8)}",
        customer=customer,
        usage=[pb.Usage(feature=feature, quantity=quantity, dimensions=_dimensions(pairs))],
        mode=pb.MODE_NORMAL if consume else pb.MODE_CHECK_ONLY,
    )
    with calls.gateway(gateway) as stub:
        answer = stub.CheckAndConsume(request, timeout=DEADLINE_S)
    _show_decision(answer)
    if answer.verdict == pb.VERDICT_DENY:
        click.get_current_context().exit(1)


@click.command("explain")
@click.argument("key")
@click.option("--customer", default="", help="Whose key it is, if several have it.")
@admin_option
def explain_command(key: str, customer: str, admin: str) -> None:
    """One charge, from the event with the idempotency KEY down to the ledger's entries."""
    with calls.admin(admin) as stub:
        found = stub.Explain(ExplainRequest(idempotency_key=key, customer=customer), timeout=DEADLINE_S)
    _show_explanation(found)


@click.command("verify")
@click.argument("customer", default="")
@click.option("--repair", is_flag=True, help="Book what drifts as entries.")
@click.option("--wait", type=click.FloatRange(0, 3600), default=WAIT_S, help="Seconds for the journal to be settled.")
@admin_option
def verify_command(customer: str, repair: bool, wait: float, admin: str) -> None:
    """Proves that hot store and ledger agree to the nano, for all customers or one. Exits with 1 when they do not."""
    with calls.admin(admin) as stub:
        report = verify(stub, customer, repair=repair, wait_s=wait)
    show_report(report)
    if not is_clean(report):
        click.get_current_context().exit(1)


def _dimensions(pairs: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            if not equals:
                raise InvalidArgument(pair, "has no '='; expected NAME=VALUE")
            found[check_name("NAME", name)] = check_value("VALUE", value)
        except InvalidArgument as error:
            raise click.BadParameter(str(error), param_hint="--dimension") from None
    return found


def _show_balance(balance: pb.Balance) -> None:
    credit = balance.credit_type
    show.facts(
        [
            ("available", show.money(balance.available_nanos, credit)),
            ("held", show.money(balance.held_nanos, credit)),
            ("settled", f"{show.money(balance.settled_nanos, credit)} in this period"),
            ("overage", show.money(balance.overage_nanos, credit)),
            ("gate", f"{show.money(balance.gate_nanos, credit)} below zero"),
            ("position", f"epoch {balance.epoch}, sequence {balance.sequence}"),
        ]
    )
    if balance.quotas:
        rows = (
            (
                quota.feature,
                str(quota.used),
                str(quota.limit),
                "soft" if quota.soft else "hard",
                show.moment(quota.resets_at),
            )
            for quota in balance.quotas
        )
        show.table(("quota", ">used", ">limit", "kind", "resets"), rows)


def _grant_row(grant: Grant) -> tuple[str, ...]:
    return (
        format_amount(grant.remaining_nanos),
        format_amount(grant.amount_nanos),
        Grant.Category.Name(grant.category).lower(),
        str(grant.priority),
        show.moment(grant.effective_at),
        show.moment(grant.expires_at),
        ",".join(grant.features) or "all",
        grant.id,
    )


def _show_decision(answer: pb.CheckAndConsumeResponse) -> None:
    verdict = pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_")
    reason = pb.Reason.Name(answer.reason).removeprefix("REASON_") if answer.reason else ""
    show.line(" ".join(filter(None, (verdict, reason, "(replayed)" if answer.replayed else ""))))
    for line in answer.consumed:
        amount = show.money(line.amount_nanos, answer.balance.credit_type)
        show.line(f"{line.feature}: {line.quantity:,} for {amount} (version {line.rate_card_version})")
    _show_balance(answer.balance)


def _show_explanation(found: Explanation) -> None:
    event, decision = found.event, found.decision
    credit = decision.balance.credit_type
    show.facts(
        [
            ("key", event.idempotency_key),
            ("customer", "/".join(filter(None, (event.customer, event.subject)))),
            ("time", show.moment(event.event_time) if event.HasField("event_time") else "when it was decided"),
            ("verdict", pb.Verdict.Name(decision.verdict).removeprefix("VERDICT_")),
            ("rate", found.rate or "-"),
            ("position", f"epoch {decision.epoch}, sequence {decision.sequence}"),
            ("crossed", ", ".join(f"{percent} %" for percent in found.thresholds_crossed) or "no threshold"),
        ]
    )
    rows = []
    for at, line in enumerate(event.usage):
        charged = decision.consumed[at].amount_nanos if at < len(decision.consumed) else 0
        rows.append(
            (line.feature, show.dimensions(line.dimensions.items()), str(line.quantity), show.money(charged, credit))
        )
    show.table(("feature", "dimensions", ">quantity", ">amount"), rows)
    for transaction in found.transactions:
        _show_transaction(transaction, credit)


def _show_transaction(transaction: Transaction, credit: str) -> None:
    show.line(f"transaction {transaction.id}: {transaction.kind}, recorded {show.moment(transaction.recorded_at)}")
    show.table(
        ("account", "grant", ">amount"),
        ((entry.account, entry.grant or "-", show.money(entry.amount_nanos, credit)) for entry in transaction.entries),
    )
