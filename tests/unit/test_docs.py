"""The manual says what the code does: settings, reasons, limits, fields and commands. Its examples are executed
elsewhere (tests/integration/test_readme.py), and its links followed (test_links.py).
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import msgspec
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory

from entitlement import account, catalog, decision, identity, periods, quantity, rating, request
from entitlement.v1 import events_pb2, gateway_pb2, ledger_pb2
from gateway import service
from gateway import settings as gateway_settings
from gateway.cli import catalogue_parts, main, yaml_source
from gateway.cli.catalogue_file import read_catalogue
from gateway.cli.yaml_source import BadFile
from gateway.transport import asgi, bootstrap, grpcio, health
from ledger_sync import (
    admin_server,
    backfill,
    callers,
    catalog_messages,
    catalogs,
    contracts,
    customers,
    grants,
    rerate,
    translate,
    usage,
)
from ledger_sync import health as admin_health
from ledger_sync import settings as sync_settings
from tests.pages import ROOT, blocks, commands, pages

DOCS = ROOT / "docs"
EVENTS = {
    "entitlement.rated.v1": events_pb2.RatedEvent,
    "entitlement.threshold.crossed.v1": events_pb2.ThresholdEvent,
}
assert ledger_pb2.DESCRIPTOR.services_by_name  # known to the pool by name


def text(page: str) -> str:
    return (DOCS / page).read_text()


def section(page: str, heading: str) -> str:
    """What stands under a heading, to the next one."""
    found = re.search(rf"^## {re.escape(heading)}[^\n]*\n(.*?)(?=^## |\Z)", text(page), re.M | re.S)
    assert found, f"{page} has no section {heading!r}"
    return found[1]


def rows(markdown: str) -> list[list[str]]:
    """The cells of all table rows; '\\|' does not divide."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def numbers(markdown: str) -> set[int]:
    return {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", markdown)}


@pytest.mark.parametrize(
    ("heading", "settings"),
    [("The gateway", gateway_settings.Settings), ("ledger_sync", sync_settings.Settings)],
    ids=["gateway", "sync"],
)
def test_every_setting_is_told_with_its_default(heading: str, settings: type[msgspec.Struct]) -> None:
    told: dict[str, str] = {}
    for name_cell, default_cell, *_ in rows(section("configuration.md", heading))[2:]:
        told |= dict(zip(codes(name_cell), codes(default_cell), strict=True))
    kept = {field.name: field.default for field in msgspec.structs.fields(settings)}
    wanted = {
        name.upper(): '""' if value == "" else json.dumps(value) if isinstance(value, bool) else str(value)
        for name, value in kept.items()
    }
    assert told == wanted


def test_every_reason_is_told() -> None:
    told = section("calling.md", "Reasons")
    given = {codes(cells[0])[0]: cells for cells in rows(told)[2:]}
    later = set(codes(told)) - given.keys()
    names = {name.removeprefix("REASON_") for name, _ in gateway_pb2.Reason.items()} - {"UNSPECIFIED"}
    assert given.keys() <= {reason.name for reason in decision.Reason}
    assert all(all(cells) for cells in given.values())
    assert names - given.keys() <= later and names <= given.keys() | later


def test_every_mode_is_told() -> None:
    told = text("calling.md")
    callers = set(decision.Mode) - {decision.Mode.SETTLE}
    assert all(f"`{mode.name}`" in told for mode in callers)


LIMITS = decision.Limits()
DATA_PLANE = {
    "key, customer, subject": identity.MAX_ID_BYTES,
    "feature, dimension name": identity.MAX_NAME_BYTES,
    "dimensions of a line": identity.MAX_DIMENSIONS,
    "usage lines of a call": quantity.MAX_LINES,
    "quantity of a line": quantity.MAX_QUANTITY,
    "units of one meter": quantity.MAX_CUMULATIVE,
    "an amount, a balance": quantity.MAX_NANOS,
    "`event_time`": LIMITS.oldest_ms // periods.DAY,
    "a request": request.MAX_REQUEST_BYTES,
    "requests of a batch": request.MAX_BATCH,
    "undecided requests of a stream": service.MAX_STREAM_IN_FLIGHT,
    "decisions in flight": gateway_settings.Settings().max_in_flight,
    "calls open in a gateway": asgi.MAX_CALLS,
    "health watchers": health.MAX_WATCHERS,
    "a message": gateway_settings.Settings().max_message_bytes,
    "requests that have not arrived": asgi.MAX_UNFINISHED_BYTES,
    "metadata of a call": grpcio.MAX_METADATA_BYTES // 1024,
    "calls at once on one connection": grpcio.MAX_STREAMS,
    "an answer of Redis": gateway_settings.Settings().redis_timeout_ms,
    "loading an account": gateway_settings.Settings().load_timeout_ms,
    "`at_least_sequence`": int(service.WAIT_SEQUENCE_S),
    "how long a key's answer": LIMITS.remember_ms // periods.HOUR,
}
CONTROL_PLANE = {
    "a price": quantity.MAX_PRICE // quantity.NANOS,
    "`per`": quantity.MAX_PER,
    "tiers of a rate": rating.MAX_TIERS,
    "a tier's flat fee": quantity.MAX_FLAT // quantity.NANOS,
    "rates of a card": catalog_messages.MAX_RATES,
    "grants of a customer": account.MAX_GRANTS,
    "features of a grant": grants.MAX_GRANT_FEATURES,
    "a customer's grants: id of one": grants.MAX_RECURRING_ID,
    "contracts of a customer: `seats`": contracts.MAX_SEATS,
    "contracts of a customer: id of one": identity.MAX_ID_BYTES - 1,
    "thresholds of a contract": contracts.MAX_THRESHOLDS,
    "`gate_percent`": account.MAX_PERCENT,
    "quotas, entitled features": contracts.MAX_QUOTAS,
    "subjects of a customer": customers.MAX_SUBJECTS,
    "name, note, reason": translate.MAX_TEXT_BYTES,
    "events of `RecordUsage`": usage.MAX_EVENTS,
    "events of a backfill": backfill.MAX_GATHERED,
    "span of a re-rating": rerate.MAX_DAYS,
    "a page": translate.MAX_PAGE_SIZE,
    "a message, metadata, calls": admin_server.MAX_CALLS,
    "watchers of LedgerAdmin's health": admin_health.MAX_WATCHERS,
    "a catalogue file": catalogue_parts.MAX_RANGE,
}


@pytest.mark.parametrize(
    ("heading", "limit", "bound"),
    [
        *(("The data plane", limit, bound) for limit, bound in DATA_PLANE.items()),
        *(("The control plane", limit, bound) for limit, bound in CONTROL_PLANE.items()),
    ],
    ids=[*DATA_PLANE, *CONTROL_PLANE],
)
def test_every_limit_is_told_as_it_is(heading: str, limit: str, bound: int) -> None:
    (row,) = (row for row in rows(section("errors-and-limits.md", heading))[2:] if row[0].startswith(limit))
    assert bound in numbers(row[1]), row


def test_every_row_of_limits_is_looked_at() -> None:
    told = {
        row[0] for heading in ("data", "control") for row in rows(section("errors-and-limits.md", f"The {heading}"))
    }
    looked = (*DATA_PLANE, *CONTROL_PLANE, "limit", "---")
    alone = {"dimension value", "every quantity 0", "`mode`", "a customer's grants", "contracts of a customer"}
    assert not [row for row in told if not row.startswith((*looked, *alone))]


def test_limits_that_share_a_row_are_alike() -> None:
    assert LIMITS.newest_ms == 300 * periods.SECOND
    assert catalog_messages.MAX_RATES == catalogs.MAX_VERSIONS == catalogs.MAX_FEATURES
    assert (contracts.MAX_ENTITLED, catalog_messages.MAX_VALUE_BYTES, callers.MAX_ACTOR_BYTES) == (256, 1_024, 128)
    assert bootstrap.MAX_STREAMS == grpcio.MAX_STREAMS and bootstrap.MAX_HEADERS_KB == 16
    assert admin_server.MAX_MESSAGE_BYTES == 4 << 20 and admin_server.MAX_METADATA_BYTES == 16 << 10
    assert yaml_source.MAX_FILE_BYTES == 8 << 20 and yaml_source.MAX_ITEMS == catalogue_parts.MAX_RANGE
    assert usage.BACKFILL_MS // periods.DAY == 3_653 and catalog.Kind.METERED == ledger_pb2.Feature.METERED


def known_fields(file: str) -> list[str]:
    """What the reader says it expects instead of a field 'zzz'."""
    with pytest.raises(BadFile, match="expected one of") as refused:
        read_catalogue("typo.yaml", file.encode())
    return re.search(r"expected one of ([\w, ]+)", str(refused.value))[1].split(", ")


@pytest.mark.parametrize(
    "file",
    [
        "zzz: 1",
        "features: [{zzz: 1}]",
        "rate_cards: [{zzz: 1}]",
        "rate_cards: [{id: a, credit_type: b, rates: [{zzz: 1}]}]",
        "customers: [{zzz: 1}]",
        "contracts: [{zzz: 1}]",
        "contracts: [{id: a, customer: b, rate_card: c, quotas: [{zzz: 1}]}]",
        "grants: [{zzz: 1}]",
    ],
)
def test_every_field_of_a_catalogue_is_told(file: str) -> None:
    told = " ".join(codes(section("catalogue.md", "Every field")))
    assert [name for name in known_fields(file) if not re.search(rf"\b{name}\b", told)] == []


@pytest.mark.parametrize("page", list(pages()), ids=lambda page: page.name)
def test_catalogues_and_events_that_are_shown_are_sound(page: Path) -> None:
    for block in blocks(page):
        if block.kind == "yaml":
            read_catalogue(str(block), block.text.encode())
        elif block.kind == "json":
            for line in block.text.splitlines():
                event = json.loads(line)
                json_format.ParseDict(event["data"], EVENTS[event["type"]]())


@pytest.mark.parametrize("page", list(pages()), ids=lambda page: page.name)
def test_requests_that_are_shown_are_of_their_methods(page: Path) -> None:
    """Also those of grpcurl, which not every machine has."""
    for line in (command.line for block in blocks(page) for command in commands(block)):
        words = shlex.split(line)
        called = re.search(r"entitlement\.v1\.\w+/\w+", line)
        if called and "-d" in words:
            method = descriptor_pool.Default().FindMethodByName(called[0].replace("/", "."))
            json_format.Parse(words[words.index("-d") + 1], message_factory.GetMessageClass(method.input_type)())


def test_every_command_is_told() -> None:
    headings = {name for heading in re.findall(r"^## (.*)$", text("cli.md"), re.M) for name in heading.split(", ")}
    assert headings == set(main.commands)
