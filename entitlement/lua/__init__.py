"""The scripts of the hot store. Each is a file; the libraries that it needs are put before it here, once."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

_LIBRARIES = ("integers", "rating", "periods", "account")


@cache
def script(name: str) -> str:
    """The whole text of a script (`consume`, `install`, `apply_delta`), ready for SCRIPT LOAD."""
    return "\n".join(files(__name__).joinpath(f"{part}.lua").read_text() for part in (*_LIBRARIES, name))
