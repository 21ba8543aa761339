"""How the command line prints: plain tables, amounts as decimals, and a progress bar for what takes its time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import Protocol

import click
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from entitlement.quantity import format_amount

PATIENCE_S = 2.0  # what takes longer shows a bar


class Advance(Protocol):
    def __call__(self, steps: int = 1) -> None: ...


def line(text: str = "") -> None:
    click.echo(text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns whose name starts with '>' are set to the right."""
    names = [name.removeprefix(">") for name in columns]
    cells = [names, *rows]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    for number, row in enumerate(cells):
        aligned = (
            cell.rjust(width) if name.startswith(">") else cell.ljust(width)
            for cell, width, name in zip(row, widths, columns, strict=True)
        )
        text = "  ".join(aligned).rstrip()
        line(click.style(text, bold=True) if number == 0 else text)


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and what they are, one a line."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        first, *more = value.splitlines() or [""]
        line(f"{name:<{width}}  {first}".rstrip())
        for text in more:
            line(f"{'':<{width}}  {text}")


def money(nanos: int, credit_type: str) -> str:
    return f"{format_amount(nanos)} {credit_type}".rstrip()


def moment(time: Timestamp) -> str:
    """RFC 3339 in UTC; '-' where there is none."""
    return time.ToJsonString() if time.seconds or time.nanos else "-"


def dimensions(pairs: Iterable[tuple[str, str]]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(pairs))


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Advance]:
    """Counts steps; on a terminal, shows a bar once it has taken longer than two seconds."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=total is None),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(label, total=total)
    patience = Timer(PATIENCE_S, bar.start)
    patience.daemon = True
    if console.is_terminal:
        patience.start()

    def advance(steps: int = 1) -> None:
        bar.advance(task, steps)

    try:
        yield advance
    finally:
        patience.cancel()
        if patience.is_alive():
            patience.join()
        if bar.live.is_started:
            bar.stop()
