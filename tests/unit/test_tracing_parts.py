"""What traces are made with: the extra, OpenTelemetry's own variables, a batch's links, a caller's metadata."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from opentelemetry.sdk.resources import SERVICE_NAME
from opentelemetry.sdk.trace.export import ConsoleSpanExporter
from opentelemetry.trace import NonRecordingSpan, use_span

from entitlement.errors import InvalidArgument
from entitlement.span_contexts import context_of, of_metadata, text_of
from entitlement.traceparent import field_of
from gateway import settings as gateway_settings
from gateway.client import tracing
from gateway.tracing import provider as of_gateway
from ledger_sync import settings as sync_settings
from ledger_sync.tracing import provider as of_sync
from ledger_sync.tracing.traced import MAX_LINKS, distinct, traceparent_of

SAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-01"
UNSAMPLED = f"00-{'ef' * 16}-{'cd' * 8}-00"


@pytest.mark.parametrize("settings", [gateway_settings, sync_settings], ids=["gateway", "sync"])
def test_on_without_the_extra_is_an_error_that_says_what_to_install(
    settings: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = {f"{settings.PREFIX}ANONYMOUS": "all"} if settings is gateway_settings else {}
    on = off | {f"{settings.PREFIX}TRACING": "true"}
    assert settings.load(on).tracing is True and settings.load(off).tracing is False
    for name in [name for name in sys.modules if name == "opentelemetry" or name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(InvalidArgument, match=r"^tracing: .* pip install 'entitlement-gateway\[otel\]'$"):
        settings.load(on)
    assert settings.load(off).tracing is False


@pytest.mark.parametrize("module", [of_gateway, of_sync], ids=["gateway", "sync"])
def test_opentelemetrys_own_variables_say_what_it_is_called_and_where_spans_go(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert module.provider("ours").resource.attributes[SERVICE_NAME] == "ours"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "theirs")
    assert module.provider("ours").resource.attributes[SERVICE_NAME] == "theirs"
    (console,) = module.exporters({"OTEL_TRACES_EXPORTER": " console , none"})
    assert isinstance(console, ConsoleSpanExporter)
    for environment, package in (({}, "http"), ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc")):
        (otlp,) = module.exporters(environment)
        assert type(otlp).__module__.startswith(f"opentelemetry.exporter.otlp.proto.{package}")
        otlp.shutdown()
    with pytest.raises(InvalidArgument, match=r"^tracing: OTEL_TRACES_EXPORTER: 'nowhere' .*otlp_proto_http"):
        module.exporters({"OTEL_TRACES_EXPORTER": "nowhere"})
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")  # Below what is sent at a time.
    with pytest.raises(InvalidArgument, match=r"^tracing: a variable OTEL_"):
        module.provider("ours")


@pytest.mark.parametrize("settings", [gateway_settings, sync_settings], ids=["gateway", "sync"])
def test_what_the_collector_asks_for_is_taken_out_of_logs(
    settings: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=planted-one-0123456789,x-other=planted%20two")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "planted-three-0123456789")
    redact = settings.Settings().redactor.text
    told = redact("Header format invalid: planted-one-0123456789, planted two; planted-three-0123456789 and the rest")
    assert "planted" not in told and told.endswith("and the rest")


def test_a_batch_is_linked_to_so_many_traces_and_to_each_once() -> None:
    texts = [f"00-{number:032x}-{'cd' * 8}-01" for number in range(1, 301)]
    found = distinct(["", texts[0], *texts, *texts])
    assert [text_of(context) for context in found] == texts[: MAX_LINKS + 1]
    assert distinct(["", ""]) == []


def test_an_event_s_traceparent_is_its_attribute_and_no_other() -> None:
    assert traceparent_of(b'{"id":"a","traceparent":"%b","data":{}}' % SAMPLED.encode()) == SAMPLED
    assert traceparent_of(b'{"id":"a","data":{"traceparent":"%b"}}' % SAMPLED.encode()) == ""
    assert traceparent_of(b'{"id":"a","data":{}}') == ""


def test_metadata_with_more_than_one_has_none() -> None:
    one = ("traceparent", SAMPLED)
    assert of_metadata([("x", "y"), one]) == context_of(SAMPLED)
    assert of_metadata([one, one]) is of_metadata([]) is of_metadata([("traceparent", SAMPLED.encode())]) is None


def test_a_client_sends_the_span_that_is_current_besides_its_token() -> None:
    def token() -> tuple[tuple[str, str], ...]:
        return (("authorization", "Bearer t"),)

    caller = tracing.caller()
    alone = tracing.told(token, caller)
    assert (caller(), alone()) == ("", token())
    context = context_of(SAMPLED)
    assert context is not None
    with use_span(NonRecordingSpan(context)):
        assert (caller(), alone()) == (SAMPLED, (*token(), ("traceparent", SAMPLED)))


def test_of_requests_that_travel_together_a_sampled_one_is_followed() -> None:
    together = tracing.told_together(lambda: None, tracing.caller())
    unsampled = b"b" + field_of(SAMPLED)[:2] + UNSAMPLED.encode()
    assert together([b"a"]) is None
    assert together([b"a", unsampled]) == (("traceparent", UNSAMPLED),)
    assert together([unsampled, b"a" + field_of(SAMPLED)]) == (("traceparent", SAMPLED),)


def test_a_client_without_opentelemetry_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    caller = tracing.caller()

    def nothing() -> None:
        return None

    assert caller is str and tracing.told(nothing, caller) is nothing
    assert tracing.told_together(nothing, caller)([b"a" + field_of(SAMPLED)]) is None


def test_both_processes_make_their_provider_in_the_same_way() -> None:
    """They may not import each other, and what they share is pure."""
    assert Path(of_gateway.__file__).read_text() == Path(of_sync.__file__).read_text()
