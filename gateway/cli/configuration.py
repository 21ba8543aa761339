"""`entitlement --config FILE`: where the two processes are and how they are reached, once, for every command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click
import msgspec

from gateway.cli.security import OPTIONS

_MAX_BYTES: Final = 65_536


class Given(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Each field is the option of that name. The command line and the environment come before it."""

    gateway: str = ""
    admin: str = ""
    tls: bool = False
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    plain: tuple[str, ...] = ()
    token_file: str = ""
    insecure: bool = False


assert {"gateway", "admin", *OPTIONS} == set(Given.__struct_fields__)


def apply(context: click.Context, option: click.Parameter, file: Path | None) -> None:
    """Callback of the option. Raises BadParameter, which names the field."""
    if file is None:
        return
    try:
        with file.open("rb") as opened:
            given = msgspec.yaml.decode(opened.read(_MAX_BYTES) or b"{}", type=Given)
    except (msgspec.DecodeError, msgspec.ValidationError, OSError) as error:
        raise click.BadParameter(f"{file}: {error}") from None
    assert isinstance(context.command, click.Group)
    context.default_map = _defaults(context.command, msgspec.to_builtins(given))


def _defaults(group: click.Group, given: Mapping[str, object]) -> dict[str, object]:
    """For those commands that call a process, not for those that start one."""
    found: dict[str, object] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found[name] = _defaults(command, given)
        elif any(parameter.name == "tls_ca" for parameter in command.params):
            found[name] = dict(given)
    return found
