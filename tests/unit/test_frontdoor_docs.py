"""The page on front doors says what the code does, and the examples' mappings are sound."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from entitlement.decision import Reason
from entitlement.quantity import MAX_QUANTITY
from gateway.frontdoor import checks, headers, mapping, rules, statuses
from gateway.frontdoor.authorization import SERVICE as AUTHORIZATION
from gateway.frontdoor.forward import PATH
from gateway.frontdoor.ratelimit import SERVICE as RATE_LIMIT
from tests.pages import ROOT, blocks
from tests.unit.test_docs import codes, numbers, rows, section

PAGE = "front-doors.md"
TEXT = (ROOT / "docs" / PAGE).read_text()


def test_the_mapping_that_is_shown_is_sound() -> None:
    shown = next(block for block in blocks(ROOT / "docs" / PAGE) if block.text.startswith("requests:"))
    found = mapping.read(shown.text.encode())
    assert found.requests and found.descriptors and found.forward


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*/mapping.yaml")), ids=lambda file: file.parent.name)
def test_the_examples_mappings_are_sound(file: Path) -> None:
    assert mapping.load(str(file)).requests


def test_every_field_and_source_is_told() -> None:
    told = set(re.findall(r"\w+", " ".join(codes(section(PAGE, "The mapping")))))
    fields = {*mapping.RequestRule.__struct_fields__, *mapping.Requests.__struct_fields__, *rules.MODES}
    fields |= {*rules.Source.__struct_fields__} - {"value"} | {*mapping.File.__struct_fields__}
    shown = " ".join(block.text for block in blocks(ROOT / "docs" / PAGE))
    assert {name for name in fields if name not in told and f"{name}:" not in shown} == set()


def test_every_reason_is_told_with_its_status() -> None:
    told: dict[str, int] = {}
    for status, reasons, *_ in rows(section(PAGE, "What is answered"))[2:]:
        if status.isdigit():
            told |= dict.fromkeys(codes(reasons), int(status))
    for reason in Reason:
        assert told["ALLOW" if reason is Reason.NONE else reason.name] == statuses.STATUS[reason]
    assert (told["UNAVAILABLE"], told["OVERLOADED"]) == (503, 503)


def test_every_header_service_and_path_is_told() -> None:
    for name in (*headers.OURS, headers.LIMIT, headers.RETRY_AFTER, PATH, f"{AUTHORIZATION}/Check"):
        assert f"`{name}" in TEXT, name
    assert f"`{RATE_LIMIT}/ShouldRateLimit`" in TEXT


def test_every_limit_is_told_as_it_is() -> None:
    told = {row[0]: numbers(row[1]) for row in rows(section(PAGE, "Limits"))[2:]}
    assert {mapping.MAX_FILE_BYTES, mapping.MAX_RULES} == told["the mapping"]
    assert {checks.MAX_MATCHES} == told["`methods`, `hosts`, `entries` of a match"]
    assert {checks.MAX_TEXT} == told["`path_prefix`; a name, key or entry"]
    assert {checks.MAX_DIMENSIONS} == told["parts of `metadata`; `dimensions` of a call"]
    assert checks.MAX_SUFFIX in told["`key_suffix`"] and MAX_QUANTITY in told["quantity"]
