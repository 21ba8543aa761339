"""`python -m tests.next_version gateway|ledger_sync …`: this program as its next minor version may be.

See docs/upgrades.md. Journal entries and receipts have one more field, scripts are others, and there is one more
migration, which works with the program of today.
"""

from __future__ import annotations

import runpy
import sys
from functools import cache

from entitlement import lua, receipt

FIELD = b"n"  # of a journal entry
COLUMN = "of_the_next_version"  # of the table accounts

_this_script, _these_prices = lua.script, receipt.prices


@cache
def _script(name: str) -> str:
    text = _this_script(name)
    assert text.count("crossings) .. body)") == 1, "where a record is written has changed"
    return text.replace("crossings) .. body)", f"crossings) .. body, '{FIELD.decode()}', '2')")


def _patch_migrations() -> None:
    from ledger_sync import migrations

    these = migrations.available()
    last = these[-1].number
    sql = f"-- works with {last:03d}\nALTER TABLE accounts ADD COLUMN {COLUMN} text;\n"
    migrations.available = lambda: [*these, migrations.Migration(last + 1, "next", sql)]


if __name__ == "__main__":
    lua.script = _script  # type: ignore[assignment]
    receipt.prices = lambda charge: _these_prices(charge) + receipt.LATER + b"of the next version"
    if (program := sys.argv.pop(1)) == "ledger_sync":
        _patch_migrations()
    runpy.run_module(program, run_name="__main__", alter_sys=True)
