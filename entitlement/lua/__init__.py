"""The scripts of the hot store. Each is a file; the libraries that it needs are put before it here, once."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

_LIBRARIES = ("integers", "rating", "periods", "account")
_PARTS = {  # of the scripts that are more than one file
    "consume": ("consume", "decide", "commit"),
    "reserve": ("holds", "reserve", "decide", "hold"),
    "settle": ("holds", "settle", "decide", "unhold", "commit"),
    "close": ("holds", "close"),
}


@cache
def script(name: str) -> str:
    """The whole text of a script (`consume`, `install`, `apply_delta`), ready for SCRIPT LOAD."""
    parts = (*_LIBRARIES, *_PARTS.get(name, (name,)))
    return "\n".join(files(__name__).joinpath(f"{part}.lua").read_text() for part in parts)
