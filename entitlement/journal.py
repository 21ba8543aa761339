"""Journal records: what the hot store writes for every change of an account, and what the ledger reads.

A stream entry's first field is `r`; a later version may append fields, which are passed over. `r` is packed
little-endian by the scripts (d: double, B: byte, H: 16 bits, z: text that ends with NUL, pair: two doubles h, l that
mean h * 10^9 + l). Codec version 1:

    B codec  B kind  d epoch  d sequence  d version  d recorded_ms  z 'tenant customer'  z crossings      then by kind
    1 consumed: d event_ms  d period_start  B verdict  B flags   pair settled  pair allowance  d cycle_start  B lines
                z credit_type  z plan  z rate_version; for each line: d quantity  pair amount  H burns  z meter, and for
                each burn: d grant (0 = overage)  pair amount; the rest is the CheckAndConsumeRequest in protobuf
    2 rolled:   d period_start  d period_end  pair closed_overage  pair allowance
    3 adjusted: pair settled_adjustment  pair overage_adjustment  pair settled  pair allowance  d cycle_start, then
                removed, reclassed, repaid: H count, for each: d grant  pair amount
    4 held:     d event_ms  d created_ms  d expires_ms  B extension  pair amount  B lines  z credit_type  z plan
                z rate_version  z hold  z subject; for each line: d quantity  pair amount  z meter; the rest is the
                ReserveRequest or ExtendRequest
    5 settled:  B flags  pair taken  pair returned  z hold  z subject, then as consumed, with the SettleRequest
    6 ended:    B how  pair returned  z hold  z subject

flags: 1 shadow, 2 degraded; of settled: 1 final, 2 late.
crossings: 'percent+n' crossed, 'percent-n' recovered, joined by ','; '-' for none.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from struct import error as StructError

from entitlement.errors import CorruptRecord
from entitlement.quantity import NANOS
from entitlement.records import OVERAGE as OVERAGE
from entitlement.records import Adjusted as Adjusted
from entitlement.records import Burn as Burn
from entitlement.records import BurnedLine as BurnedLine
from entitlement.records import Close as Close
from entitlement.records import Consumed as Consumed
from entitlement.records import Crossing as Crossing
from entitlement.records import Ended as Ended
from entitlement.records import Header as Header
from entitlement.records import Held as Held
from entitlement.records import HeldLine as HeldLine
from entitlement.records import Record as Record
from entitlement.records import Rolled as Rolled
from entitlement.records import Settled as Settled

CODEC = 1
FIELD = b"r"
UNKNOWN_CODEC = "journal codec version"  # how a CorruptRecord begins that a later version may read
CONSUMED, ROLLED, ADJUSTED, HELD, SETTLED, ENDED = 1, 2, 3, 4, 5, 6

_HEADER = Struct("<BB4d")
_CONSUMED = Struct("<2dBB5dB")
_LINE = Struct("<3dH")
_BURN = Struct("<3d")
_ROLLED = Struct("<6d")
_ADJUSTED = Struct("<9d")
_COUNT = Struct("<H")
_HELD = Struct("<3dB2dB")
_HELD_LINE = Struct("<3d")
_SETTLED = Struct("<B4d")
_ENDED = Struct("<B2d")


def encode(record: Record) -> bytes:
    """The entry's field, byte for byte as the scripts write it."""
    match record:
        case Settled():
            return _header(SETTLED, record, _crossings_text(record.crossings)) + _pack_settled(record)
        case Held():
            return _header(HELD, record, "-") + _pack_held(record)
        case Ended():
            head = _ENDED.pack(record.how, *divmod(record.returned, NANOS))
            return _header(ENDED, record, "-") + head + _texts(record.hold, record.subject)
        case Consumed():
            return _header(CONSUMED, record, _crossings_text(record.crossings)) + _pack_consumed(record)
        case Rolled():
            amounts = (*divmod(record.closed_overage, NANOS), *divmod(record.allowance, NANOS))
            return _header(ROLLED, record, "-") + _ROLLED.pack(record.period_start, record.period_end, *amounts)
        case Adjusted():
            return _header(ADJUSTED, record, _crossings_text(record.crossings)) + _pack_adjusted(record)


def _header(kind: int, record: Header, crossings: str) -> bytes:
    head = _HEADER.pack(CODEC, kind, record.epoch, record.sequence, record.version, record.recorded_ms)
    return head + f"{record.tenant} {record.customer}\0{crossings}\0".encode()


def _pack_consumed(record: Consumed) -> bytes:
    amounts = (*divmod(record.settled, NANOS), *divmod(record.allowance, NANOS))
    flags = (record.verdict, int(record.shadow) + 2 * record.degraded)
    head = _CONSUMED.pack(record.event_ms, record.period_start, *flags, *amounts, record.cycle_start, len(record.lines))
    texts = f"{record.credit_type}\0{record.plan}\0{record.rate_version}\0".encode()
    lines = [
        _LINE.pack(line.quantity, *divmod(line.amount, NANOS), len(line.burns))
        + line.meter.encode()
        + b"\0"
        + b"".join(_BURN.pack(burn.grant, *divmod(burn.amount, NANOS)) for burn in line.burns)
        for line in record.lines
    ]
    return head + texts + b"".join(lines) + record.request


