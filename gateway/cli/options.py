"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import click
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.errors import InvalidArgument
from entitlement.redis_address import Endpoint
from gateway.cli.calls import ADMIN, GATEWAY
from gateway.cli.security import secured

Command = TypeVar("Command", bound=Callable[..., object])

FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


def gateway_option(command: Command) -> Command:
    """The gateway that a command calls."""
    return cast("Command", secured(gateway_address(command)))


def admin_option(command: Command) -> Command:
    """The control plane that a command calls."""
    return cast("Command", secured(admin_address(command)))


def gateway_address(command: Command) -> Command:
    text = "Address of the gateway: host:port or unix:/path."
    return click.option("--gateway", envvar="ENTITLEMENT_ADDRESS", default=GATEWAY, show_default=True, help=text)(
        command
    )


def admin_address(command: Command) -> Command:
    text = "Address of the control plane (ledger_sync): host:port or unix:/path."
    return click.option("--admin", envvar="ENTITLEMENT_ADMIN_ADDRESS", default=ADMIN, show_default=True, help=text)(
        command
    )


def metrics_option(command: Command) -> Command:
    text = "Of the gateway, such as http://127.0.0.1:9090/metrics."
    return click.option("--metrics", default="", metavar="URL", help=text, callback=_web_url)(command)


def _web_url(context: click.Context, option: click.Parameter, text: str) -> str:
    if text and not text.startswith(("http://", "https://")):
        raise click.BadParameter("expected http:// or https://")
    return text


def redis_option(command: Command) -> Command:
    text = "The hot store's URL; by default what ENTITLEMENT_GATEWAY_REDIS_URL or the gateway's file says."
    return click.option("--redis", default="", metavar="URL", help=text, callback=_redis_url)(command)


def _redis_url(context: click.Context, option: click.Parameter, text: str) -> str:
    """Checked, and never shown: it may hold a password."""
    try:
        if text:
            Endpoint.parse(text)
    except InvalidArgument as error:
        raise click.BadParameter(error.problem) from None
    return text


def seed_option(command: Command) -> Command:
    return click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=42, show_default=True)(command)


def moment(context: click.Context, option: click.Parameter, text: str) -> Timestamp | None:
    """RFC 3339, or a date for its midnight in UTC."""
    if not text:
        return None
    time = Timestamp()
    try:
        time.FromJsonString(text if "T" in text else f"{text}T00:00:00Z")
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a time such as 2026-11-01 or 2026-11-01T13:00:00Z") from None
    return time
