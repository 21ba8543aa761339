"""`entitlement status`: one screen that says whether it is healthy and the money is right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final, get_args

import click

from entitlement.examination import Check, Outcome, fail, ok, warn, worst
from entitlement.v1.ledger_pb2 import Examination
from gateway.cli import calls, probes, scrape, show
from gateway.cli.options import admin_option, gateway_option, metrics_option
from gateway.cli.probes import Figure, known
from gateway.cli.verification import WAIT_S, is_clean, summary, verify

MONEY: Final = "money"
_FIGURES: Final[tuple[Figure, ...]] = get_args(Figure)


@click.command("status")
@gateway_option
@admin_option
@metrics_option
@click.option("--verify", "prove", is_flag=True, help="Prove the money now, instead of asking the patrol: reads all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status_command(gateway: str, admin: str, metrics: str, prove: bool, as_json: bool) -> None:
    """Is it healthy, and is the money right? Exits with 1 when not."""
    told, figures = probes.sync(admin)
    checks = [probes.gateway(gateway), *told]
    if metrics:
        checks.append(version(scrape.fetch(metrics), figures))
    if prove and figures is not None:
        checks.append(_proof(admin))
    healthy = worst(checks) is not Outcome.FAIL
    if as_json:
        show.line(json.dumps(_object(healthy, checks, figures)))
    else:
        _show(healthy, checks, figures)
    if not healthy:
        click.get_current_context().exit(probes.EXIT_UNWELL)


def version(told: scrape.Scrape | None, figures: Examination | None) -> Check:
    """The gateway's, which no call tells; both processes should be of one."""
    if told is None:
        fix = "correct --metrics (http://HOST:PORT/metrics), or set METRICS of it"
        return warn(probes.GATEWAY, "version", "the metrics do not answer", fix)
    if figures is not None and told.version != figures.version:
        found = f"version {told.version or 'not told'}, ledger_sync {figures.version or 'not told'}"
        return warn(probes.GATEWAY, "version", found, "bring both to one version")
    return ok(probes.GATEWAY, "version", f"version {told.version or 'not told'}")


def _proof(admin: str) -> Check:
    try:
        with calls.admin(admin) as stub:
            report = verify(stub, wait_s=WAIT_S)
    except calls.CallFailed as error:
        return fail(MONEY, "proof", error.message, "see ledger_sync's log")
    if is_clean(report):
        return ok(MONEY, "proof", summary(report))
    return fail(MONEY, "proof", summary(report), "entitlement verify says where; entitlement verify --repair books it")


def _object(healthy: bool, checks: Sequence[Check], figures: Examination | None) -> dict[str, object]:
    found = {name: known(figures, name) for name in _FIGURES}
    told = figures.version if figures is not None else None
    return {"healthy": healthy, "version": told, "figures": found, "checks": probes.as_json(checks)}


def _show(healthy: bool, checks: Sequence[Check], figures: Examination | None) -> None:
    probes.show_checks(_gathered(checks))
    if figures is not None:
        show.line()
        show.facts(
            [
                ("customers", _shown(figures, "customers")),
                ("open holds", _shown(figures, "holds_open")),
                ("invoices due", _shown(figures, "invoices_due")),
            ]
        )
    broken = ", ".join(f"{check.component} {check.name}" for check in checks if check.outcome is Outcome.FAIL)
    show.line("healthy" if healthy else f"not healthy: {broken}")


def _shown(figures: Examination, name: Figure) -> str:
    value = known(figures, name)
    return "not known" if value is None else f"{value:,}"


def _gathered(checks: Sequence[Check]) -> Iterator[Check]:
    """What is well in one line for each component; money, and what is not well, one by one."""
    for component in dict.fromkeys(check.component for check in checks):
        mine = [check for check in checks if check.component == component]
        well = [check for check in mine if check.outcome is Outcome.OK and component != MONEY]
        if well:
            yield ok(component, "", "; ".join(_brief(check) for check in well))
        yield from (check for check in mine if check not in well)


def _brief(check: Check) -> str:
    return f"{check.name} {check.found}" if check.name.startswith(("loop ", "opening", "policy")) else check.found