def _pack_settled(record: Settled) -> bytes:
    flags = int(record.final) + 2 * record.late
    head = _SETTLED.pack(flags, *divmod(record.taken, NANOS), *divmod(record.returned, NANOS))
    return head + _texts(record.hold, record.subject) + _pack_consumed(record)


def _pack_held(record: Held) -> bytes:
    head = _HELD.pack(
        *(record.event_ms, record.created_ms, record.expires_ms, record.extension),
        *(*divmod(record.amount, NANOS), len(record.lines)),
    )
    texts = _texts(record.credit_type, record.plan, record.rate_version, record.hold, record.subject)
    lines = [_HELD_LINE.pack(line.quantity, *divmod(line.amount, NANOS)) + _texts(line.meter) for line in record.lines]
    return head + texts + b"".join(lines) + record.request


def _texts(*texts: str) -> bytes:
    return "".join([text + "\0" for text in texts]).encode()


def _pack_adjusted(record: Adjusted) -> bytes:
    amounts = (record.settled_adjustment, record.overage_adjustment, record.settled, record.allowance)
    body = _ADJUSTED.pack(*[part for nanos in amounts for part in divmod(nanos, NANOS)], record.cycle_start)
    for burns in (record.removed, record.reclassed, record.repaid):
        body += _COUNT.pack(len(burns)) + b"".join(
            _BURN.pack(burn.grant, *divmod(burn.amount, NANOS)) for burn in burns
        )
    return body


def decode(data: bytes) -> Record:
    """The record in an entry's field. Raises CorruptRecord, which names what is wrong, and never guesses."""
    try:
        codec, kind, epoch, sequence, version, recorded = _HEADER.unpack_from(data)
        if codec != CODEC:
            raise CorruptRecord(f"{UNKNOWN_CODEC} {codec} is unknown; this reader knows {CODEC}")
        if (reader := _DECODERS.get(kind)) is None:
            raise CorruptRecord(f"{UNKNOWN_CODEC} {codec} has no kind {kind} that this reader knows")
        who, at = _text(data, _HEADER.size)
        crossings, at = _text(data, at)
        tenant, customer = who.split(" ")
        header = (tenant, customer, int(epoch), int(sequence), int(version), int(recorded))
        return reader(header, _crossings(crossings), data, at)
    except (ValueError, IndexError, KeyError, OverflowError, StructError) as error:
        raise CorruptRecord(f"journal record does not decode: {type(error).__name__}: {error}") from None


_Head = tuple[str, str, int, int, int, int]


def _consumed(header: _Head, crossings: tuple[Crossing, ...], data: bytes, at: int) -> Consumed:
    tenant, customer, epoch, sequence, version, recorded = header
    event, started, verdict, flags, s1, s0, a1, a0, cycle, count = _CONSUMED.unpack_from(data, at)
    credit, at = _text(data, at + _CONSUMED.size)
    plan, at = _text(data, at)
    rate_version, at = _text(data, at)
    lines = []
    for _ in range(count):
        line, at = _line(data, at)
        lines.append(line)
    return Consumed(
        tenant=tenant,
        customer=customer,
        epoch=epoch,
        sequence=sequence,
        version=version,
        recorded_ms=recorded,
        event_ms=int(event),
        period_start=int(started),
        verdict=verdict,
        shadow=flags & 1 == 1,
        degraded=flags & 2 == 2,
        credit_type=credit,
        plan=plan,
        rate_version=rate_version,
        lines=tuple(lines),
        crossings=crossings,
        settled=int(s1) * NANOS + int(s0),
        allowance=int(a1) * NANOS + int(a0),
        cycle_start=int(cycle),
        request=data[at:],
    )


def _rolled(header: _Head, _: tuple[Crossing, ...], data: bytes, at: int) -> Rolled:
    tenant, customer, epoch, sequence, version, recorded = header
    start, end, c1, c0, a1, a0 = map(int, _ROLLED.unpack_from(data, at))
    return Rolled(
        tenant=tenant,
        customer=customer,
        epoch=epoch,
        sequence=sequence,
        version=version,
        recorded_ms=recorded,
        period_start=start,
        period_end=end,
        closed_overage=c1 * NANOS + c0,
        allowance=a1 * NANOS + a0,
    )


