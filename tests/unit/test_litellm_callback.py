"""The LiteLLM callback between LiteLLM's hooks, without LiteLLM: whose a key is, and what ends a bill, once."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from entitlement.errors import InvalidArgument
from gateway.client import Signal
from gateway.integrations.callers import Caller, caller_of_key
from gateway.integrations.openai import Usage
from gateway.integrations.settings import Settings, checked, load


def key(**more: Any) -> Any:
    names = ("metadata", "org_id", "team_id", "user_id", "key_alias", "end_user_id")
    return SimpleNamespace(**(dict.fromkeys(names) | more))


class TestWhoPays:
    def test_the_team_and_its_user(self) -> None:
        assert caller_of_key(Settings(), key(team_id="acme", user_id="amy")) == Caller("acme", "amy")
        assert caller_of_key(Settings(), key(user_id="amy", end_user_id="x", key_alias="y")) == Caller("amy")

    @pytest.mark.parametrize(
        ("source", "found"),
        [
            ("metadata", {"metadata": {"entitlement_customer": "acme", "entitlement_subject": "amy"}}),
            ("org", {"org_id": "acme"}),
            ("key", {"key_alias": "acme"}),
            ("end_user", {"end_user_id": "acme"}),
        ],
    )
    def test_what_else_is_chosen(self, source: str, found: dict[str, Any]) -> None:
        settings = checked(Settings(litellm_customer=f"{source}, team", litellm_subject="metadata"))
        assert caller_of_key(settings, key(team_id="other", **found)).customer == "acme"
        assert caller_of_key(settings, key(team_id="other")) == Caller("other")

    def test_nobody(self) -> None:
        with pytest.raises(InvalidArgument, match="customer: the key has none of team,user"):
            caller_of_key(Settings(), key(end_user_id="amy"))
        with pytest.raises(InvalidArgument, match="customer: "):
            caller_of_key(Settings(), key(team_id="a team"))
        with pytest.raises(InvalidArgument, match="litellm_customer: 'teams' is not one of metadata, org, team"):
            load({"ENTITLEMENT_LLM_LITELLM_CUSTOMER": "teams"})


class Bill:
    def __init__(self) -> None:
        self.ask = SimpleNamespace(kind="chat/completions", streams=False, model="m")
        self.meter = SimpleNamespace(hold="h", signal=Signal.CONTINUE, room=self._room)
        self.told: list[Any] = []
        self.began = False

    async def _room(self) -> None: ...

    def chunk(self, texts: Any) -> None:
        self.told += [getattr(each, "text", each) for each in texts]
        self.began = True

    def usage(self, usage: Usage) -> None:
        self.told.append(usage)


class Gate:
    def __init__(self) -> None:
        self.bill = Bill()
        self.ended: list[str] = []
        self.told = asyncio.Event()

    async def open(self, caller: Caller, ask: Any) -> Bill:
        return self.bill

    def finish(self, bill: Bill, caller: Caller, *, whole: bool) -> None:
        self.ended.append("whole" if whole else "broken")
        self.told.set()

    def drop(self, bill: Bill) -> None:
        self.ended.append("dropped")


class Refusal(Exception):
    def __init__(self, status_code: int, detail: object, headers: object = None) -> None:
        self.status_code = status_code


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with nothing of LiteLLM's but the names it needs."""
    parts = {
        "fastapi": {"HTTPException": Refusal},
        "litellm": {},
        "litellm.integrations": {},
        "litellm.integrations.custom_logger": {"CustomLogger": object},
    }
    for name, attributes in parts.items():
        monkeypatch.setitem(sys.modules, name, made := ModuleType(name))
        vars(made).update(attributes)
    monkeypatch.delitem(sys.modules, "gateway.integrations.litellm", raising=False)
    yield importlib.import_module("gateway.integrations.litellm")
    sys.modules.pop("gateway.integrations.litellm", None)


