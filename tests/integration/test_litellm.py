"""A real LiteLLM proxy with the callback, before a model's server and on a real gateway: what is let in, what is
charged, what is given back.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import uvicorn
import yaml

from entitlement.rating import cost
from gateway.cli.stack import DevStack
from tests.model_server import WORD, ModelServer, Script
from tests.servers import ServerProcess, free_port
from tests.stacks import INPUT, OUTPUT, Site, environment, fresh, prepared, put_catalogue, site, until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "litellm"
LITELLM = ROOT / ".venv-litellm" / "bin" / "litellm"
USD = 10**9
AUTH = """
from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy._types import UserAPIKeyAuth


async def check(request, api_key):
    team, _, user = api_key.removeprefix("sk-").partition("~")
    return UserAPIKeyAuth(api_key=api_key, team_id=team or None, user_id=user or None, key_alias="an alias")


class Seen(CustomLogger):
    async def async_log_success_event(self, kwargs, response_obj, start_time, end_time):
        metadata = kwargs["standard_logging_object"]["metadata"]
        print("logged for", metadata["user_api_key_team_id"], kwargs["standard_logging_object"]["stream"], flush=True)


seen = Seen()
"""


def installed() -> None:
    if not LITELLM.exists():
        reason = "no LiteLLM in .venv-litellm: make litellm"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


class Models:
    """The servers behind the proxy: /v1 does what its scripts say, /broken/v1 fails always, /flaky/v1 `fails` times."""

    def __init__(self) -> None:
        self.server = ModelServer()
        self.fails = 0
        self.failed = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(self, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self._thread.start()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        if name := re.search(rb"r-[0-9a-f]{12}", body):  # Of its script; LiteLLM keeps `user` to itself.
            body = orjson.dumps({**orjson.loads(body), "user": name[0].decode()})
        told: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {**scope, "headers": [header for header in scope["headers"] if header[0] != b"content-length"]}

        async def receive_again() -> Any:
            return told.pop() if told else await receive()

        _, kind, *_ = scope["path"].split("/")
        if kind == "broken" or (kind == "flaky" and self.fails > 0):
            self.fails -= 1
            self.failed += 1
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "no"}}'})
            return
        await self.server(scope, receive_again, send)

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(10)


class Proxy(ServerProcess):
    """examples/litellm/run.sh, with more models and keys for its customers."""

    start_s = 100.0

    def __init__(self, folder: Path, models: str, gateway: str) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        (folder / "auth.py").write_text(AUTH)
        (folder / "config.yaml").write_text(json.dumps(_config(models)))  # YAML, too.
        told = {
            "PORT": str(port),
            "REPEATED_STREAMING_CHUNK_LIMIT": "1000000000",  # Ours say the same word all the time.
            "LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(32)}",  # It does not start without one; nobody uses it.
            "ENTITLEMENT_LLM_GATEWAY": gateway,
            "ENTITLEMENT_LLM_TIMEOUT_MS": "5000",
            "ENTITLEMENT_LLM_INPUT": "tokens?token_type=input",
            "ENTITLEMENT_LLM_OUTPUT": "tokens?token_type=output",
            "ENTITLEMENT_LLM_FIRST_OUTPUT": "64",
            "ENTITLEMENT_LLM_LITELLM_CUSTOMER": "team",
            "ENTITLEMENT_LLM_LITELLM_OPEN": "amoderation,moderation",
        }
        argv = ["env", *[f"{name}={value}" for name, value in told.items()], str(EXAMPLE / "run.sh")]
        super().__init__([*argv, "--config", str(folder / "config.yaml")], ready="Application startup complete")

    def said(self, text: str) -> bool:
        return any(text in line for line in self._tail)


def _config(models: str) -> Any:
    def model(name: str, path: str = "", **more: object) -> dict[str, object]:
        params = {"model": "openai/a-model", "max_retries": 0, "api_base": f"{models}{path}/v1", "api_key": "x", **more}
        return {"model_name": name, "litellm_params": params}

    config = yaml.safe_load((EXAMPLE / "config.yaml").read_text())
    config["model_list"] += [
        model("m"),
        model("v", model="hosted_vllm/a-model"),
        model("bridged", model="deepseek/a-model"),  # LiteLLM makes /v1/responses of its chat completions.
        model("broken", "/broken"),
        model("flaky", "/flaky"),
        model("falls-back", "/broken"),
    ]
    config["router_settings"] = {"fallbacks": [{"falls-back": ["m"]}], "disable_cooldowns": True, "retry_after": 0}
    config["litellm_settings"] |= {
        "callbacks": [config["litellm_settings"]["callbacks"], "auth.seen"],
        "num_retries": 1,
        "cache": True,
        "cache_params": {"type": "local", "mode": "default_off"},
    }
    config["general_settings"]["custom_auth"] = "auth.check"
    return config


class Shop:
    def __init__(self, at: Site, proxy: Proxy, models: Models) -> None:
        self.at = at
        self.proxy = proxy
        self.models = models

    async def ask(self, customer: str, script: Script, path: str = "chat/completions", **more: Any) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            return await client.post(**self.request(customer, script, path, **more))

    def request(self, customer: str, script: Script, path: str = "chat/completions", **more: Any) -> dict[str, Any]:
        name = fresh("r")
        self.models.server.scripts[name] = script
        headers = {"authorization": f"Bearer sk-{customer}", **more.pop("headers", {})}
        body = {"model": "m", "messages": [{"role": "user", "content": f"{name} {WORD * 7}"}], **more}
        if "messages" not in path and "chat" not in path:
            del body["messages"]
            body["input" if path in ("embeddings", "responses") else "prompt"] = name
        return {"url": f"{self.proxy.url}/v1/{path}", "headers": headers, "json": body}

    async def charged(self, customer: str, read: int, written: int) -> None:
        """Exactly so many tokens are in the ledger, and nothing is held any more."""
        assert await self.units(customer) == {"input": read, "output": written}
        assert sum((await self.at.booked(customer)).values()) == cost(INPUT, read) + cost(OUTPUT, written)

    async def units(self, customer: str) -> dict[str, int]:
        """Once nothing is held any more."""
        await until(lambda: self.at.balance(customer), lambda found: not found.held_nanos, "something stays held")
        await self.at.verified(customer)
        rows = await self.at.rows("SELECT meter, quantity FROM meters WHERE customer = $1", customer)
        found = Counter({"input": 0, "output": 0})
        for row in rows:
            found[row["meter"].rpartition("=")[2]] += int(row["quantity"])
        return dict(found)


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    made = Models()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def stack_and_proxy(folders: Callable[[], Path], models: Models) -> Iterator[tuple[DevStack, Proxy]]:
    installed()
    with DevStack(prepared(folders() / "data"), env=environment("grpcio")) as stack:
        put_catalogue(stack)
        proxy = Proxy(folders(), models.url, stack.gateway)
        yield stack, proxy
        proxy.stop()


@pytest.fixture
async def shop(stack_and_proxy: tuple[DevStack, Proxy], models: Models) -> AsyncIterator[Shop]:
    stack, proxy = stack_and_proxy
    async with site(stack) as at:
        yield Shop(at, proxy, models)


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else orjson.loads(each) for each in data]


class TestWhatIsCharged:
    async def test_an_answer_in_one_piece(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(33, 50))
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 50
        await shop.charged(customer, 33, 50)

    async def test_a_stream_is_what_its_usage_says(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(33, 50), stream=True)
        assert answer.text.count(WORD) == 50 and answer.text.endswith("data: [DONE]\n\n")
        await shop.charged(customer, 33, 50)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_usage_of_zero_is_zero(self, shop: Shop, stream: bool) -> None:
        customer = await shop.at.customer(USD)
        assert (await shop.ask(customer, Script(0, 0), stream=stream)).status_code == 200
        await shop.charged(customer, 0, 0)

    async def test_embeddings_are_only_read(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(12), "embeddings")
        assert answer.status_code == 200, answer.text
        await shop.charged(customer, 12, 0)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_without_a_usage(self, shop: Shop, stream: bool) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(33, 50, usage="none"), stream=stream)
        assert answer.status_code == 200
        units = await shop.units(
            customer
        )  # LiteLLM counts a stream itself; what it does not count are four bytes each.
        assert (units["input"] >= 12 and units["output"] >= 50) if stream else units == {"input": 12, "output": 50}

    async def test_a_cached_answer_costs_nothing_more(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        request = shop.request(customer, Script(33, 50), cache={"use-cache": True})
        asked = len(shop.models.server.requests)
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            for _ in range(2):
                assert (await client.post(**request)).status_code == 200
                await shop.charged(customer, 33, 50)
        assert len(shop.models.server.requests) == asked + 1

    async def test_the_example_answers(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(), model="gpt-4o")
        assert answer.json()["choices"][0]["message"]["content"] == "The answer is 42."
        await shop.charged(customer, 10, 20)


class TestFailures:
    async def test_a_retry_is_one_reservation_and_one_charge(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        shop.models.fails = 1
        answer = await shop.ask(customer, Script(33, 50), model="flaky")
        assert answer.status_code == 200 and shop.models.fails == 0
        await shop.charged(customer, 33, 50)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_so_is_a_fallback(self, shop: Shop, stream: bool) -> None:
        customer = await shop.at.customer(USD)
        before = shop.models.failed
        answer = await shop.ask(customer, Script(33, 50), model="falls-back", stream=stream)
        assert answer.status_code == 200 and shop.models.failed > before
        await shop.charged(customer, 33, 50)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_what_fails_in_the_end_costs_nothing(self, shop: Shop, stream: bool) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(), model="broken", stream=stream)
        assert answer.status_code == 500
        await shop.charged(customer, 0, 0)

    async def test_a_stream_that_breaks_costs_what_was_written(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(33, 50, fails_after=20, pace_s=0.02), stream=True)
        written = answer.text.count(WORD)  # The last ones may be lost with their connection.
        assert 0 < written <= 20 and events(answer.text)[-1]["error"]
        await shop.charged(customer, 12, written)

    async def test_a_caller_who_leaves_pays_for_what_was_written(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        script = Script(33, 10**6, pace_s=0.001)
        request = shop.request(customer, script, stream=True)
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client, client.stream("POST", **request) as answer:
            async for _ in answer.aiter_lines():
                if script.chunks > 20:
                    break

        async def left() -> bool:
            return script.left

        await until(left, bool, "the model goes on writing")
        units = await shop.units(customer)  # As LiteLLM counts them: more or less a token a word.
        assert units["input"] >= 12 and 10 <= units["output"] <= 2 * script.chunks


class TestRefusals:
    async def test_what_is_not_granted(self, shop: Shop) -> None:
        poor = await shop.at.customer(1)
        asked = len(shop.models.server.requests)
        for customer, more, status, kind, code in (
            (poor, {}, 402, "insufficient_quota", "insufficient_credits"),
            (poor, {"stream": True}, 402, "insufficient_quota", "insufficient_credits"),
            (fresh("nobody"), {}, 403, "permission_error", "customer_not_found"),
            ("", {}, 400, "invalid_request_error", "invalid_request"),
            (poor, {"model": "m,m"}, 400, "invalid_request_error", "invalid_request"),
            (poor, {"path": "images/generations"}, 403, "permission_error", None),
        ):
            answer = await shop.ask(customer, Script(), **more)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (status, kind, str(status)), (customer, more)
            assert code is None or error["provider_specific_fields"] == {"entitlement": code}
        assert "the credit does not cover this request" in (await shop.ask(poor, Script())).json()["error"]["message"]
        assert len(shop.models.server.requests) == asked
        await shop.charged(poor, 0, 0)

    async def test_a_stream_ends_with_the_money(self, shop: Shop) -> None:
        customer = await shop.at.customer(cost(INPUT, 12) + cost(OUTPUT, 200))
        script = Script(12, 10**6, pace_s=0.001)
        answer = await shop.ask(customer, script, stream=True)
        *_, last, done = events(answer.text)
        assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}] and done == "[DONE]"
        written = answer.text.count(WORD)
        assert 180 <= written <= 201
        await shop.charged(customer, 12, written)

        async def left() -> bool:
            return script.left and shop.proxy.said(f"logged for {customer} True")

        await until(left, bool, "the model goes on writing, or LiteLLM does not know that it has ended")


class TestOtherCalls:
    async def test_ids_that_a_caller_has_chosen_are_not_believed(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        for more in ({"litellm_metadata": {"entitlement_hold": "x"}}, {"metadata": {"entitlement_hold": "y"}}):
            answer = await shop.ask(customer, Script(10, 5), headers={"x-litellm-call-id": "one"}, **more)
            assert answer.status_code == 200, answer.text
        await shop.charged(customer, 20, 10)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_messages(self, shop: Shop, stream: bool) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(33, 50), "messages", model="v", max_tokens=100, stream=stream)
        assert answer.status_code == 200 and answer.text.count(WORD) == 50
        await shop.charged(customer, 33, 50)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_responses(self, shop: Shop, stream: bool) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(33, 50), "responses", model="bridged", stream=stream)
        assert answer.status_code == 200 and answer.text.count(WORD) >= 50, answer.text
        await shop.charged(customer, 33, 50)

    async def test_completions(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        answer = await shop.ask(customer, Script(33, 50), "completions", model="v", max_tokens=100)
        assert answer.status_code == 200, answer.text
        await shop.charged(customer, 33, 50)

    async def test_what_is_open_is_not_charged(self, shop: Shop) -> None:
        assert (await shop.ask(fresh("nobody"), Script(), "moderations")).status_code not in (402, 403)
