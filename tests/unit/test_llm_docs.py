"""The page on language models says what the integrations do: settings, statuses, bounds and paths."""

from __future__ import annotations

import re

import msgspec

from entitlement.decision import Reason
from gateway.client.meter import GATHER_S as TOLD_EVERY_S
from gateway.integrations import asgi, gate, openai, settings
from gateway.meter import GATHER_S, LEFT_MS
from tests.pages import ROOT, blocks
from tests.unit.test_docs import codes, numbers, rows, section

PAGE = "llm.md"
TEXT = (ROOT / "docs" / PAGE).read_text()


def test_every_setting_is_told_with_its_default_and_bound() -> None:
    told = {
        codes(name)[0]: (codes(default)[0], bound) for name, default, bound, _ in rows(section(PAGE, "Settings"))[2:]
    }
    wanted = {
        field.name.upper(): '""' if field.default == "" else str(field.default)
        for field in msgspec.structs.fields(settings.Settings)
    }
    assert {name: default for name, (default, _) in told.items()} == wanted
    bounds = {name: f"{low}..{high}" for name, (low, high) in settings._NUMBERS.items()}
    bounds |= {name: " ".join(f"`{word}`" for word in words) for name, words in settings._WORDS.items()}
    assert {name: bound for name, (_, bound) in told.items() if bound} == {n.upper(): b for n, b in bounds.items()}


def test_settings_that_are_named_elsewhere_are_there() -> None:
    shown = "".join(
        block.text for page in (ROOT / "docs" / PAGE, ROOT / "examples/vllm/README.md") for block in blocks(page)
    )
    shown += (ROOT / "examples" / "vllm" / "run.sh").read_text()
    named = {name.lower() for name in re.findall(rf"{settings.PREFIX}([A-Z_]+)", shown)}
    assert named and named <= set(settings.Settings.__struct_fields__)


def test_every_denial_is_told_with_its_status() -> None:
    told: dict[str, int] = {}
    for status, given, _ in rows(section(PAGE, "What is answered"))[2:]:
        told |= dict.fromkeys(codes(given), int(status))
    of_holds = {Reason.HOLD_NOT_FOUND, Reason.HOLD_FINALIZED}  # No attempt has the hold of another.
    for reason in set(Reason) - of_holds - {Reason.NONE}:
        refused = gate.denied(reason)
        assert told.pop(refused.code) == refused.status, reason
        assert bool(refused.retry_s) == (refused.status == 503)
    assert told == {
        "invalid_request": 400,
        "invalid_api_key": 401,
        "not_metered": 403,
        "request_too_large": 413,
        "internal": 500,
        "unavailable": 503,
    }


def test_every_path_that_is_charged_is_told() -> None:
    for kind in openai.KINDS:
        assert f"`/v1/{kind}`" in TEXT


def test_figures_are_as_they_are() -> None:
    answered = section(PAGE, "What is answered")
    assert asgi.MAX_BODY_BYTES == asgi.MAX_ANSWER_BYTES and asgi.MAX_BODY_BYTES in numbers(answered)
    assert openai.IMAGE_TOKENS == 1_000 and "(1,000 for a picture)" in TEXT
    assert openai.MOST_TOKENS == 2**40
    assert GATHER_S == 1 / 4 and "at most 4 a second" in TEXT
    assert TOLD_EVERY_S == 1 / 10 and "up to a tenth of a second ago" in TEXT
    assert (asgi.CLOSE_S, LEFT_MS, gate.PATIENCE_S) == (10, 10_000, 600)
