"""What the middleware tells a meter, of answers that try to be free: a made-up meter keeps what it is told."""

from __future__ import annotations

import asyncio
import gzip
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import orjson
import pytest

from entitlement.v1 import gateway_pb2 as pb
from gateway.client import Client, Reason, Signal, Unavailable, Usage
from gateway.integrations.asgi import EntitlementMiddleware
from gateway.integrations.settings import Settings
from tests.model_server import WORD, Driver

CHAT = "/v1/chat/completions"


class Meter:
    """Lets so many tokens through."""

    def __init__(self, usage: Sequence[Usage], most: int) -> None:
        self.held = {_kind(line.dimensions): line.quantity for line in usage}
        self.used = Counter[str]()
        self.most = most
        self.hold = "h"
        self.allowed, self.signal, self.reason = True, Signal.CONTINUE, Reason.NONE
        self.uncharged: tuple[Usage, ...] = ()
        self.unacknowledged: tuple[Usage, ...] = ()
        self.due = 0
        self.ended = asyncio.Event()

    def use(self, feature: str, quantity: int, dimensions: Mapping[str, str]) -> None:
        assert quantity > 0
        self.used[_kind(dimensions)] += quantity

    def expect(self, *due: Usage) -> None:
        self.due = sum(line.quantity for line in due if _kind(line.dimensions) == "output")

    async def room(self) -> None:
        if self.used["output"] + self.due >= self.most:
            self.signal, self.reason = Signal.STOP, Reason.INSUFFICIENT_CREDITS

    async def end(self) -> None:
        self.ended.set()


class Gateway:
    """In place of a client."""

    def __init__(self, most: int = 10**9) -> None:
        self.most = most
        self.meters: list[Meter] = []

    async def start(self) -> None: ...

    async def open_meter(self, customer: str, *, usage: Sequence[Usage], **more: Any) -> Meter:
        self.meters.append(Meter(usage, self.most))
        return self.meters[-1]


class Answer:
    """A server that answers with these parts."""

    def __init__(
        self, *parts: bytes, headers: Mapping[str, str] | None = None, status: int = 200, ends: bool = True
    ) -> None:
        self.parts = parts
        self.status = status
        self.headers = {"content-type": "application/json"} | dict(headers or {})
        self.ends = ends
        self.asked: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked = scope
        await receive()
        headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if self.ends:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _kind(dimensions: Mapping[str, str]) -> str:
    return dimensions["token_type"]


async def told(answer: Answer, request: Mapping[str, Any] | None = None, path: str = CHAT, **more: Any) -> Driver:
    """What the meter was told is `driver.used`; `more`: settings, and `most` that the meter lets through."""
    gateway = Gateway(more.pop("most", 10**9))
    app = EntitlementMiddleware(answer, Settings(**more), client=gateway)  # type: ignore[arg-type]
    driver = Driver(app, {"model": "m", "prompt": WORD, **(request or {})}, path)
    await driver.run(x_customer_id="amy", accept_encoding="gzip")
    for meter in gateway.meters:
        async with asyncio.timeout(5):
            await meter.ended.wait()
    driver.used = dict(gateway.meters[0].used) if gateway.meters else {}  # type: ignore[attr-defined]
    driver.held = gateway.meters[0].held if gateway.meters else {}  # type: ignore[attr-defined]
    return driver


def sse(*chunks: Mapping[str, Any]) -> bytes:
    return b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)


