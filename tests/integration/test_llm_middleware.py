"""The OpenAI middleware on a real gateway: who is let in, what is charged, how a stream ends when the money does."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import msgspec
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from entitlement.rating import cost
from gateway.client import Client
from gateway.integrations.asgi import EntitlementMiddleware
from gateway.integrations.settings import Settings
from tests.integration.test_trace import read_rows
from tests.model_server import WORD, Driver, ModelServer, Script
from tests.stacks import DEADLINE_S, INPUT, OUTPUT, Site, fresh, until

USD = 10**9
READ, WRITTEN = "tokens?token_type=input", "tokens?token_type=output"


class Shop:
    """A server behind the middleware."""

    def __init__(self, at: Site, client: Client, **settings: Any) -> None:
        self.at = at
        self.server = ModelServer()
        told = {"input": READ, "output": WRITTEN, **settings}
        self.app = EntitlementMiddleware(self.server, Settings(**told), client=client)

    def caller(self, script: Script, *, stream: bool = True, path: str = "/v1/chat/completions", **more: Any) -> Driver:
        name = fresh("r")
        self.server.scripts[name] = script
        body = {"model": "m", "user": name, "messages": [{"role": "user", "content": WORD * 7}], **more}
        return Driver(self.app, body | ({"stream": True} if stream else {}), path)

    async def charged(self, customer: str, read: int, written: int) -> None:
        """Exactly so many tokens are in the ledger, and nothing is held any more."""
        await until(lambda: self.at.balance(customer), lambda found: not found.held_nanos, "something stays held")
        await self.at.verified(customer)
        assert await self.units(customer) == {"input": read, "output": written}
        total = cost(INPUT, read) + cost(OUTPUT, written)
        assert sum((await self.at.booked(customer)).values()) == total

    async def units(self, customer: str) -> dict[str, int]:
        rows = await self.at.rows("SELECT meter, quantity FROM meters WHERE customer = $1", customer)
        found = Counter({"input": 0, "output": 0})
        for row in rows:
            found[row["meter"].rpartition("=")[2]] += int(row["quantity"])
        return dict(found)


@pytest.fixture(scope="module")
def transport() -> str:
    """One is enough: what talks to the gateway is the client, whose tests have both."""
    return "envoy"


@pytest.fixture
async def client(at: Site) -> AsyncIterator[Client]:
    async with Client(at.stack.gateway, timeout_ms=5_000) as client:
        yield client


@pytest.fixture
def shop(at: Site, client: Client) -> Shop:
    return Shop(at, client)


class TestWhatIsCharged:
    @pytest.mark.parametrize("usage", ["end", "always", "twice"])
    async def test_a_stream_is_what_its_usage_says(self, shop: Shop, usage: str) -> None:
        customer = await shop.at.customer(USD)
        caller = await shop.caller(Script(33, 50, usage=usage)).run(x_customer_id=customer)
        assert caller.status == 200 and caller.ended and caller.answered["x-entitlement-hold"]
        assert caller.events[-1] == "[DONE]" and caller.texts == 50
        assert not [event for event in caller.events[:-1] if not event["choices"]]  # It did not ask for usage.
        assert shop.server.requests[-1]["stream_options"] == {"include_usage": True}
        await shop.charged(customer, 33, 50)

    async def test_a_caller_who_asks_for_usage_has_it(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        caller = await shop.caller(Script(33, 5), stream_options={"include_usage": True}).run(x_customer_id=customer)
        assert caller.events[-2]["usage"]["completion_tokens"] == 5
        await shop.charged(customer, 33, 5)

    async def test_an_answer_in_one_piece(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        caller = await shop.caller(Script(33, 50), stream=False).run(x_customer_id=customer)
        assert caller.json["usage"]["completion_tokens"] == 50
        await shop.charged(customer, 33, 50)

    async def test_embeddings_are_only_read(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        caller = await shop.caller(Script(12), stream=False, path="/v1/embeddings", input="a" * 40).run(
            x_customer_id=customer
        )
        assert caller.status == 200
        await shop.charged(customer, 12, 0)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_usage_of_zero_is_zero(self, shop: Shop, stream: bool) -> None:
        customer = await shop.at.customer(USD)
        await shop.caller(Script(0, 0), stream=stream).run(x_customer_id=customer)
        await shop.charged(customer, 0, 0)

    @pytest.mark.parametrize("stream", [True, False])
    async def test_without_a_usage_the_texts_count(self, shop: Shop, stream: bool) -> None:
        customer = await shop.at.customer(USD)
        await shop.caller(Script(33, 50, chunk=3, usage="none"), stream=stream).run(x_customer_id=customer)
        await shop.charged(customer, 8, 50)  # Seven words and "user" are read.

    async def test_cached_tokens_have_a_price_of_their_own(self, at: Site, client: Client) -> None:
        shop = Shop(at, client, cached="tokens?token_type=output")
        customer = await at.customer(USD)
        raw = orjson.dumps(
            {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34,
                                      "prompt_tokens_details": {"cached_tokens": 20}}}
        )  # fmt: skip
        await shop.caller(Script(0, 0, usage="none", raw=(b"data: " + raw + b"\n\n",))).run(x_customer_id=customer)
        await shop.charged(customer, 10, 24)

    async def test_chunks_that_are_no_json_are_passed_on_and_counted(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        raw = (b": ping\n\n", b"data: not json at all\n\n", b"event: x\r\ndata: [1]\r\n\r\n")
        caller = await shop.caller(Script(0, 0, usage="none", raw=raw)).run(x_customer_id=customer)
        assert caller.body.startswith(b"".join(raw))
        await shop.charged(customer, 8, -(-sum(map(len, raw[1:])) // 4))


class TestBreaks:
    async def test_a_caller_who_leaves_pays_for_what_was_written(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        caller = shop.caller(script := Script(33, 50))
        caller.leaves_after = 20
        await caller.run(x_customer_id=customer)
        assert script.left and script.chunks < 50
        await shop.charged(customer, 8, script.chunks)

    async def test_or_for_what_was_told_if_that_is_the_rule(self, at: Site, client: Client) -> None:
        shop = Shop(at, client, on_break="reported")
        customer = await at.customer(USD)
        caller = shop.caller(script := Script(33, 50, chunk=2))
        caller.leaves_after = 20
        await caller.run(x_customer_id=customer)
        await shop.charged(customer, 0, script.chunks)

    async def test_a_server_that_fails_at_once_costs_nothing(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        for script in (Script(fails_after=0), Script(status=500), Script(status=400)):
            for stream in (True, False):
                caller = await shop.caller(script, stream=stream).run(x_customer_id=customer)
                assert caller.error or caller.status == script.status
        await shop.charged(customer, 0, 0)

    async def test_one_that_fails_later_costs_what_it_wrote(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        caller = await shop.caller(Script(33, 50, fails_after=20)).run(x_customer_id=customer)
        assert caller.error and not caller.ended
        await shop.charged(customer, 8, 20)

    async def test_a_task_that_is_cancelled(self, shop: Shop) -> None:
        customer = await shop.at.customer(USD)
        caller = shop.caller(script := Script(33, 10**6, pace_s=0.001))
        task = asyncio.create_task(caller.run(x_customer_id=customer))

        async def written() -> int:
            return script.chunks

        await until(written, lambda chunks: chunks > 20, "it does not write")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await shop.charged(customer, 8, script.chunks)


class TestTheMoneyEnds:
    async def test_a_stream_is_ended_as_if_it_were_long_enough(self, at: Site, client: Client) -> None:
        shop = Shop(at, client, first_output=64)
        customer = await at.customer(cost(INPUT, 8) + cost(OUTPUT, 200))
        caller = shop.caller(script := Script(8, 10**6), stream_options={"include_usage": True})
        await caller.run(x_customer_id=customer)
        assert caller.ended and script.left
        last, usage, done = caller.events[-3:]
        assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}] and last["id"] == "x"
        assert last["entitlement"]["reason"] == "INSUFFICIENT_CREDITS"
        assert usage["usage"] == {
            "prompt_tokens": 8,
            "completion_tokens": caller.texts,
            "total_tokens": 8 + caller.texts,
        }
        assert done == "[DONE]"
        await shop.charged(customer, 8, caller.texts)
        balance = await at.balance(customer)
        assert -cost(OUTPUT, 1) - 1 <= balance.available_nanos <= cost(OUTPUT, 64 // 16) + 1

    @pytest.mark.parametrize("version", ["2.3", "2.4"])
    @pytest.mark.parametrize("looks", [True, False])
    async def test_an_application_of_starlette_ends_its_work(
        self, at: Site, client: Client, version: str, looks: bool
    ) -> None:
        """Before 2.4 it hears of the end from `receive`, and after from `send`; or it looks by itself."""
        customer = await at.customer(cost(INPUT, 8) + cost(OUTPUT, 50))
        written, ended = 0, asyncio.Event()

        async def answer(request: Request) -> StreamingResponse:
            async def write() -> AsyncIterator[bytes]:
                nonlocal written
                try:
                    while not (looks and await request.is_disconnected()):
                        written += 1
                        choice = {"index": 0, "delta": {"content": WORD}, "finish_reason": None}
                        yield b"data: " + orjson.dumps({"id": "x", "choices": [choice]}) + b"\n\n"
                        await asyncio.sleep(0)
                finally:
                    ended.set()

            return StreamingResponse(write(), media_type="text/event-stream")

        app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
        metered = EntitlementMiddleware(app, Settings(input=READ, output=WRITTEN, first_output=16), client=client)
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": WORD * 7}]}
        caller = await Driver(metered, body).run(x_customer_id=customer, version=version)
        async with asyncio.timeout(DEADLINE_S):
            await ended.wait()
        assert caller.ended and caller.texts <= written <= caller.texts + 5
        await until(lambda: at.balance(customer), lambda found: not found.held_nanos, "something stays held")

    async def test_twenty_at_once_do_not_pass_the_gate_by_more_than_a_chunk_each(
        self, at: Site, client: Client
    ) -> None:
        shop = Shop(at, client, first_output=10)
        customer = await at.customer(cost(INPUT, 160) + cost(OUTPUT, 1_000))
        callers = [shop.caller(Script(8, 10**6, chunk=4)) for _ in range(20)]
        await asyncio.gather(*[caller.run(x_customer_id=customer) for caller in callers])
        assert all(caller.ended for caller in callers)
        written = sum(caller.body.count(WORD.encode()) for caller in callers)
        await until(lambda: at.balance(customer), lambda found: not found.held_nanos, "something stays held")
        await at.verified(customer)
        assert (await at.balance(customer)).available_nanos >= -20 * cost(OUTPUT, 4)
        assert written >= 800

    async def test_nothing_is_let_in_without_money(self, shop: Shop) -> None:
        customer = await shop.at.customer(cost(INPUT, 8))
        caller = await shop.caller(Script()).run(x_customer_id=customer)
        assert caller.status == 402
        assert caller.json["error"]["type"] == "insufficient_quota"
        assert caller.json["error"]["code"] == "insufficient_credits"
        assert not shop.server.requests


class TestBadInput:
    @pytest.mark.parametrize(
        ("path", "body", "status", "message"),
        [
            ("/v1/chat/completions", b"{", 400, "body: is not JSON"),
            ("/v1/chat/completions", b"[]", 400, "body: is not a JSON object"),
            ("/v1/chat/completions", b"{}", 400, "model: is not there"),
            ("/v1/chat/completions", b'{"model":"m","n":-1}', 400, "n: -1 is not a whole number in 0..1099511627776"),
            ("/v1/chat/completions", b'{"model":""}', 400, "model: "),
            ("/v1/images/generations", b'{"model":"m"}', 403, "POST /v1/images/generations is not metered here"),
        ],
    )
    async def test_requests(self, shop: Shop, path: str, body: bytes, status: int, message: str) -> None:
        caller = await Driver(shop.app, body, path).run(x_customer_id="nobody")
        assert caller.status == status and caller.json["error"]["message"].startswith(message)
        assert not shop.server.requests

    async def test_who_it_is(self, shop: Shop) -> None:
        assert (await shop.caller(Script()).run()).status == 401
        assert (await shop.caller(Script()).run(x_customer_id="a:b")).status == 400
        caller = await shop.caller(Script()).run(x_customer_id="nobody")
        assert caller.status == 403 and caller.json["error"]["code"] == "customer_not_found"
        assert not shop.server.requests

    async def test_what_is_open(self, shop: Shop) -> None:
        assert (await Driver(shop.app, b"", "/v1/models").run(method="GET")).status == 200
        assert (await Driver(shop.app, b'{"model":"m"}', "/tokenize").run()).status == 200

    async def test_a_tokenizer_that_throws(self, at: Site, client: Client) -> None:
        def throws(model: str, text: str) -> int:
            raise KeyError(text)

        shop = Shop(at, client)
        shop.app = EntitlementMiddleware(
            shop.server, Settings(input=READ, output=WRITTEN), client=client, tokenizer=throws
        )
        customer = await at.customer(USD)
        await shop.caller(Script(33, 50, usage="none")).run(x_customer_id=customer)
        await shop.charged(customer, 8, 50)


class Line(msgspec.Struct):
    """Of the log that the rule is applied to."""

    customer: str
    read: int
    script: Script
    prompt: int  # tokens by its length


async def test_a_trace_is_charged_to_the_nano(at: Site, client: Client, seed: int) -> None:
    """One in ten callers leaves, one in a hundred servers fails."""
    random = Random(seed)
    shop = Shop(at, client)
    customers = [await at.customer(1_000 * USD) for _ in range(8)]
    log: list[Line] = []
    rows = random.sample(read_rows(seed), int(os.environ.get("LLM_TRACE_ROWS") or 600))

    async def live() -> None:
        while rows:
            row = rows.pop()
            script = Script(row.context_tokens, row.generated_tokens, chunk=random.choice((1, 1, 4, 16)))
            if random.random() < 0.01:
                script.fails_after = random.randrange(0, 30)
            caller = shop.caller(script, messages=[{"role": "user", "content": "a" * random.randrange(4_000)}])
            if random.random() < 0.1:
                caller.leaves_after = random.randrange(0, max(1, script.written // script.chunk)) + 1
            line = Line(random.choice(customers), row.context_tokens, script, 0)
            line.prompt = -(-(len(orjson.loads(caller._body)["messages"][0]["content"]) + 4) // 4)
            log.append(line)
            await caller.run(x_customer_id=line.customer)

    await asyncio.gather(*[live() for _ in range(16)])
    read, written = Counter[str](), Counter[str]()
    broken = 0
    for line in log:
        script = line.script
        if script.said_end:
            read[line.customer] += script.read
            written[line.customer] += script.written
        elif script.fails_after != 0:
            broken += 1
            read[line.customer] += line.prompt
            written[line.customer] += min(script.chunks * script.chunk, script.written)
    print(f"seed {seed}: {len(log)} requests, {broken} broke off")
    assert len(log) // 30 < broken < len(log) // 5
    for customer in customers:
        await shop.charged(customer, read[customer], written[customer])
