"""`entitlement top`: who spends what, now."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from time import monotonic, time
from typing import Final

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from entitlement.quantity import format_amount
from gateway.cli import follow, probes, scrape, show
from gateway.cli.options import admin_option, metrics_option, redis_option
from gateway.cli.window import OTHERS, Window
from gateway.settings import Settings

LOOK_S: Final = 2.0  # between two questions to ledger_sync and to the metrics
ASK_S: Final = 2.0  # of one; so long Ctrl-C may take
_NO_DENIALS: Final = "denials are not in the journal: --metrics URL of the gateway tells of them, and of latency"


class Beside(msgspec.Struct):
    """What is not in the journal; None where it is not known."""

    lag: int | None = None
    drift_nanos: int | None = None
    quarantined: int | None = None
    first: scrape.Scrape | None = None
    metrics: scrape.Change | None = None


@click.command("top")
@click.option(
    "--window", type=click.IntRange(1, 600), default=60, show_default=True, help="Seconds that are summed up."
)
@click.option("--customers", type=click.IntRange(1, 100), default=10, show_default=True, help="How many are shown.")
@metrics_option
@click.option("--once", is_flag=True, help="Look for one window, print it and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: one JSON object.")
@admin_option
@redis_option
def top_command(window: int, customers: int, metrics: str, once: bool, as_json: bool, admin: str, redis: str) -> None:
    """Decisions a second, lag and drift, and who spends most, until Ctrl-C.

    From the journal in the hot store, whose settings are the gateway's, and from ledger_sync.
    """
    if as_json and not once:
        raise click.UsageError("--json needs --once.")
    top = _Top(Window(window), customers, metrics, admin)
    settings = follow.load(redis)

    async def once_only() -> None:
        await top.follow(settings, window)
        show.line(json.dumps(top.as_json())) if as_json else Console().print(top.screen())

    async def for_ever() -> None:
        with Live(top.screen(), auto_refresh=False) as live:
            await top.follow(settings, None, live)

    follow.run(once_only if once else for_ever)


class _Top:
    def __init__(self, window: Window, most: int, metrics: str, admin: str) -> None:
        self._window = window
        self._most = most
        self._metrics = metrics
        self._admin = admin
        self._beside = Beside()
        self._missed = 0
        self._began = monotonic()

    async def follow(self, settings: Settings, for_s: int | None, live: Live | None = None) -> None:
        """For so many seconds; None: until it is cancelled."""
        looking = asyncio.create_task(self._look(LOOK_S))
        try:
            async with aclosing(follow.batches(settings, 0)) as found:
                async for batch, tail in found:
                    for told in batch:
                        self._window.add(told)
                    self._missed = tail.missed
                    if for_s is not None and monotonic() - self._began >= for_s:
                        return await asyncio.to_thread(self._ask)
                    self._window.move(int(time() * 1_000))
                    if live:
                        live.update(self.screen(), refresh=True)
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _look(self, every_s: float) -> None:
        while True:
            await asyncio.to_thread(self._ask)
            await asyncio.sleep(every_s)

    def _ask(self) -> None:
        beside = self._beside
        _, figures = probes.sync(self._admin, ASK_S)
        beside.lag = probes.known(figures, "journal_lag")
        beside.quarantined = probes.known(figures, "quarantined")
        beside.drift_nanos = probes.known(figures, "drift_nanos")
        if self._metrics and (now := scrape.fetch(self._metrics)):
            beside.first = beside.first or now
            beside.metrics = scrape.change(beside.first, now)

    @property
    def _seconds(self) -> float:
        return max(1.0, min(self._window.seconds, monotonic() - self._began))

    def as_json(self) -> dict[str, object]:
        verdicts = self._window.verdicts
        return {
            "window_s": self._window.seconds,
            "decisions": sum(verdicts.values()),
            "decisions_per_s": round(sum(verdicts.values()) / self._seconds, 1),
            "verdicts": dict(verdicts),
            "customers": [msgspec.to_builtins(spender) for spender in self._window.spenders(self._most)],
            "missed": self._missed,
            "journal_lag": self._beside.lag,
            "drift_nanos": self._beside.drift_nanos,
            "quarantined": self._beside.quarantined,
            "metrics": msgspec.to_builtins(self._beside.metrics),
        }

    def screen(self) -> Group:
        verdicts = self._window.verdicts
        rates = "  ".join(f"{name} {count / self._seconds:,.1f}/s" for name, count in sorted(verdicts.items()))
        beside = self._beside
        lag, drift, kept = (_known(value) for value in (beside.lag, beside.drift_nanos, beside.quarantined))
        lines = [
            Text(f"decisions {sum(verdicts.values()) / self._seconds:,.1f}/s in {self._seconds:,.0f} s   {rates}"),
            Text(f"lag {lag}   drift {drift} nanos   quarantine {kept}   missed {self._missed:,}"),
            Text(self._measured(), style="dim"),
        ]
        return Group(*lines, self._table())

    def _measured(self) -> str:
        found = self._beside.metrics
        if found is None:
            return "the metrics do not answer" if self._metrics else _NO_DENIALS
        p50, p99 = ("-" if value is None else f"{value:,.1f}" for value in (found.p50_ms, found.p99_ms))
        denials = "  ".join(f"{reason} {count:,}" for reason, count in sorted(found.denials.items())) or "none"
        return f"since the start: denied {denials}   latency p50 {p50} ms  p99 {p99} ms"

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("customer")
        for name in ("spent", "decisions/s"):
            table.add_column(name, justify="right")
        for spender in self._window.spenders(self._most):
            name = spender.customer if spender.customer != OTHERS else "(others)"
            spent = f"{format_amount(spender.spent_nanos)} {spender.credit_type}".rstrip()
            table.add_row(Text(name), spent, f"{spender.decisions / self._seconds:,.1f}")
        return table


def _known(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
