"""What every publisher promises. The outbox knows this and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One committed event, ready to leave."""

    id: str  # CloudEvents id: stable, consumers drop repeats by it. Unique within its source.
    tenant: str
    type: str  # "entitlement.rated.v1", "entitlement.threshold.crossed.v1", …
    customer: str  # CloudEvents subject and partitionkey.
    body: bytes  # The whole CloudEvents 1.0 JSON envelope, one line, built once at posting and never rebuilt.


class PublishFailed(Exception):
    """The target did not accept every event. Publish the same events again, in the same order, until it does."""

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(f"cannot publish to {target}: {reason}")
        self.target = target  # Without secrets.
        self.reason = reason


class Publisher(Protocol):
    """Carries events out, at least once and in order per customer. One caller: `publish` is not called concurrently."""

    async def start(self) -> None:
        """Makes ready. A server that is away is no error yet: `publish` says so, and finds it when it is back."""

    async def publish(self, events: Sequence[Outgoing]) -> None:
        """Returns only when the target has durably accepted every event; what durable means is each target's own word.

        PublishFailed otherwise, within the deadline: some events may have been accepted, but of each customer only the
        first ones, so that publishing all of them again repeats ids and never reorders them. Cancelled: the same.
        """

    async def stop(self) -> None:
        """Lets go of everything. Survives a double stop, and a stop before the start."""


class Discard:
    """Accepts and forgets. For benchmarks; chosen only by name."""

    async def start(self) -> None: ...

    async def publish(self, events: Sequence[Outgoing]) -> None: ...

    async def stop(self) -> None: ...
