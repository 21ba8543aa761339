"""Settings in an environment: the names that begin with a prefix. Pure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import msgspec

from entitlement.errors import InvalidArgument

# What Kubernetes tells every pod of a Service that is called like a prefix of ours.
_SERVICE_LINK = re.compile(
    r"(?:^|_)(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)$"
)


def settings_in(environment: Mapping[str, str], prefix: str) -> dict[str, str]:
    """By name, in lower case and without the prefix."""
    found = {name.removeprefix(prefix): value for name, value in environment.items() if name.startswith(prefix)}
    return {name.lower(): value for name, value in found.items() if not _SERVICE_LINK.search(name)}


def settings_with_file(
    environment: Mapping[str, str], prefix: str, known: Sequence[str], read: Callable[[str], str]
) -> dict[str, object]:
    """The same over those of a TOML file that `file` names, and that `read` gives. InvalidArgument names what is not
    known, and a file that cannot be read.
    """
    given = settings_in(environment, prefix)
    file = given.pop("file", "")
    try:
        values: dict[str, object] = dict(tomllib.loads(read(file))) if file else {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument("file", f"{file!r} cannot be read as TOML: {error}") from None
    values |= given
    for name in values:
        if name not in known:
            raise InvalidArgument(name, f"is not a setting; known are {', '.join(known)}, file")
    return values


Settings = TypeVar("Settings", bound=msgspec.Struct)


def merged(now: Settings, found: Settings, may_change: Collection[str]) -> tuple[Settings, list[str], list[str]]:
    """The settings that hold from now on, when `found` was read while a process runs; the names of those that have
    changed, and of those that would have, but may not before a restart.
    """
    different = [name for name in now.__struct_fields__ if getattr(now, name) != getattr(found, name)]
    changed = [name for name in different if name in may_change]
    taken = {name: getattr(found, name) for name in changed}
    return msgspec.structs.replace(now, **taken), changed, [name for name in different if name not in may_change]
