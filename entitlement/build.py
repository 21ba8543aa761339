"""Which version of this program runs."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

FIGURE: Final = "entitlement_build_info"
FIGURE_TEXT: Final = "1, and the version that runs."


@cache
def own_version() -> str:
    """Empty where it runs from a folder and is not installed."""
    try:
        return version("entitlement-gateway")
    except PackageNotFoundError:
        return ""