def chunk(text: str = "", index: int = 0, *, usage: tuple[int, int] | None = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": None, **more}]}
    if usage:
        found["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return found


STREAM = {"content-type": "Text/Event-Stream; charset=utf-8"}
ASKED = {"stream": True}


def used(driver: Driver) -> tuple[int, int]:
    found: dict[str, int] = driver.used  # type: ignore[attr-defined]
    return found.get("input", 0), found.get("output", 0)


class TestStreams:
    async def test_tokens_that_have_no_text_yet_count(self) -> None:
        logprobs = {"content": [{"token": "a"}, {"token": "b"}]}
        parts = [chunk(logprobs=logprobs), chunk(token_ids=[1, 2, 3]), chunk("", logprobs={"tokens": ["x"]})]
        driver = await told(Answer(sse(*parts), headers=STREAM, ends=False), ASKED)
        assert used(driver) == (1, 6)

    async def test_a_usage_of_one_of_several_answers_is_not_of_all(self) -> None:
        parts = [chunk("abcd" * n, index, usage=(5, n)) for n in (1, 2, 3) for index in range(8)]
        driver = await told(Answer(sse(*parts), headers=STREAM, ends=False), ASKED | {"n": 8})
        assert used(driver) == (5, 24)
        whole = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 31}}
        driver = await told(Answer(sse(*parts, whole), headers=STREAM), ASKED | {"n": 8})
        assert used(driver) == (5, 31)

    async def test_a_usage_that_lies_low_at_first(self) -> None:
        parts = [chunk(usage=(0, 0)), *[chunk(WORD * 16) for _ in range(10)]]
        for least in (0, 1):
            driver = await told(Answer(sse(*parts), headers=STREAM, ends=False), ASKED, chunk_tokens=least)
            assert used(driver) == (1, 160)

    async def test_an_echo_is_not_written(self) -> None:
        usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 0}}
        driver = await told(Answer(sse(chunk("the prompt"), usage), headers=STREAM), ASKED | {"echo": True})
        assert used(driver) == (9, 0)

    async def test_what_came_before_the_stop_is_delivered(self) -> None:
        driver = await told(Answer(sse(*[chunk(WORD)] * 10), headers=STREAM), ASKED, most=5)
        assert used(driver) == (1, 5) and driver.texts == 5
        assert driver.events[-2]["choices"][0]["finish_reason"] == "length" and driver.events[-1] == "[DONE]"

    async def test_a_usage_at_the_stop_is_what_counts(self) -> None:
        usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 7}}
        driver = await told(Answer(sse(*[chunk(WORD)] * 5, usage), headers=STREAM), ASKED, most=5)
        assert used(driver) == (9, 7)

    async def test_one_that_is_compressed_counts_as_what_was_reserved(self) -> None:
        body = gzip.compress(sse(*[chunk(WORD)] * 100))
        answer = Answer(body, headers=STREAM | {"content-encoding": "gzip"})
        driver = await told(answer, ASKED, first_output=700)
        assert used(driver) == (1, 700) and driver.body == body
        assert b"accept-encoding" not in dict(answer.asked["headers"])


class TestWhole:
    async def test_one_without_its_last_part_is_charged_its_usage(self) -> None:
        body = orjson.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5_000}})
        driver = await told(Answer(body[:20], body[20:], ends=False))
        assert used(driver) == (9, 5_000)

    async def test_all_that_may_be_written_is_reserved_since_nothing_can_stop_it(self) -> None:
        answer = Answer(b"{}")
        assert (await told(answer, {"max_tokens": 32_000})).held["output"] == 32_000  # type: ignore[attr-defined]
        estimated = await told(answer, {"max_tokens": 32_000}, unstreamed="estimate")
        assert estimated.held["output"] == 1_024  # type: ignore[attr-defined]

    @pytest.mark.parametrize("status", [302, 307, 404, 500])
    async def test_what_is_no_answer_costs_nothing(self, status: int) -> None:
        assert used(await told(Answer(b"later", status=status))) == (0, 0)

    async def test_embeddings_write_nothing_whatever_their_form(self) -> None:
        answer = Answer(b"\x00" * 16_384, headers={"content-type": "application/octet-stream"})
        assert used(await told(answer, {"input": WORD * 9}, path="/v1/embeddings")) == (10, 0)

    async def test_null_is_said_to_who_has_gone(self) -> None:
        assert used(await told(Answer(b"null"))) == (1, 0)


