"""Structured logs: JSON lines on stderr. Nothing is logged for a decision that succeeds."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str) -> None:
    """Sends structlog's events of at least `level` to stderr, one JSON object a line."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # A line in one write: Envoy shares our output.
        cache_logger_on_first_use=True,
    )
