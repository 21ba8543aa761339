"""Tells a webhook what has happened: one signed POST for each event, at least once, as Standard Webhooks would have it
(https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md).

Deliveries are rows that the event's own transaction has written (`announcements.queue_webhooks`). They go oldest first,
several at once: in order for a customer as a rule, but not always, for what failed comes later. The time here is the
database's real clock and not the ledger's, which may be simulated: receivers compare timestamps with their own.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import ssl
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

import httpx
import msgspec
import structlog
from standardwebhooks import Webhook

from entitlement.errors import InvalidArgument
from ledger_sync.announcements import TYPES
from ledger_sync.beat import Beat, cancelled
from ledger_sync.settings import Settings
from ledger_sync.telemetry import Figures
from ledger_sync.worker import uninterrupted

if TYPE_CHECKING:
    from ledger_sync.ledger import Lease, Ledger

LEASE: Final = "webhooks"
ENDPOINT: Final = "default"
MAX_IN_FLIGHT: Final = 32
MAX_ANSWER_BYTES: Final = 64 * 1024  # of a response's body, which is read only so that the connection can be kept
POLL_S: Final = 0.5  # what has become due is sent no later
COUNT_S: Final = 5.0
SECRET_PREFIX: Final = "whsec_"  # noqa: S105  How a secret begins.
SECRET_BYTES: Final = (24, 64)
MAX_SECRET_FILE: Final = 1_024
# Between one failed attempt and the next; after the last of them a delivery is dead.
SCHEDULE_S: Final = (*(5, 5 * 60, 30 * 60), *(hours * 3_600 for hours in (2, 5, 10, 14, 20, 24)))
JITTER: Final = 0.1  # of a pause, less or more: what failed together does not come back together
GONE: Final = 410

_PLAN: Final = "SET LOCAL enable_seqscan = off"  # The table is small when a plan is made, and may be large later.

_DUE: Final = """
SELECT id, event_id, body, attempts, now() FROM webhook_deliveries
WHERE failed_at IS NULL AND next_at <= now() AND endpoint = $1 AND id <> ALL($2::bigint[])
ORDER BY next_at, id LIMIT $3"""

_TAKEN: Final = "DELETE FROM webhook_deliveries WHERE id = $1"

_AGAIN: Final = """
UPDATE webhook_deliveries
SET attempts = $2, error = $3, next_at = clock_timestamp() + $4::bigint * interval '1 millisecond' WHERE id = $1"""

_DEAD: Final = """
UPDATE webhook_deliveries SET attempts = $2, error = $3, failed_at = clock_timestamp() WHERE id = $1"""

log = structlog.get_logger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # It would log whole addresses, and a query may hold a secret.


class Target(msgspec.Struct, frozen=True):
    """Where webhooks go, how they are signed, and of which types they are."""

    url: httpx.URL
    signer: Webhook
    types: tuple[str, ...]
    timeout_s: float

    def __repr__(self) -> str:
        """Without what may hold a secret."""
        return f"Target({self.url.scheme}://***@{self.url.host}, types={self.types!r})"


class Delivery(msgspec.Struct, frozen=True):
    """One event that is due to be told. `now` is when that was found."""

    id: int
    event_id: str
    body: bytes
    attempts: int
    now: datetime


class Answer(msgspec.Struct, frozen=True):
    """What became of an attempt: a status, or the reason for which none came."""

    status: int = 0
    failure: str = ""

    @property
    def taken(self) -> bool:
        return 200 <= self.status < 300

    def __str__(self) -> str:
        return self.failure or f"status {self.status}"


def target_of(settings: Settings) -> Target | None:
    """None: nobody is to be told. InvalidArgument: the secret is not one, or its file cannot be read."""
    if not settings.webhook_url:
        return None
    try:
        url = httpx.URL(settings.webhook_url)
    except httpx.InvalidURL:
        raise InvalidArgument("webhook_url", "is not a URL") from None
    types = settings.told or TYPES
    return Target(url, Webhook(_key(settings)), types, settings.webhook_timeout_ms / 1000)


def _key(settings: Settings) -> bytes:
    field, text = "webhook_secret", settings.webhook_secret
    if settings.webhook_secret_file:
        field, text = "webhook_secret_file", _read(settings.webhook_secret_file)
    low, high = SECRET_BYTES
    problem = f"is not a secret of Standard Webhooks: {SECRET_PREFIX} and {low} to {high} bytes in base64"
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(field, problem) from None
    if not text.startswith(SECRET_PREFIX) or not low <= len(key) <= high:
        raise InvalidArgument(field, problem)
    return key


def _read(file: str) -> str:
    try:
        with Path(file).open(encoding="ascii") as opened:
            return opened.read(MAX_SECRET_FILE).strip()
    except OSError as error:
        raise InvalidArgument("webhook_secret_file", f"{file!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidArgument("webhook_secret_file", f"{file!r} is not ASCII text") from None


async def declare(ledger: Ledger, target: Target | None) -> None:
    """From now on the ledger queues what the target wants to be told; without one, nothing. What was queued stays."""
    async with ledger.transaction() as connection:
        if target is None:
            await connection.execute("DELETE FROM webhook_endpoints WHERE name = $1", ENDPOINT)
        else:
            await connection.execute(
                """INSERT INTO webhook_endpoints (name, types) VALUES ($1, $2)
                   ON CONFLICT (name) DO UPDATE SET types = excluded.types""",
                *(ENDPOINT, list(target.types)),
            )


def pause_s(failures: int, random: Random) -> float | None:
    """How long after the n-th failed attempt the next one is made; None: never."""
    if failures > len(SCHEDULE_S):
        return None
    return SCHEDULE_S[failures - 1] * (1 + JITTER * (2 * random.random() - 1))


class Webhooks:
    """The one sender of a deployment, by lease: a second one waits. `wake` it when something may have become due."""

    def __init__(
        self, ledger: Ledger, target: Target, *, figures: Figures, random: Random, poll_s: float = POLL_S
    ) -> None:
        self._ledger = ledger
        self._target = target
        self._figures = figures
        self._random = random
        self._poll_s = poll_s
        self._changed = asyncio.Event()
        self._in_flight: set[int] = set()
        self._beat = Beat()
        self._count_beat = Beat()

    @property
    def beats(self) -> Mapping[str, Beat]:
        return {"": self._beat, "count": self._count_beat}

    def wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Until it is cancelled. Raises when the database is away. What is cut short is sent again, by the same id."""
        with self._beat:
            async with self._ledger.lease(LEASE, self._beat) as lease, _client() as client:
                await self._run(lease, client)

    async def _run(self, lease: Lease, client: httpx.AsyncClient) -> None:
        async with asyncio.TaskGroup() as group:
            self._in_flight.clear()
            group.create_task(self._count())
            while True:
                self._beat()
                lease.check()
                self._changed.clear()
                for delivery in await self._due():
                    self._in_flight.add(delivery.id)
                    group.create_task(self._deliver(client, delivery))
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._changed.wait()

    async def _due(self) -> list[Delivery]:
        """As many as may be in flight beside those that are."""
        room = MAX_IN_FLIGHT - len(self._in_flight)
        if not room:
            return []
        async with self._ledger.transaction(readonly=True) as connection:
            await connection.execute(_PLAN)
            rows = await connection.fetch(_DUE, ENDPOINT, sorted(self._in_flight), room)
        return [Delivery(*row) for row in rows]

    async def _deliver(self, client: httpx.AsyncClient, delivery: Delivery) -> None:
        try:
            answer = await self._post(client, delivery)
            await uninterrupted(self._record(delivery, answer))
        finally:
            self._in_flight.discard(delivery.id)
            self.wake()

    async def _post(self, client: httpx.AsyncClient, delivery: Delivery) -> Answer:
        target, status = self._target, 0
        headers = {
            "content-type": "application/cloudevents+json",
            "webhook-id": delivery.event_id,
            "webhook-timestamp": str(int(delivery.now.timestamp())),
            "webhook-signature": target.signer.sign(delivery.event_id, delivery.now, delivery.body.decode()),
        }
        try:
            async with (
                asyncio.timeout(target.timeout_s),
                client.stream("POST", target.url, content=delivery.body, headers=headers) as response,
            ):
                status = response.status_code
                await _pass_over(response)
        except (TimeoutError, httpx.HTTPError) as error:
            if not status:  # A status says what became of it, however its body ends.
                return Answer(failure=type(error).__name__)
        return Answer(status)

    async def _record(self, delivery: Delivery, answer: Answer) -> None:
        attempts = delivery.attempts + 1
        pause = None if answer.status == GONE else pause_s(attempts, self._random)
        async with self._ledger.transaction() as connection:
            if answer.taken:
                await connection.execute(_TAKEN, delivery.id)
            elif pause is None:
                await connection.execute(_DEAD, delivery.id, attempts, str(answer))
            else:
                await connection.execute(_AGAIN, delivery.id, attempts, str(answer), int(pause * 1000))
        outcome = "delivered" if answer.taken else "dead" if pause is None else "failed"
        self._figures.webhooks.labels(outcome).inc()
        if not answer.taken:
            log.warning(f"webhook_{outcome}", delivery=delivery.id, attempts=attempts, error=str(answer))

    async def _count(self) -> None:
        """Keeps the figure of what waits."""
        with self._count_beat:
            while not cancelled():
                self._count_beat()
                async with self._ledger.transaction(readonly=True) as connection:
                    pending: int = await connection.fetchval(
                        "SELECT count(*) FROM webhook_deliveries WHERE failed_at IS NULL"
                    )
                self._figures.webhooks_pending.set(pending)
                await asyncio.sleep(COUNT_S)


def _client() -> httpx.AsyncClient:
    """Nothing of the environment but the authorities that the system trusts: no proxy, no .netrc."""
    return httpx.AsyncClient(
        verify=ssl.create_default_context(),
        timeout=None,  # noqa: S113  One deadline bounds the whole attempt.
        trust_env=False,
        follow_redirects=False,
        headers={"user-agent": "entitlement-gateway"},
        limits=httpx.Limits(max_connections=MAX_IN_FLIGHT, max_keepalive_connections=MAX_IN_FLIGHT),
    )


async def _pass_over(response: httpx.Response) -> None:
    size = 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            return
