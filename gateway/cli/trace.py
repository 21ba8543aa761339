"""Traces of LLM traffic, and the request that each row becomes. Pure: the same row and mapping give the same bytes.

A row asks for its tokens of one model: one CheckAndConsume with two usage lines, input and output. A trace names no
customer and no model, so each row draws them by its own number and the seed alone: rows may be sent in any order, in
part or twice, and an offline sum over the file sees the requests that the gateway saw.
"""

from __future__ import annotations

import csv
import random
import re
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import accumulate

from entitlement.errors import InvalidArgument
from entitlement.identity import check_id
from entitlement.quantity import MAX_QUANTITY, parse_integer
from entitlement.v1.gateway_pb2 import CheckAndConsumeRequest, Usage

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
FEATURE = "tokens"
MODELS = ("gpt-4o", "gpt-4o-mini", "claude-sonnet-4.5")  # as examples/llm.yaml prices them
MAX_CUSTOMERS = 1_000_000

_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._~@-]+", re.ASCII)
_MEAN_GAP_S = 0.18  # of the 2023 conversation trace


class BadTrace(ValueError):
    """The file is not a trace. Says the line, what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Row:
    number: int  # 1 is the first row after the header
    at_us: int  # microseconds since the first row
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Mapping:
    """How a row becomes a request: who the customers are, and what the seed draws for it."""

    name: str  # of the trace: with seed and row number, the idempotency key
    seed: int = 42
    customers: int = 50
    zipf: float = 1.1  # customer k of 1..n is drawn with weight k^-zipf
    models: Sequence[str] = MODELS
    _cumulative: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_id("trace name", f"{self.name}-{self.seed}-")
        assert 1 <= self.customers <= MAX_CUSTOMERS and self.zipf >= 0 and self.models
        weights = (rank**-self.zipf for rank in range(1, self.customers + 1))
        object.__setattr__(self, "_cumulative", list(accumulate(weights)))

    def key(self, row: Row) -> str:
        return f"{self.name}-{self.seed}-{row.number}"

    def draw(self, row: Row) -> tuple[str, str]:
        """(customer, model) of a row."""
        uniform = random.Random(f"{self.seed}/{row.number}")  # noqa: S311  A reproducible draw, not a secret.
        rank = bisect(self._cumulative, uniform.random() * self._cumulative[-1], hi=self.customers - 1)
        return customer_id(rank + 1), self.models[int(uniform.random() * len(self.models))]

    def request(self, row: Row) -> CheckAndConsumeRequest:
        """No event time: the rows are old, the traffic is of now."""
        customer, model = self.draw(row)
        return CheckAndConsumeRequest(
            idempotency_key=self.key(row),
            customer=customer,
            usage=[
                _usage(row.context_tokens, model, "input"),
                _usage(row.generated_tokens, model, "output"),
            ],
        )


def customer_id(rank: int) -> str:
    return f"cust-{rank:04d}"


def trace_name(stem: str) -> str:
    """A file's name as it may stand in an idempotency key."""
    return _NOT_IN_ID.sub("-", stem)[:64].strip("-") or "trace"


def read_trace(lines: Iterable[str]) -> Iterator[Row]:
    """The rows of a trace in CSV; one without any token asks for nothing and is left out. BadTrace names the line."""
    table = csv.reader(lines)
    header = next(table, [])
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise BadTrace(f"line 1: no column {missing[0]!r} in {','.join(header)[:80]!r}; expected {','.join(COLUMNS)}")
    places = [header.index(name) for name in COLUMNS]
    first: datetime | None = None
    number = 0
    for cells in table:
        if not cells:
            continue
        number += 1
        try:
            at, context, generated = (cells[place].strip() for place in places)
            time = _utc(at)
            first = first or time
            row = Row(
                number,
                (time - first) // timedelta(microseconds=1),
                parse_integer(COLUMNS[1], context, 0, MAX_QUANTITY),
                parse_integer(COLUMNS[2], generated, 0, MAX_QUANTITY),
            )
        except IndexError:
            raise BadTrace(f"line {table.line_num}: {len(cells)} columns; expected {len(header)}") from None
        except (ValueError, InvalidArgument) as error:
            raise BadTrace(f"line {table.line_num}: {error}") from None
        if row.context_tokens or row.generated_tokens:
            yield row


def generate(count: int, seed: int) -> Iterator[Row]:
    """`count` rows shaped like the 2023 conversation trace: Poisson arrivals, log-normal token counts."""
    uniform = random.Random(f"{seed}/rows")  # noqa: S311  Reproducible, not secret.
    at_s = 0.0
    for number in range(1, count + 1):
        context = min(int(uniform.lognormvariate(6.5, 1.1)) + 1, 16_000)
        generated = min(int(uniform.lognormvariate(5.0, 0.9)) + 1, 4_000)
        yield Row(number, int(at_s * 1_000_000), context, generated)
        at_s += uniform.expovariate(1 / _MEAN_GAP_S)


def _usage(tokens: int, model: str, token_type: str) -> Usage:
    return Usage(feature=FEATURE, quantity=tokens, dimensions={"model": model, "token_type": token_type})


def _utc(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
