"""Scripts of ledger_sync alone; what both processes run lies in entitlement.lua."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from entitlement import lua


@cache
def script(name: str) -> str:
    """The whole text of a script, ready for SCRIPT LOAD."""
    return files(__name__).joinpath(f"{name}.lua").read_text()


def until(name: str) -> str:
    """A script of ours, with the time after which it does nothing as its last argument."""
    return script("until") + script(name)


@cache
def install() -> str:
    """install.lua, with the time after which it does nothing as its last argument."""
    return script("until") + lua.script("install")
