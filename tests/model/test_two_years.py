"""Two years of many customers on a virtual clock: nothing is lost and nothing invented, to the nano, for any of them.

TWO_YEARS_CUSTOMERS sets how many there are. Everything that may be done is done to any number of them: it is asserted.
"""

from __future__ import annotations

import os
from time import monotonic

import pytest

from entitlement.periods import DAY
from tests.model.conserved import check
from tests.model.life import START, Life
from tests.virtual_clock import clocked_rig

CUSTOMERS = int(os.environ.get("TWO_YEARS_CUSTOMERS", "20"))
DAYS = int(os.environ.get("TWO_YEARS_DAYS", "731"))
QUARTER = 91 * DAY
KINDS = {"consume", "grant", "rollover", "expire", "void", "repay", "close", "commit", "reverse", "rebook"}
DONE = {
    *("grant", "recurring", "void", "contract", "end", "successor", "suspend", "limit", "drop", "record", "replay"),
    *("backfill", "revert", "price", "rerate", "void_invoice", "NORMAL ALLOW", "NORMAL DENY", "BEST_EFFORT ALLOW"),
    *("BEST_EFFORT ALLOW_WITH_CAPS", "CHECK_ONLY ALLOW", "ADJUST_ONLY ALLOW"),
}


@pytest.mark.slow
@pytest.mark.timeout(3_600)
async def test_two_years_conserve_every_nano(
    monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str, seed: int
) -> None:
    began = monotonic()
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, START) as (rig, clock):
        life = Life(rig, clock, seed, CUSTOMERS)
        await life.begin()
        checked = START
        while clock.now_ms < START + DAYS * DAY:
            await life.step()
            if clock.now_ms >= checked + QUARTER:
                checked = clock.now_ms
                await check(life)
        await check(life)
        booked = {row["kind"] for row in await rig.rows("SELECT DISTINCT kind FROM transactions")}
        topped_up = await rig.value("SELECT count(*) FROM top_ups")
    print(f"{CUSTOMERS} customers in {monotonic() - began:.0f} s: {dict(life.done)}; refused {dict(life.refused)}")
    assert booked >= KINDS and topped_up, booked  # It was a life.
    assert life.done.keys() >= DONE, life.done
