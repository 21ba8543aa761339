"""`entitlement tail`: decisions as they happen."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import aclosing

import click
import msgspec

from gateway.cli import follow, show
from gateway.cli.decisions import VERDICTS, Told, matches, stamp
from gateway.cli.options import redis_option

_NOTE = "denials are not in the journal: only what changed an account is. The gateway's metrics count denials."


@click.command("tail")
@click.option("--customer", default="", help="Of this customer only.")
@click.option("--feature", default="", help="With this feature only.")
@click.option("--verdict", "verdicts", type=click.Choice(VERDICTS), multiple=True, help="May be given several times.")
@click.option("--since", type=follow.Since(), default=0, help="15m, 2h or a time: as far as the journal still has it.")
@click.option("--limit", type=click.IntRange(1), help="End after so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@redis_option
def tail_command(
    customer: str, feature: str, verdicts: Sequence[str], since: int, limit: int | None, as_json: bool, redis: str
) -> None:
    """Decisions as they happen, until Ctrl-C: what was granted, held, settled and released.

    They are read from the journal in the hot store, which has what changed an account: no denials. It is no archive
    either: an entry goes soon after the ledger has it (entitlement explain KEY tells of those).
    """
    settings = follow.load(redis)

    async def read() -> None:
        left = limit
        missed = 0
        async with aclosing(follow.batches(settings, since)) as found:
            async for batch, tail in found:
                for told in [told for told in batch if matches(told, customer, feature, verdicts)][:left]:
                    _print(told, as_json)
                    left = left - 1 if left is not None else None
                sys.stdout.flush()
                if tail.missed > missed:
                    click.echo(f"missed {tail.missed - missed} records: they were gone before they were read", err=True)
                    missed = tail.missed
                if left == 0:
                    return

    if sys.stderr.isatty():
        click.echo(_NOTE, err=True)
    follow.run(read)


def _print(told: Told, as_json: bool) -> None:
    show.line(json.dumps({"time": stamp(told.at_ms)} | msgspec.to_builtins(told)) if as_json else told.line)
