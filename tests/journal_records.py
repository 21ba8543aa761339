"""Journal records and the ledger rows that they need, as tests want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from entitlement import journal, keys
from entitlement.account import Config
from entitlement.journal import Adjusted, Burn, BurnedLine, Consumed, Crossing, Rolled
from entitlement.v1.gateway_pb2 import CheckAndConsumeRequest
from ledger_sync.posting import Arrival, Posted, read

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

TENANT = "acme"
NOW_MS = 1_767_323_045_678  # 2026-01-02T03:04:05.678Z
PERIOD_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z
GRANT = 1_000_000  # nanos in each grant of `open_account`
STREAM = "j:{7}"

Line = tuple[str, int, int, dict[int, int]]  # feature, quantity, amount, burns: grant number (0 = overage) -> nanos


def request(key: str, customer: str = "ada", lines: Sequence[Line] = (), subject: str = "", model: str = "m1") -> bytes:
    message = CheckAndConsumeRequest(idempotency_key=key, customer=customer, subject=subject)
    for feature, quantity, _, _ in lines:
        message.usage.add(feature=feature, quantity=quantity).dimensions["model"] = model
    return message.SerializeToString(deterministic=True)


def consumed(
    key: str,
    sequence: int,
    *lines: Line,
    customer: str = "ada",
    tenant: str = TENANT,
    epoch: int = 1,
    version: int = 1,
    period: int = PERIOD_MS,
    cycle: int = PERIOD_MS,
    crossings: Sequence[Crossing] = (),
    settled: int = 0,
    allowance: int = GRANT,
    subject: str = "",
    payload: bytes = b"",
    event_ms: int = 0,
) -> Consumed:
    """A consumption: by default 10 units for 100 nanos from grant 1."""
    lines = lines or (("input.tokens", 10, 100, {1: 100}),)
    return Consumed(
        tenant=tenant,
        customer=customer,
        epoch=epoch,
        sequence=sequence,
        version=version,
        recorded_ms=NOW_MS + sequence,
        event_ms=event_ms or NOW_MS + sequence,
        period_start=period,
        verdict=1,
        shadow=False,
        credit_type="USD",
        plan="llm",
        rate_version="3",
        lines=tuple(
            BurnedLine(f"{feature},model=m1", quantity, amount, tuple(Burn(no, nanos) for no, nanos in burns.items()))
            for feature, quantity, amount, burns in lines
        ),
        crossings=tuple(crossings),
        settled=settled,
        allowance=allowance,
        cycle_start=cycle,
        request=payload or request(key, customer, lines, subject),
    )


def rolled(sequence: int, *, start: int, end: int = 0, closed: int = 0, allowance: int = 0, epoch: int = 1) -> Rolled:
    return Rolled(
        tenant=TENANT,
        customer="ada",
        epoch=epoch,
        sequence=sequence,
        version=1,
        recorded_ms=NOW_MS + sequence,
        period_start=start,
        period_end=end,
        closed_overage=closed,
        allowance=allowance,
    )


def adjusted(
    sequence: int,
    version: int,
    *,
    removed: dict[int, int] | None = None,
    reclassed: dict[int, int] | None = None,
    repaid: dict[int, int] | None = None,
    crossings: Sequence[Crossing] = (),
    epoch: int = 1,
) -> Adjusted:
    def burns(given: dict[int, int] | None) -> tuple[Burn, ...]:
        return tuple(Burn(no, nanos) for no, nanos in (given or {}).items())

    return Adjusted(
        tenant=TENANT,
        customer="ada",
        epoch=epoch,
        sequence=sequence,
        version=version,
        recorded_ms=NOW_MS + sequence,
        settled_adjustment=0,
        overage_adjustment=0,
        removed=burns(removed),
        reclassed=burns(reclassed),
        repaid=burns(repaid),
        crossings=tuple(crossings),
        settled=0,
        allowance=GRANT,
        cycle_start=PERIOD_MS,
    )


def arrival(record: journal.Record | bytes, entry_id: str = "1-1", stream: str = STREAM) -> Arrival:
    data = record if isinstance(record, bytes) else journal.encode(record)
    return Arrival(stream, entry_id.encode(), data)


def posted(record: journal.Record, entry_id: str = "") -> Posted:
    found = read(arrival(record, entry_id or f"{record.epoch}-{record.sequence}"))
    assert isinstance(found, Posted), found
    return found


async def open_account(
    connection: Connection, customer: str = "ada", *, tenant: str = TENANT, grants: int = 2, epoch: int = 1
) -> list[int]:
    """A customer with a hot account of `epoch` and grants '<customer>-1', ... Returns their numbers."""
    partition = keys.partition_of(tenant, customer)
    await connection.execute(
        "INSERT INTO customers (tenant, id, name, status) VALUES ($1, $2, $2, 1)", tenant, customer
    )
    await connection.execute(
        """INSERT INTO accounts
               (tenant, customer, partition, credit_type, config, epoch, version, applied, period_start)
           VALUES ($1, $2, $3, 'USD', $4, $5, 1, 1, $6)""",
        *(tenant, customer, partition, Config(plan="llm", credit_type="USD").encode(), epoch, PERIOD_MS),
    )
    numbers = []
    for count in range(1, grants + 1):
        number: int = await connection.fetchval(
            """INSERT INTO grants (tenant, id, customer, amount, category, priority, effective_ms, expires_ms, features,
                                   note, created_ms)
               VALUES ($1, $2, $3, $4, 1, 0, 0, 0, '{}', '', 0) RETURNING no""",
            *(tenant, f"{customer}-{count}", customer, GRANT),
        )
        await connection.execute("INSERT INTO grant_balances VALUES ($1, $2)", number, GRANT)
        numbers.append(number)
    return numbers
