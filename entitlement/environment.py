"""Settings in an environment: the names that begin with a prefix. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

# What Kubernetes tells every pod of a Service that is called like a prefix of ours.
_SERVICE_LINK = re.compile(
    r"(?:^|_)(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)$"
)


def settings_in(environment: Mapping[str, str], prefix: str) -> dict[str, str]:
    """By name, in lower case and without the prefix."""
    found = {name.removeprefix(prefix): value for name, value in environment.items() if name.startswith(prefix)}
    return {name.lower(): value for name, value in found.items() if not _SERVICE_LINK.search(name)}
