"""What becomes of settings that are read again, and of lines below the level."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import structlog

from entitlement import logs
from entitlement.environment import merged
from entitlement.errors import InvalidArgument
from gateway import settings as gateway_settings
from gateway.frontdoor.doors import FrontDoors
from gateway.telemetry import configure
from ledger_sync import settings as sync_settings
from ledger_sync.telemetry import configure_logs


@pytest.fixture
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_what_may_change_is_taken_and_the_rest_is_named() -> None:
    now = gateway_settings.Settings(drain_ms=1, tenant="a")
    found = gateway_settings.Settings(drain_ms=2, tenant="b", log_level="debug")
    taken, changed, left = merged(now, found, gateway_settings.RELOADED)
    assert (taken.drain_ms, taken.tenant, taken.log_level) == (2, "a", "debug")
    assert (changed, left) == (["drain_ms", "log_level"], ["tenant"])


@pytest.mark.parametrize("settings", [gateway_settings, sync_settings], ids=["gateway", "sync"])
def test_what_may_change_are_settings(settings: ModuleType) -> None:
    assert set(settings.RELOADED) <= set(settings.Settings.__struct_fields__)


def test_front_doors_take_another_mapping_and_refuse_one_that_opens_other_doors(tmp_path: Path) -> None:
    file = tmp_path / "mapping.yaml"
    file.write_text(_mapping("tokens"))
    nobody: Any = None
    doors = FrontDoors(str(file), nobody, nobody, nobody, "acme")
    assert doors._authorization is not None
    before = doors._authorization.table
    for bad, why in ((_mapping("a b"), "feature"), (_mapping("calls", "descriptors"), "other doors")):
        file.write_text(bad)
        with pytest.raises(InvalidArgument, match=why):
            doors.reload()
        assert doors._authorization.table is before
    file.write_text(_mapping("calls"))
    doors.reload()
    assert doors._authorization.table is not before


def _mapping(feature: str, doors: str = "requests") -> str:
    customer = "{header: x-customer}" if doors == "requests" else "{descriptor: customer}"
    return f"{doors}: {{rules: [{{customer: {customer}, feature: {feature!r}}}]}}"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("begin", [configure, configure_logs], ids=["gateway", "sync"])
def test_the_level_of_a_logger_that_is_in_use_changes(
    begin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    monkeypatch.setattr("sys.stderr", output)
    begin("warning")
    log = structlog.get_logger("ours")
    for level in ("warning", "debug", "error"):
        logs.set_level(level)
        for method in ("debug", "info", "warning", "error"):
            getattr(log, method)(f"{method} at {level}")
        logging.getLogger("library").warning(f"library at {level}")
    told = [json.loads(line)["event"] for line in output.getvalue().splitlines()]
    assert told == [
        *("warning at warning", "error at warning", "library at warning"),
        *("debug at debug", "info at debug", "warning at debug", "error at debug", "library at debug"),
        "error at error",
    ]
