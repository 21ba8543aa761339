"""The reports of a stream that are not settled yet, in order, and which of them are settled together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

from entitlement.errors import InvalidArgument
from entitlement.hold_requests import parse_settle
from entitlement.quantity import MAX_LINES, MAX_QUANTITY
from entitlement.v1 import gateway_pb2 as pb
from gateway.meter_budget import Shape, shape_of

MAX_GATHERED_BYTES: Final = 8_192  # of reports that are settled together
MAX_PENDING: Final = 10_000  # reports of one stream that are not settled; then no more are read
MAX_PENDING_BYTES: Final = 1_048_576  # of them


class Reports:
    """Numbered from 1 without a gap. `read` is the number of the last that came, `charged` of the last that is done."""

    def __init__(self, tenant: str, opened: pb.ReserveRequest, charged: int) -> None:
        """`charged`: on an earlier stream of the hold."""
        self._tenant = tenant
        self._opened = opened
        self.read = self.charged = charged
        self.final = False  # the last one has come
        self.totals: dict[Shape, int] = {}  # units of all that is pending
        self._pending: list[pb.SettleRequest] = []
        self._bytes = 0
        self._room = asyncio.Event()

    def __len__(self) -> int:
        return len(self._pending)

    def take(self, report: pb.SettleRequest) -> bool:
        """Whether it is new. Raises InvalidArgument for what does not belong here."""
        for field in ("hold_id", "customer"):
            named, ours = getattr(report, field), getattr(self._opened, field)
            if named and named != ours:
                raise InvalidArgument(field, f"{named!r} is not the stream's, {ours!r}")
            setattr(report, field, ours)
        if self.final:
            raise InvalidArgument("final", "the last report was final; no other follows it")
        parse_settle(self._tenant, report)
        if 0 < report.number <= self.charged:
            return False
        if report.number != self.read + 1:
            raise InvalidArgument("number", f"{report.number} does not follow {self.read}; expected {self.read + 1}")
        self.read, self.final = report.number, report.final
        self._pending.append(report)
        self._bytes += report.ByteSize()
        _add(self.totals, report)
        return True

    async def room(self) -> None:
        """Until there is some for another."""
        while len(self._pending) >= MAX_PENDING or self._bytes >= MAX_PENDING_BYTES:
            self._room.clear()
            await self._room.wait()

    def batch(self) -> list[pb.SettleRequest]:
        """The first that one settlement may hold: of one time, within the bounds of a request."""
        shapes: set[Shape] = set()
        size = quantity = count = 0
        for report in self._pending:
            shapes |= {shape_of(line) for line in report.usage}
            size += report.ByteSize()
            quantity += sum(line.quantity for line in report.usage)
            same = report.event_time == self._pending[0].event_time
            fits = len(shapes) <= MAX_LINES and size <= MAX_GATHERED_BYTES and quantity <= MAX_QUANTITY
            if count and not (same and fits):
                break
            count += 1
        return self._pending[:count]

    def done(self, number: int) -> None:
        """Those up to `number` are charged."""
        self.charged, self.read = max(self.charged, number), max(self.read, number)
        self._keep([report for report in self._pending if report.number > self.charged])

    def drop(self, report: pb.SettleRequest) -> None:
        """It will not be charged."""
        self._keep([other for other in self._pending if other is not report])

    def _keep(self, pending: list[pb.SettleRequest]) -> None:
        self._pending = pending
        self._bytes = sum(report.ByteSize() for report in pending)
        self.totals = totals_of(pending)
        self._room.set()


def totals_of(reports: Iterable[pb.SettleRequest]) -> dict[Shape, int]:
    """Units of all together, in the order in which their shapes come first."""
    totals: dict[Shape, int] = {}
    for report in reports:
        _add(totals, report)
    return totals


def together(reports: Sequence[pb.SettleRequest], *, final: bool) -> pb.SettleRequest:
    """As one, under the key and the number of the last."""
    last = reports[-1]
    message = pb.SettleRequest(hold_id=last.hold_id, customer=last.customer, final=final)
    message.idempotency_key, message.number = last.idempotency_key, last.number
    if last.HasField("event_time"):
        message.event_time.CopyFrom(last.event_time)
    for (feature, dimensions), quantity in totals_of(reports).items():
        message.usage.add(feature=feature, quantity=quantity, dimensions=dict(dimensions))
    return message


def _add(totals: dict[Shape, int], report: pb.SettleRequest) -> None:
    for line in report.usage:
        shape = shape_of(line)
        totals[shape] = totals.get(shape, 0) + line.quantity
