"""Who a call of LedgerAdmin comes from: what the audit log says of it, wherever in the call it is written."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final
from urllib.parse import unquote

import msgspec

from ledger_sync.translate import check_text

UNKNOWN: Final = "unknown"
MAX_ACTOR_BYTES: Final = 128


class Caller(msgspec.Struct, frozen=True):
    """`name`: of its identity; empty for one who needed none. `source`: where the call came from."""

    name: str = ""
    source: str = ""


_NOBODY: Final = Caller()
current: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)


def source() -> str:
    """Where the call in hand came from; empty for what ledger_sync does by itself."""
    return current.get().source


def actor(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The actor of the call in hand: its identity and, by its `x-actor`, for whom it says that it acts.

    InvalidArgument: that is no text for an audit log.
    """
    said = next((value for name, value in metadata if name == "x-actor" and isinstance(value, str)), "")
    check_text("x-actor", said, MAX_ACTOR_BYTES)
    name = current.get().name
    return _cut(f"{name}, for {said}") if name and said else name or said or UNKNOWN


def source_of(peer: str) -> str:
    """'unix', or the address of a gRPC peer: host:port."""
    kind, _, rest = peer.partition(":")
    return "unix" if kind == "unix" else unquote(rest) if kind in ("ipv4", "ipv6") else UNKNOWN


def _cut(text: str) -> str:
    """To whole characters within the bound."""
    return text.encode()[:MAX_ACTOR_BYTES].decode(errors="ignore")