def _adjusted(header: _Head, crossings: tuple[Crossing, ...], data: bytes, at: int) -> Adjusted:
    tenant, customer, epoch, sequence, version, recorded = header
    numbers = [int(number) for number in _ADJUSTED.unpack_from(data, at)]
    at += _ADJUSTED.size
    found = []
    for _ in range(3):
        (count,) = _COUNT.unpack_from(data, at)
        burns, at = _burns(data, at + _COUNT.size, count)
        found.append(burns)
    return Adjusted(
        tenant=tenant,
        customer=customer,
        epoch=epoch,
        sequence=sequence,
        version=version,
        recorded_ms=recorded,
        settled_adjustment=numbers[0] * NANOS + numbers[1],
        overage_adjustment=numbers[2] * NANOS + numbers[3],
        removed=found[0],
        reclassed=found[1],
        repaid=found[2],
        crossings=crossings,
        settled=numbers[4] * NANOS + numbers[5],
        allowance=numbers[6] * NANOS + numbers[7],
        cycle_start=numbers[8],
    )


def _settled(header: _Head, crossings: tuple[Crossing, ...], data: bytes, at: int) -> Settled:
    flags, t1, t0, r1, r0 = _SETTLED.unpack_from(data, at)
    hold, at = _text(data, at + _SETTLED.size)
    subject, at = _text(data, at)
    used = _consumed(header, crossings, data, at)
    return Settled(
        **{name: getattr(used, name) for name in Consumed.__struct_fields__},
        hold=hold,
        subject=subject,
        taken=int(t1) * NANOS + int(t0),
        returned=int(r1) * NANOS + int(r0),
        final=flags & 1 == 1,
        late=flags & 2 == 2,
    )


def _held(header: _Head, _: tuple[Crossing, ...], data: bytes, at: int) -> Held:
    tenant, customer, epoch, sequence, version, recorded = header
    event, created, expires, extension, a1, a0, count = _HELD.unpack_from(data, at)
    at += _HELD.size
    texts = []
    for _text_no in range(5):
        text, at = _text(data, at)
        texts.append(text)
    lines = []
    for _line_no in range(count):
        quantity, high, low = _HELD_LINE.unpack_from(data, at)
        meter, at = _text(data, at + _HELD_LINE.size)
        lines.append(HeldLine(meter, int(quantity), int(high) * NANOS + int(low)))
    return Held(
        tenant=tenant,
        customer=customer,
        epoch=epoch,
        sequence=sequence,
        version=version,
        recorded_ms=recorded,
        event_ms=int(event),
        created_ms=int(created),
        expires_ms=int(expires),
        extension=extension == 1,
        amount=int(a1) * NANOS + int(a0),
        credit_type=texts[0],
        plan=texts[1],
        rate_version=texts[2],
        hold=texts[3],
        subject=texts[4],
        lines=tuple(lines),
        request=data[at:],
    )


def _ended(header: _Head, _: tuple[Crossing, ...], data: bytes, at: int) -> Ended:
    tenant, customer, epoch, sequence, version, recorded = header
    how, r1, r0 = _ENDED.unpack_from(data, at)
    hold, at = _text(data, at + _ENDED.size)
    subject, _end = _text(data, at)
    return Ended(
        tenant=tenant,
        customer=customer,
        epoch=epoch,
        sequence=sequence,
        version=version,
        recorded_ms=recorded,
        how=Close(how),
        returned=int(r1) * NANOS + int(r0),
        hold=hold,
        subject=subject,
    )


KINDS = (CONSUMED, ROLLED, ADJUSTED, HELD, SETTLED, ENDED)
_DECODERS: dict[int, Callable[[_Head, tuple[Crossing, ...], bytes, int], Record]] = {
    CONSUMED: _consumed,
    ROLLED: _rolled,
    ADJUSTED: _adjusted,
    HELD: _held,
    SETTLED: _settled,
    ENDED: _ended,
}


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(0, at)
    return data[at:end].decode("ascii"), end + 1


def _line(data: bytes, at: int) -> tuple[BurnedLine, int]:
    quantity, high, low, count = _LINE.unpack_from(data, at)
    meter, at = _text(data, at + _LINE.size)
    burns, at = _burns(data, at, count)
    line = BurnedLine(meter, int(quantity), int(high) * NANOS + int(low), burns)
    if sum([burn.amount for burn in burns]) != line.amount:
        raise ValueError(f"burns of {meter!r} do not sum to its amount {line.amount}")
    return line, at


def _burns(data: bytes, at: int, count: int) -> tuple[tuple[Burn, ...], int]:
    burns = []
    for _ in range(count):
        grant, high, low = _BURN.unpack_from(data, at)
        burns.append(Burn(int(grant), int(high) * NANOS + int(low)))
        at += _BURN.size
    return tuple(burns), at


def _crossings(text: str) -> tuple[Crossing, ...]:
    if text == "-":
        return ()
    found = []
    for part in text.split(","):
        up = "+" in part
        percent, number = part.split("+" if up else "-")
        found.append(Crossing(int(percent), up, int(number)))
    return tuple(found)


def _crossings_text(crossings: tuple[Crossing, ...]) -> str:
    return ",".join(f"{c.percent}{'+' if c.up else '-'}{c.number}" for c in crossings) or "-"
