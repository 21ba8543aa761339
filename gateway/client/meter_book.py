"""What was used of one hold, from when it is told until it is charged; and what is due. Of a meter, without I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import grpc

from entitlement.quantity import MAX_LINES, MAX_QUANTITY
from entitlement.v1 import gateway_pb2 as pb
from gateway.client.errors import call_error
from gateway.client.values import Usage, add_lines, packed

Shape = tuple[str, tuple[tuple[str, str], ...]]  # a feature and its dimensions


class Report(NamedTuple):
    number: int
    usage: tuple[Usage, ...]
    final: bool
    key: str

    @property
    def units(self) -> int:
        return sum(line.quantity for line in self.usage)


class Book:
    """`reports`: not acknowledged, in order. `final`: the last one is made."""

    def __init__(self, opening: pb.ReserveRequest, due: Sequence[Usage]) -> None:
        self._opening = opening
        self.hold = opening.hold_id
        self.reports: deque[Report] = deque()
        self.final = False
        self._number = 0  # of the last report
        self._gathered: dict[Shape, int] = {}
        self._shapes: set[Shape] = set()  # that can be put on the wire
        self._gathered_units = self._reported_units = 0
        self._due_sent: dict[int, int] = {}  # units, by report
        self.expect(due)
        self._due_heard = self._due_units  # as last answered

    def use(self, feature: str, quantity: int, dimensions: Mapping[str, str] | None) -> None:
        """Raises InvalidArgument for what cannot be put on the wire; so does `expect`."""
        self._check(quantity)
        if quantity:
            shape = self._shape(feature, dimensions)
            self._gathered[shape] = self._gathered.get(shape, 0) + quantity
            self._gathered_units += quantity

    def expect(self, due: Sequence[Usage]) -> None:
        for line in due:
            self._check(line.quantity)
            self._shape(line.feature, line.dimensions)
        self._due = due
        self._due_units = sum([line.quantity for line in due])

    @property
    def open_units(self) -> int:
        """That are not acknowledged."""
        return self._reported_units + self._gathered_units

    @property
    def unheard(self) -> int:
        """Units that no answer takes into account yet."""
        return self.open_units + max(0, self._due_units - self._due_heard)

    @property
    def unacknowledged(self) -> tuple[Usage, ...]:
        return (*[line for report in self.reports for line in report.usage], *self._lines())

    def number(self, *, ending: bool) -> None:
        """What was gathered becomes reports; the last one, at the end, is final."""
        if self.final:
            return
        lines = self._lines()
        self._gathered.clear()
        self._gathered_units = 0
        parts = [tuple(lines[at : at + MAX_LINES]) for at in range(0, len(lines), MAX_LINES)]
        if ending and not parts:
            parts.append(())
        for index, usage in enumerate(parts):
            self._number += 1
            self.final = ending and index == len(parts) - 1
            report = Report(self._number, usage, self.final, f"{self.hold}/{self._number}")
            self.reports.append(report)
            self._reported_units += report.units

    def opening(self) -> pb.MeterRequest:
        message = self._with_due()
        message.open.CopyFrom(self._opening)
        return message

    def unsent(self, sent: int) -> Iterable[tuple[int, pb.MeterRequest]]:
        """The reports after that number, each as it stands when it is taken."""
        while report := next((report for report in self.reports if report.number > sent), None):
            sent = report.number
            self._due_sent[sent] = self._due_units
            message = self._with_due()
            settle = message.report
            settle.idempotency_key, settle.number, settle.final = report.key, report.number, report.final
            add_lines(settle.usage, report.usage)
            yield sent, message

    def acknowledge(self, number: int) -> bool:
        """The reports up to it are charged. Whether any of them was not known to be."""
        any_ = False
        while self.reports and self.reports[0].number <= number:
            report = self.forget()
            self._due_heard = self._due_sent.pop(report.number, self._due_heard)
            any_ = True
        return any_

    def forget(self) -> Report:
        """The first report, which nobody waits for any more."""
        report = self.reports.popleft()
        self._reported_units -= report.units
        return report

    def _with_due(self) -> pb.MeterRequest:
        message = pb.MeterRequest()
        add_lines(message.due, self._due)
        return message

    def _lines(self) -> list[Usage]:
        return [Usage(feature, units, dict(dimensions)) for (feature, dimensions), units in self._gathered.items()]

    def _check(self, quantity: int) -> None:
        if not isinstance(quantity, int) or not 0 <= quantity <= MAX_QUANTITY:
            problem = f"quantity: {quantity!r} is not a whole number in 0..{MAX_QUANTITY}"
            raise call_error(grpc.StatusCode.INVALID_ARGUMENT, problem, self.hold)

    def _shape(self, feature: str, dimensions: Mapping[str, str] | None) -> Shape:
        shape = (feature, tuple(sorted(dimensions.items())) if dimensions else ())
        if shape not in self._shapes:
            packed(lambda: pb.Usage(feature=feature, dimensions=dimensions), self.hold)
            self._shapes.add(shape)
        return shape