class TestRequests:
    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"stream": 1}, "stream: 1 is neither true nor false"),
            ({"stream": "true"}, "stream: 'true' is neither true nor false"),
            ({"stream_options": {"include_usage": 1}}, "include_usage: 1 is neither true nor false"),
            ({"background": True}, "background: is not metered"),
        ],
    )
    async def test_tricks(self, more: dict[str, Any], message: str) -> None:
        driver = await told(Answer(b"{}"), more)
        assert driver.status == 400 and driver.json["error"]["message"].startswith(message)

    async def test_one_that_is_nested_deeply(self) -> None:
        app = EntitlementMiddleware(Answer(b"{}"), Settings(), client=Gateway())  # type: ignore[arg-type]
        body = b'{"model":"m","messages":' + b"[" * 900 + b"]" * 900 + b"}"
        driver = await Driver(app, body, CHAT).run(x_customer_id="amy")
        assert driver.status == 400 and driver.json["error"]["message"] == "body: is nested deeper than 64"

    @pytest.mark.parametrize("field", ["documents", "chat_template", "prompt_embeds", "suffix"])
    async def test_whatever_may_be_read_counts(self, field: str) -> None:
        driver = await told(Answer(b"{}"), {field: WORD * 1_000})
        assert used(driver) == (1_001, 0)

    async def test_so_do_token_ids_and_names_in_tools(self) -> None:
        assert used(await told(Answer(b"{}"), {"input_ids": [7] * 1_000})) == (1_001, 0)
        tools = [{"file": {WORD * 1_000: {}}}]
        assert used(await told(Answer(b"{}"), {"tools": tools})) == (1_002, 0)

    async def test_only_models_that_are_served(self) -> None:
        assert (await told(Answer(b"{}"), models="m, n")).status == 200
        driver = await told(Answer(b"{}"), {"model": "cheap"}, models="m, n")
        assert driver.status == 404 and driver.json["error"]["code"] == "model_not_found"


class Silent:
    """A gateway that takes a stream, and answers the first `heard` messages."""

    def __init__(self, heard: int) -> None:
        self.heard = heard
        self.streams = 0

    async def meter(self, requests: Any, context: Any) -> Any:
        self.streams += 1
        async for message in requests:
            if self.heard:
                self.heard -= 1
                yield pb.MeterResponse(
                    signal=pb.MeterResponse.CONTINUE, units_left=5, acknowledged=message.report.number
                )


class TestSilence:
    """Of a gateway: never an answer that is free, nor one that looks like a denial."""

    @pytest.fixture
    async def silent(self) -> Any:
        served = Silent(0)
        server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(
            served.meter, pb.MeterRequest.FromString, pb.MeterResponse.SerializeToString
        )
        service = grpc.method_handlers_generic_handler("entitlement.v1.EntitlementGateway", {"Meter": handler})
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with Client(f"127.0.0.1:{port}", timeout_ms=100) as client:
            yield served, client
        await server.stop(None)

    async def test_when_it_is_opened(self, silent: tuple[Silent, Client]) -> None:
        served, client = silent
        with pytest.raises(Unavailable, match=r"no answer within 0.1 s"):
            await client.open_meter("amy", "calls", 3)
        app = EntitlementMiddleware(Answer(b"{}"), Settings(), client=client)
        driver = await Driver(app, {"model": "m", "prompt": "x"}, CHAT).run(x_customer_id="amy")
        assert driver.status == 503 and served.streams >= 2

    async def test_when_it_goes_on(self, silent: tuple[Silent, Client], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gateway.client.meter.SILENT_S", 0.05)
        served, client = silent
        served.heard = 1
        meter = await client.open_meter("amy", "calls", 3, away_s=0.4)
        meter.use("calls", 7)
        with pytest.raises(Unavailable):
            await meter.room()
        with pytest.raises(Unavailable):
            await meter.end()
        assert meter.unacknowledged == (Usage("calls", 7),)
        served.heard = 100
        await asyncio.gather(meter.end(), meter.end())
        assert meter.unacknowledged == ()
