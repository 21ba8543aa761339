"""Parts that are installed only where somebody asked for them."""

from __future__ import annotations

from importlib.util import find_spec

from entitlement.errors import InvalidArgument


def need(setting: str, module: str, extra: str) -> None:
    """Raises InvalidArgument, which says what to install, when a setting asks for what is not there."""
    try:
        there = find_spec(module) is not None
    except ModuleNotFoundError:  # Not even the package that it would be in.
        there = False
    if not there:
        raise InvalidArgument(
            setting, f"needs {module}, which is not installed: pip install 'entitlement-gateway[{extra}]'"
        )
