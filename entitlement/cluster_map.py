"""Which primary of a cluster has which slots, as CLUSTER SLOTS tells it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from entitlement.errors import Unavailable
from entitlement.keys import SLOTS

Place = tuple[str, int]  # host and port


class Span(msgspec.Struct, frozen=True):
    """Slots from `first` to `last`, and the primary that has them."""

    first: int
    last: int
    place: Place


def read_map(reply: object, asked: str) -> tuple[Span, ...]:
    """`asked`: the host that was asked; a node that does not know its own name means it. Raises Unavailable."""
    try:
        spans = tuple(_spans(reply, asked))
    except (TypeError, ValueError, IndexError):
        raise Unavailable("hot store: CLUSTER SLOTS answered something else") from None
    covered = sum(span.last - span.first + 1 for span in spans)
    if covered != SLOTS:
        raise Unavailable(f"hot store: {SLOTS - covered} slots of the cluster have no primary")
    return spans


def _spans(reply: object, asked: str) -> Iterator[Span]:
    if not isinstance(reply, list):
        raise TypeError
    for first, last, primary, *_ in reply:
        yield Span(int(first), int(last), (_host(primary[0], asked), int(primary[1])))


def _host(found: object, asked: str) -> str:
    text = found.decode() if isinstance(found, bytes) else str(found or "")
    return asked if text in ("", "?") else text


def pointed_to(error: str, asked: str) -> Place:
    """Where an answer 'MOVED slot host:port' or 'ASK slot host:port' points. Raises Unavailable."""
    host, _, port = error.split(" ")[-1].rpartition(":")
    if not port.isascii() or not port.isdigit():
        raise Unavailable("hot store: a node of the cluster points nowhere")
    return _host(host, asked), int(port)
