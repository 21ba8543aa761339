"""Commands about the file of identities: a token is made, what is in the file, an identity that ends."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

import click
import msgspec

from entitlement.access import Access, Entry, Scope, as_file, as_time, entries_in, make_token, parse_time
from entitlement.errors import InvalidArgument
from gateway.cli import show
from gateway.cli.calls import Problem

HEAD: Final = (
    "# Written by `entitlement token`, which keeps no other comments. No token is in here, only hashes of them.\n"
)
COLUMNS: Final = ("name", "tenant", "known by", "scopes", "customers", "created", "expires", "revoked")
MODE: Final = 0o600  # of a file that is new
_SPAN: Final = re.compile(r"([1-9][0-9]{0,4})([smhd])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}

_file = click.option(
    "--file", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The file of identities."
)


@click.group("token")
def token_command() -> None:
    """Tokens of callers, in the file that ENTITLEMENT_GATEWAY_ACCESS and ENTITLEMENT_SYNC_ACCESS name."""


@token_command.command("create")
@_file
@click.option("--name", required=True, help="What logs call it; no other identity's.")
@click.option("--tenant", default="default", show_default=True)
@click.option("--scope", "scopes", multiple=True, required=True, type=click.Choice(["consume", "read", "admin"]))
@click.option(
    "--customer", "customers", multiple=True, help="An id, or the beginning of some with * after it. None: all."
)
@click.option("--expires", default="", help="In 90d, 12h; or at a time like 2027-01-31T12:00:00Z.")
def create_command(
    file: Path, name: str, tenant: str, scopes: tuple[str, ...], customers: tuple[str, ...], expires: str
) -> None:
    """Makes a token and prints it, this once: the file gets its hash alone."""
    wanted = Entry(
        name=name,
        tenant=tenant,
        scopes=cast("tuple[Scope, ...]", tuple(dict.fromkeys(scopes))),
        customers=customers or None,
    )
    with _told():
        token = create(file, wanted, expires, random=os.urandom, now_ms=_now_ms())
    show.line(token)
    click.echo(f"{name} is in {file}; this is its token, which nothing shows again", err=True)


@token_command.command("list")
@_file
def list_command(file: Path) -> None:
    """Who is in the file: no hashes."""
    with _told():
        entries = _entries(file)
    show.table(
        ("name", "tenant", "known by", "scopes", "customers", "created", "expires", "revoked"), map(_row, entries)
    )


@token_command.command("revoke")
@_file
@click.argument("name")
def revoke_command(file: Path, name: str) -> None:
    """Ends an identity, by its NAME or its token's id. It stays in the file, for whoever reads the audit log."""
    with _told():
        entry = revoke(file, name, now_ms=_now_ms())
    show.line(f"{entry.name} is revoked since {entry.revoked}")


def create(file: Path, wanted: Entry, expires: str, *, random: Callable[[int], bytes], now_ms: int) -> str:
    """Adds an identity with a new token, and returns that. InvalidArgument: what is wanted, or the file, is not sound;
    the file is as it was.
    """
    token, mark, digest = make_token(random)
    ends = _ends(expires, now_ms)
    entry = msgspec.structs.replace(wanted, token=mark, sha256=digest, created=as_time(now_ms), expires=ends)
    with _changing(file) as entries:
        if any(known.name == entry.name for known in entries):
            raise InvalidArgument("name", f"{entry.name!r} is in the file already; revoke it, and take another name")
        _write(file, (*entries, entry), now_ms)
    return token


def revoke(file: Path, name: str, *, now_ms: int) -> Entry:
    """Ends the identity of that name or token's id from now on, unless it has ended before; returns it."""
    with _changing(file) as entries:
        found = [entry for entry in entries if name in (entry.name, entry.token)]
        if len(found) != 1:
            raise InvalidArgument("name", f"{name!r} is {'nobody' if not found else 'more than one'} in the file")
        entry = msgspec.structs.replace(found[0], revoked=_revoked(found[0], now_ms))
        _write(file, [entry if known is found[0] else known for known in entries], now_ms)
    return entry


@contextmanager
def _changing(file: Path) -> Iterator[Sequence[Entry]]:
    """What is in the file, while nobody else changes it by these commands."""
    folder = os.open(file.resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield _entries(file) if file.exists() else ()
    finally:
        os.close(folder)


def _entries(file: Path) -> tuple[Entry, ...]:
    return entries_in(file.read_bytes())


def _write(file: Path, entries: Sequence[Entry], now_ms: int) -> None:
    """All at once: who reads the file meanwhile reads the old one or the new one. It stays whose it was: a process that
    could not read the new one would go on with the old, and who was revoked would be let in.
    """
    Access(entries, lambda: now_ms)
    place = file.resolve()
    before = place.stat() if place.exists() else None
    number, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with open(number, "w", encoding="utf-8") as new:  # noqa: PTH123  It is open already.
            if before is not None:
                _give(number, before, place)
            os.fchmod(number, stat.S_IMODE(before.st_mode) if before is not None else MODE)
            new.write(HEAD + as_file(entries))
            new.flush()
            os.fsync(number)
        Path(name).replace(place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _give(number: int, before: os.stat_result, place: Path) -> None:
    made = os.fstat(number)
    if (made.st_uid, made.st_gid) == (before.st_uid, before.st_gid):
        return
    try:
        os.fchown(number, before.st_uid, before.st_gid)
    except PermissionError:
        raise InvalidArgument("file", f"{str(place)!r} is another user's, who could not read it any more") from None


def _revoked(entry: Entry, now_ms: int) -> str:
    """Who was to be revoked later is so now."""
    over = entry.revoked and parse_time(f"{entry.name}.revoked", entry.revoked) <= now_ms
    return entry.revoked if over else as_time(now_ms)


def _ends(expires: str, now_ms: int) -> str:
    if not expires:
        return ""
    if span := _SPAN.fullmatch(expires):
        return as_time(now_ms + int(span[1]) * _SECONDS[span[2]] * 1000)
    if parse_time("expires", expires) <= now_ms:
        raise InvalidArgument("expires", f"{expires!r} is over")
    return expires


def _row(entry: Entry) -> tuple[str, ...]:
    known_by = entry.uri or f"ent_{entry.token}_***"
    customers = "*" if entry.customers is None else " ".join(entry.customers)
    times = (time or "-" for time in (entry.created, entry.expires, entry.revoked))
    return entry.name, entry.tenant, known_by, " ".join(entry.scopes), customers, *times


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except InvalidArgument as error:
        raise Problem(f"error: {error}") from None
    except OSError as error:
        raise Problem(f"error: {error.filename}: {error.strerror}") from None
