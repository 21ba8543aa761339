"""The gateway's own durable record of what it acknowledges: a local write-ahead journal, one for each gateway."""

from gateway.receipts.journal import Receipts, tend

__all__ = ["Receipts", "tend"]
