"""Structured logs: JSON lines on stderr, without secrets. Nothing is logged for a decision that succeeds."""

from __future__ import annotations

import os
import sys

from entitlement import logs
from entitlement.redaction import Redactor

# grpc's core would write a line of its own for each broken header of a caller. It looks when it is imported: later.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def configure(level: str, redactor: Redactor | None = None) -> None:
    """See entitlement.logs."""
    logs.configure(level, redactor or Redactor(), sys.stderr)
