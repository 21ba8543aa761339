"""consume.lua's command as bytes, put together from parts that repeat: a customer's, a price's.

The same bytes as packing EVALSHA with consume_keys and consume_arguments, for a sixth of the time.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from entitlement import keys
from entitlement.decision import Charge, Consume, Limits, account_arguments, charge_arguments
from entitlement.identity import DIGEST_BYTES, fingerprint, key_digest
from entitlement.quantity import MAX_LINES

MAX_REMEMBERED = 50_000  # customers, and prices, whose parts are kept
_FIXED_ARGUMENTS = 19  # EVALSHA sha 3, three keys, and ARGV 1..13


class _Seat(msgspec.Struct, frozen=True, gc=False):
    """What every call of one customer has in common."""

    head: bytes  # the account's key, and the idempotency key up to its digest
    journal: bytes  # the journal's key, and the fingerprint up to itself
    tail: bytes  # ARGV 5..8


class Packer:
    """Packs calls of consume.lua."""

    def __init__(self, sha: str, limits: Limits, partitions: int) -> None:
        name = _bulks(("EVALSHA", sha, 3))
        self._starts = [b"*%d\r\n%b" % (_FIXED_ARGUMENTS + 5 * lines, name) for lines in range(MAX_LINES + 1)]
        self._subject_starts = [
            b"*%d\r\n%b" % (_FIXED_ARGUMENTS + 5 * lines + 1, name) for lines in range(MAX_LINES + 1)
        ]
        self._partitions = partitions
        prefixes = [keys.idempotency(partition, b"") for partition in range(partitions)]
        self._prefixes = [b"$%d\r\n%b" % (len(prefix) + DIGEST_BYTES, prefix) for prefix in prefixes]
        self._journals = [_bulks((keys.journal(partition),)) + b"$8\r\n" for partition in range(partitions)]
        self._window = _bulks(account_arguments("", "", limits)[1:])  # The same for every customer.
        self._seats: dict[tuple[str, str], _Seat] = {}
        self._charges: dict[int, tuple[Charge, bytes]] = {}

    def pack(self, request: Consume, charge: Charge) -> bytes:
        tenant, customer, lines = request.tenant, request.customer, request.lines
        payload = request.payload + request.trace
        seat = self._seats.get((tenant, customer)) or self._seat(tenant, customer)
        known = self._charges.get(id(charge))
        prices = self._price(charge) if known is None else known[1]
        event = _SMALL[0] if not request.event_ms else _bulk(request.event_ms)
        first, *more = lines
        quantities = _bulk(first.quantity)
        if more:
            quantities += b"".join([_bulk(line.quantity) for line in more])
        starts = self._starts
        if subject := request.subject:
            quantities += b"$%d\r\n%b\r\n" % (len(subject), subject.encode())
            starts = self._subject_starts
        return b"%b%b%b\r\n%b%b\r\n$%d\r\n%b\r\n$1\r\n%d\r\n%b%b%b%b" % (
            starts[len(lines)],
            seat.head,
            key_digest(tenant, customer, request.key),
            seat.journal,
            fingerprint(request.payload),
            len(payload),
            payload,
            charge.mode or request.mode,
            event,
            seat.tail,
            prices,
            quantities,
        )

    def _seat(self, tenant: str, customer: str) -> _Seat:
        """Remembered while there is room. Nothing is forgotten to make some: that would be a pause now and then."""
        partition = keys.partition_of(tenant, customer, self._partitions)
        account, who = keys.account(partition, tenant, customer).encode(), f"{tenant} {customer}".encode()
        seat = _Seat(
            b"$%d\r\n%b\r\n%b" % (len(account), account, self._prefixes[partition]),
            self._journals[partition],
            b"$%d\r\n%b\r\n%b" % (len(who), who, self._window),
        )
        if len(self._seats) < MAX_REMEMBERED:
            self._seats[tenant, customer] = seat
        return seat

    def _price(self, charge: Charge) -> bytes:
        """Kept with the charge itself, so that its id stays its own."""
        if len(self._charges) >= MAX_REMEMBERED:
            self._charges.clear()
        packed = _bulks(charge_arguments(charge))
        self._charges[id(charge)] = (charge, packed)
        return packed


def _bulk(number: int) -> bytes:
    if number < len(_SMALL):
        return _SMALL[number]
    text = b"%d" % number
    return b"$%d\r\n%b\r\n" % (len(text), text)


_SMALL = [b"$%d\r\n%d\r\n" % (len(str(number)), number) for number in range(1_000)]


def _bulks(arguments: Iterable[str | int]) -> bytes:
    texts = [str(argument).encode() for argument in arguments]
    return b"".join([b"$%d\r\n%b\r\n" % (len(text), text) for text in texts])