@pytest.fixture
def logger(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = module.EntitlementLogger(Settings())
    monkeypatch.setattr(made, "_gate", Gate())
    return made


async def asked(logger: Any, call_type: str = "acompletion", **more: Any) -> dict[str, Any]:
    data = {"model": "m", "messages": [], **more}
    await logger.async_pre_call_hook(key(team_id="acme"), None, data, call_type)
    return data


async def success(logger: Any, data: Any, **more: Any) -> None:
    payload = {"metadata": {"usage_object": {"prompt_tokens": 3, "completion_tokens": 4}}}
    kwargs = {"litellm_params": data, "standard_logging_object": payload, **more}
    await logger.async_log_success_event(kwargs, {}, None, None)


async def failure(logger: Any, data: Any, status: int = 500) -> None:
    await logger.async_post_call_failure_hook(data, Refusal(status, ""), key())


async def chunks(*texts: str) -> AsyncIterator[dict[str, Any]]:
    for text in texts:
        yield {"choices": [{"index": 0, "delta": {"content": text}}]}


async def streamed(logger: Any, data: Any, response: Any) -> list[Any]:
    return [chunk async for chunk in logger.async_post_call_streaming_iterator_hook(key(), response, data)]


async def test_a_bill_ends_once(logger: Any) -> None:
    data = await asked(logger)
    for _ in range(2):
        await success(logger, data)
        await failure(logger, data)
    assert logger._gate.ended == ["whole"] and logger._gate.bill.told == [Usage(3, 4)] and not logger._open


async def test_what_was_never_let_in_has_nothing_to_end(logger: Any) -> None:
    for data in ({}, {"metadata": None}, {"metadata": {"entitlement_hold": 7}}, {"litellm_metadata": "x"}):
        await failure(logger, data)
        await success(logger, data)
    assert logger._gate.ended == []


@pytest.mark.parametrize(("status", "ended"), [(500, "dropped"), (499, "broken")])
async def test_a_failure(logger: Any, status: int, ended: str) -> None:
    await failure(logger, await asked(logger), status)
    assert logger._gate.ended == [ended]


async def test_a_failure_after_some_of_it_was_written(logger: Any) -> None:
    data = await asked(logger)
    assert len(await streamed(logger, data, chunks("one", "two"))) == 2
    await failure(logger, data)
    assert logger._gate.ended == ["broken"] and logger._gate.bill.told == ["one", "two"]


async def test_the_cache_costs_nothing(logger: Any) -> None:
    data = await asked(logger)
    cached = chunks("one", "two")
    response = SimpleNamespace(custom_llm_provider="cached_response", __aiter__=lambda: cached)

    class Cached:
        custom_llm_provider = response.custom_llm_provider

        def __aiter__(self) -> Any:
            return cached

    assert len(await streamed(logger, data, Cached())) == 2
    await success(logger, data, cache_hit=True)
    assert logger._gate.ended == ["dropped"] and not logger._gate.bill.told


@pytest.mark.parametrize(("original", "told"), [('{"usage": {}, "choices": []}', False), ('{"usage": {"a": 0}}', True)])
async def test_zeros_are_a_usage_if_the_model_has_sent_one(logger: Any, original: str, told: bool) -> None:
    zeros = {"metadata": {"usage_object": {"prompt_tokens": 0, "completion_tokens": 0}}}
    await success(logger, await asked(logger), standard_logging_object=zeros, original_response=original)
    assert logger._gate.bill.told == ([Usage(0, 0)] if told else [])
    assert logger._gate.ended == ["whole"]


@pytest.mark.parametrize("streams", [True, False])
async def test_when_nobody_says_how_it_ended(
    module: Any, logger: Any, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    monkeypatch.setattr(module, "LOGGED_S" if streams else "LONGEST_S", 0.0)
    data = await asked(logger)
    if streams:
        await streamed(logger, data, chunks("one"))
    await asyncio.wait_for(logger._gate.told.wait(), 5)
    assert logger._gate.ended == ["whole" if streams else "broken"] and not logger._open


async def test_the_hold_is_never_the_callers(logger: Any) -> None:
    for name in ("metadata", "litellm_metadata"):
        data = await asked(logger, **{name: {"entitlement_hold": "mine", "other": 1}})
        assert data[name] == {"entitlement_hold": "h", "other": 1}
        await success(logger, data)
    data = {"metadata": {"entitlement_hold": "mine"}, "model": "a,b"}
    with pytest.raises(Refusal):
        await asked(logger, **data)
    both = await asked(logger, metadata={"user_id": "x"}, litellm_metadata={})  # The model sees `metadata`.
    assert both["metadata"] == {"user_id": "x"} and both["litellm_metadata"] == {"entitlement_hold": "h"}


async def test_only_what_the_caller_asks_is_read(module: Any) -> None:
    asked = {"model": "m", "messages": [{"role": "user", "content": "a" * 40}], "stream": True}
    own = {"metadata": {"headers": "b" * 4_000}, "secret_fields": {"raw": "c" * 4_000}, "litellm_call_id": "d" * 4_000}
    ask = module._ask("acompletion", {**asked, **own, "proxy_server_request": {"body": asked, "headers": own}})
    assert ask.streams and sum(map(len, ask.texts)) == 44 and ask.read == 0
    templated = module._ask("acompletion", {**asked, "proxy_server_request": {"body": {"prompt_id": "p"}}})
    assert templated.texts == ask.texts


async def test_what_is_not_known_is_refused(module: Any, logger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refusal) as refused:
        await asked(logger, "aimage_generation")
    assert refused.value.status_code == 403
    monkeypatch.setattr(module, "MOST_OPEN", 0)
    with pytest.raises(Refusal) as refused:
        await asked(logger)
    assert refused.value.status_code == 503
    monkeypatch.setattr(logger, "_free", frozenset({"aimage_generation"}))
    assert "entitlement_hold" not in (await asked(logger, "aimage_generation"))["metadata"]


def test_the_instance_is_made_when_it_is_asked_for(module: Any) -> None:
    assert "entitlement" not in vars(module)
    assert module.entitlement is module.entitlement
    with pytest.raises(AttributeError):
        _ = module.nothing
