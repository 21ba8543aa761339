"""The `entitlement` command: a client of both processes, and what starts them on a developer's machine."""

from __future__ import annotations

import click

import gateway.telemetry  # noqa: F401 - before grpc, whose core would tell of what went wrong in lines of its own
from gateway.cli import configuration
from gateway.cli.audit import audit_command
from gateway.cli.changes import apply_command, replay_command
from gateway.cli.corrections import backfill_command, rerate_command
from gateway.cli.demo import demo_command
from gateway.cli.doctor import doctor_command
from gateway.cli.invoice import invoice_command
from gateway.cli.options import FILE
from gateway.cli.processes import dev_command, gateway_command, sync_command
from gateway.cli.quarantine import quarantine_command
from gateway.cli.questions import balance_command, check_command, explain_command, grants_command, verify_command
from gateway.cli.status import status_command
from gateway.cli.tail import tail_command
from gateway.cli.tokens import token_command
from gateway.cli.top import top_command
from gateway.cli.webhooks import webhooks_command

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="entitlement-gateway")
@click.option(
    "--config",
    type=FILE,
    envvar="ENTITLEMENT_CONFIG",
    expose_value=False,
    is_eager=True,
    callback=configuration.apply,
    help="A YAML file with options of every command that calls a process: gateway, admin, tls_ca, token_file, ...",
)
def main() -> None:
    """Decides, meters and books usage-based entitlements in real time."""


for _command in (
    *(dev_command, demo_command, gateway_command, sync_command, apply_command, replay_command, invoice_command),
    *(balance_command, grants_command, check_command, explain_command, verify_command, webhooks_command),
    *(rerate_command, backfill_command, quarantine_command, status_command, doctor_command, tail_command),
    *(top_command, token_command, audit_command),
):
    main.add_command(_command)
