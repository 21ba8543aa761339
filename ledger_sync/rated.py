"""The events that a record publishes: the rated event, and threshold crossings. Pure.

The rated event is written on the hot path of the drain, so its bytes are put together here directly, equal to what
`cloudevents.envelope` makes of the same values (a test compares them). Nothing in it needs escaping: ids, names and
values have been checked against entitlement.identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Final

from entitlement.journal import OVERAGE, Adjusted, Consumed
from ledger_sync.cloudevents import Int32, envelope, source_of
from ledger_sync.posting import Posted, delta_key, timestamp

RATED: Final = "entitlement.rated.v1"
CROSSED: Final = "entitlement.threshold.crossed.v1"
RECOVERED: Final = "entitlement.threshold.recovered.v1"

_source = lru_cache(maxsize=1024)(source_of)


def rfc3339(ms: int) -> str:
    """'2026-01-31T23:59:59.123Z'"""
    second, millis = divmod(ms, 1000)
    return f"{_second(second)}.{millis:03d}Z"


@lru_cache(maxsize=4096)
def _second(second: int) -> str:
    return timestamp(second * 1000).strftime("%Y-%m-%dT%H:%M:%S")


def rated_event(
    posted: Posted, record: Consumed, transaction: int | None, grants: Mapping[int, str], correction: int = 0
) -> bytes:
    """The CloudEvent of one consumption; `grants` names the grants burned (number -> id). `correction`: the number of
    the later version that it tells of, in place of the earlier ones.
    """
    customer, tenant, key = record.customer, record.tenant, posted.key
    time = rfc3339(record.event_ms)
    recorded = time if record.recorded_ms == record.event_ms else rfc3339(record.recorded_ms)
    rate = f'"rateCard":"{record.plan}","rateCardVersion":"{record.rate_version}"'
    lines = []
    for line, charged in zip(posted.lines, record.lines, strict=True):
        burned = ",".join(
            [f'{{"grant":"{grants[b.grant]}","amountNanos":"{b.amount}"}}' for b in charged.burns if b.grant != OVERAGE]
        )
        lines.append(
            f'{{{line.json},"quantity":"{charged.quantity}","amountNanos":"{charged.amount}",{rate}'
            f'{burned and f""","burned":[{burned}]"""}}}'
        )
    subject = posted.subject and f',"subject":"{posted.subject}"'
    booked = "" if transaction is None else f',"transaction":"{transaction}"'
    degraded = ',"degraded":true' if record.degraded else ""
    trace = posted.traceparent and f',"traceparent":"{posted.traceparent}"'
    number, reverses = (f"#{correction}", f',"reverses":"{key}"') if correction else ("", "")
    return (
        f'{{"specversion":"1.0","id":"{key}{number}","source":"{_source(tenant)}","type":"{RATED}","subject":"{customer}"'
        f',"time":"{time}","partitionkey":"{customer}"{trace},"datacontenttype":"application/json","data":{{'
        f'"idempotencyKey":"{key}","tenant":"{tenant}","customer":"{customer}"{subject},"eventTime":"{time}"'
        f',"recordedAt":"{recorded}","creditType":"{record.credit_type}","lines":[{",".join(lines)}]'
        f',"epoch":"{record.epoch}","sequence":"{record.sequence}"{booked}{degraded}{reverses}}}}}'
    ).encode("ascii")


def threshold_events(posted: Posted, record: Consumed | Adjusted) -> Iterator[tuple[str, str, bytes]]:
    """(id, type, body) of each crossing in a record. The id says which one it is, so that a repeat is recognised."""
    for crossing in record.crossings:
        direction, kind = ("up", CROSSED) if crossing.up else ("down", RECOVERED)
        event_id = f"{record.customer}/{record.cycle_start}/{crossing.percent}/{crossing.number}/{direction}"
        data = {
            "tenant": record.tenant,
            "customer": record.customer,
            "percent": Int32(crossing.percent),
            "usedNanos": record.settled,
            "allowanceNanos": record.allowance,
            "cycleStart": rfc3339(record.cycle_start),
            "causedBy": posted.key if isinstance(record, Consumed) else delta_key(record),
            "crossing": crossing.number,
        }
        body = envelope(
            id=event_id,
            source=source_of(record.tenant),
            type=kind,
            subject=record.customer,
            time=rfc3339(record.recorded_ms),
            partitionkey=record.customer,
            data=data,
        )
        yield event_id, kind, body
