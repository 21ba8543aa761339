"""What can be seen from outside: JSON logs on stderr, without secrets, and figures for Prometheus. No figure is
labelled by tenant, customer or key.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from entitlement import build, logs
from entitlement.redaction import Redactor

# grpc's core would write a line of its own for each broken header of a caller. It looks when it is imported: later.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


def configure_logs(level: str, redactor: Redactor | None = None) -> None:
    """See entitlement.logs."""
    logs.configure(level, redactor or Redactor(), sys.stderr)


class Figures:
    """Every figure of ledger_sync, in one registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"entitlement_sync_{name}", text, labels, registry=registry)

        self.records = counter("records", "Journal records settled, by what became of them.", "outcome")
        self.rejected = counter("rejected", "Journal records put into quarantine, by reason.", "reason")
        self.gaps = counter("sequence_gaps", "Holes in the journals of accounts.")
        self.published = counter("published", "Events that a publisher has accepted.")
        self.publish_failures = counter("publish_failures", "Publishes that did not succeed and were tried again.")
        self.webhooks = counter("webhooks", "Webhook deliveries, by what became of an attempt.", "outcome")
        self.restarts = counter("loop_restarts", "Loops that ended with an error and were started again.", "loop")
        self.hangs = counter("loop_hangs", "Loops that did not go round in time and were started again.", "loop")
        self.batch = Histogram(
            "entitlement_sync_batch_seconds",
            "From a batch's first read to its commit.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.age = Histogram(
            "entitlement_sync_settle_seconds",
            "From the decision to the ledger's commit, of each batch's oldest record.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.repairs = counter("patrol_repairs", "Accounts whose drift the patrol has healed.")
        self.drift = Gauge(
            "entitlement_sync_drift_nanos",
            "Hot minus ledger at equal sequence, absolute sum, as each account was seen last.",
            registry=registry,
        )
        self.drifted = Gauge(
            "entitlement_sync_drifted_customers", "Customers whose account drifts, as seen last.", registry=registry
        )
        self.lag = Gauge("entitlement_sync_journal_lag", "Journal records that are not settled.", registry=registry)
        self.oldest = Gauge(
            "entitlement_sync_journal_oldest_seconds",
            "Age of the oldest record that is not settled.",
            registry=registry,
        )
        self.outbox_age = Gauge(
            "entitlement_sync_outbox_oldest_seconds",
            "Age of the oldest event that is not published.",
            registry=registry,
        )
        self.quarantined = Gauge(
            "entitlement_sync_quarantine_open", "Journal records in quarantine that wait for people.", registry=registry
        )
        self.crossings = counter("threshold_crossings", "Crossings of thresholds, up or down, that were settled.")
        self.expired = counter("holds_expired", "Holds whose time was over before they were settled.")
        self.ready = Gauge(
            "entitlement_sync_ready", "1: the component answers this process.", ("component",), registry=registry
        )
        self.webhooks_pending = Gauge(
            "entitlement_sync_webhooks_pending", "Webhook deliveries that wait.", registry=registry
        )
        self.reload_failed = Gauge(
            "entitlement_sync_config_reload_failed",
            "1: the settings were read again and are not sound; the ones before them hold.",
            registry=registry,
        )
        self.lanes = Gauge("entitlement_sync_lanes", "Lanes of the journal that are served here.", registry=registry)
        self.healthy = Gauge(
            "entitlement_sync_loop_healthy", "1: the loop runs, or waits for its turn.", ("loop",), registry=registry
        )
        self.silent = Gauge(
            "entitlement_sync_loop_silent_seconds", "Since the loop last went round.", ("loop",), registry=registry
        )
        self.build = Gauge(build.FIGURE, build.FIGURE_TEXT, ("version",), registry=registry)
        self.build.labels(build.own_version()).set(1)
