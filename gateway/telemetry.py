"""Structured logs: JSON lines on stderr, without secrets. Nothing is logged for a decision that succeeds."""

from __future__ import annotations

import logging
import os
import sys

import structlog

from entitlement.redaction import Redactor

# grpc's core would write a line of its own for each broken header of a caller. It looks when it is imported: later.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def configure(level: str, redactor: Redactor | None = None) -> None:
    """Everything that is logged from `level` on, by us or (warnings, at least) by a library, is one JSON object a line
    on stderr.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    redact = redactor or Redactor()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last: list[structlog.typing.Processor] = [redact, structlog.processors.JSONRenderer(default=repr)]
    handler = logging.StreamHandler(sys.stderr)
    foreign = structlog.stdlib.ProcessorFormatter
    handler.setFormatter(foreign(foreign_pre_chain=shared, processors=[foreign.remove_processors_meta, *last]))
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("grpc").propagate = False  # A trace for each broken call of a caller; what is ours is told by us.
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # A line in one write: Envoy shares our output.
        cache_logger_on_first_use=True,
    )
