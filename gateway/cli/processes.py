"""Commands that run something: dev (a whole stack), gateway and sync (one production process)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Final

import click

from gateway.cli import show
from gateway.cli.calls import Problem
from gateway.cli.changes import apply_file
from gateway.cli.child import ChildFailed
from gateway.cli.embedded import EmbeddedMissing
from gateway.cli.folder import FolderInUse
from gateway.cli.options import FILE, FOLDER, admin_address, gateway_address
from gateway.cli.stack import DevStack, module_argv, module_env

DATA: Final = Path(".entitlement")
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command("dev")
@gateway_address
@admin_address
@click.option("--data", type=FOLDER, default=DATA, show_default=True, help="Where everything is kept.")
@click.option("--catalog", type=FILE, help="A catalogue to apply at every start.")
def dev_command(gateway: str, admin: str, data: Path, catalog: Path | None) -> None:
    """Runs a whole stack on this machine until it is interrupted.

    Valkey, PostgreSQL, the gateway and ledger_sync serve when the line `ready gateway=ADDR admin=ADDR` is printed.
    """
    with interruptible(), running(DevStack(data, gateway=gateway, admin=admin)) as stack:
        if catalog:
            with redirect_stdout(sys.stderr):
                apply_file(catalog, stack.admin)
        show.line(f"ready gateway={stack.gateway} admin={stack.admin}")
        Event().wait()  # for the signal


@click.command("gateway")
def gateway_command() -> None:
    """Runs the gateway, configured by ENTITLEMENT_GATEWAY_*."""
    _become("gateway")


@click.command("sync")
def sync_command() -> None:
    """Runs ledger_sync, configured by ENTITLEMENT_SYNC_*."""
    _become("ledger_sync")


def _become(module: str) -> None:
    os.execve(sys.executable, module_argv(module), os.environ | module_env())  # noqa: S606  Without a shell.


@contextmanager
def running(stack: DevStack) -> Iterator[DevStack]:
    """Starts a stack, and stops it whatever happens. A start that failed is one clear message."""
    try:
        with show.progress("starting Valkey, PostgreSQL, gateway and ledger_sync"):
            stack.start()
    except (ChildFailed, EmbeddedMissing, FolderInUse, OSError) as error:
        raise Problem(f"error: {error}") from None
    try:
        yield stack
    finally:
        stack.stop()


@contextmanager
def interruptible(status: int = 0) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP ends the block in order, then the process with `status`; later ones wait."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for name in _SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    hung_up = signal.getsignal(signal.SIGHUP)
    before = {name: signal.signal(name, interrupt) for name in _SIGNALS}
    if hung_up is signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(status) from None
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
