"""Structured logs of either process: JSON lines without secrets, on an output that is given."""

from __future__ import annotations

import logging
from typing import TextIO

import structlog

from entitlement.redaction import Redactor

_LEVELS = logging.getLevelNamesMapping()
_least = logging.INFO  # of our own lines


def set_level(level: str) -> None:
    """From now on."""
    global _least
    _least = _LEVELS[level.upper()]
    logging.getLogger().setLevel(max(_least, logging.WARNING))


def _loud_enough(_: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if _LEVELS.get(method.upper(), logging.ERROR) < _least:
        raise structlog.DropEvent
    return event


def configure(level: str, redactor: Redactor, output: TextIO) -> None:
    """What is logged from `level` on, by us or (warnings, at least) by a library, becomes one JSON object a line."""
    set_level(level)
    shared: list[structlog.typing.Processor] = [
        _loud_enough,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last: list[structlog.typing.Processor] = [redactor, structlog.processors.JSONRenderer(default=repr)]
    handler = logging.StreamHandler(output)
    foreign = structlog.stdlib.ProcessorFormatter
    handler.setFormatter(foreign(foreign_pre_chain=shared, processors=[foreign.remove_processors_meta, *last]))
    logging.basicConfig(level=logging.getLogger().level, handlers=[handler], force=True)
    logging.getLogger("grpc").propagate = False  # A trace for each broken call of a caller; what is ours is told by us.
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(output),  # A line in one write: Envoy shares the gateway's output.
        cache_logger_on_first_use=True,
    )
