"""examples/vllm as it is started there: its page by curl, and the same by the OpenAI client."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import openai
import pytest
from openai import AsyncOpenAI

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1 import ledger_pb2
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from tests.pages import BIN, ROOT, Desk, Dev, blocks
from tests.stacks import CHANNEL, DEADLINE_S, fresh, until

HERE = ROOT / "examples" / "vllm"
READ, WRITTEN = 500, 2_000  # nanos of a token, as its catalogue has them
USD = 10**9


class Example(Dev):
    """run.sh, on sockets and a free port."""

    def __init__(self, folder: Path) -> None:
        self.gateway, self.admin = f"unix:{folder}/gateway.sock", f"unix:{folder}/admin.sock"
        told = {"PORT": "0", "ENTITLEMENT_ADDRESS": self.gateway, "ENTITLEMENT_ADMIN_ADDRESS": self.admin}
        told["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        argv = ["env", *(f"{name}={value}" for name, value in told.items())]
        argv += [str(HERE / "run.sh"), "--data", str(folder / "data")]
        super().__init__(argv, ready=r"Uvicorn running on http://(\S+)")
        self.address = self.announced[1]

    def said(self, text: str) -> bool:
        return any(text in line for line in self._tail)

    def customer(self, nanos: int) -> str:
        name = fresh("cust")
        with grpc.insecure_channel(self.admin, options=CHANNEL) as channel:
            admin = LedgerAdminStub(channel)
            admin.PutCustomer(ledger_pb2.Customer(id=name), timeout=DEADLINE_S)
            contract = ledger_pb2.Contract(id=name, customer=name, rate_card="models")
            contract.billing = ledger_pb2.Contract.PREPAID
            admin.PutContract(contract, timeout=DEADLINE_S)
            admin.CreateGrant(ledger_pb2.Grant(id=name, customer=name, amount_nanos=nanos), timeout=DEADLINE_S)
        return name

    async def settled(self, customer: str) -> int:
        """Nanos that were charged, when nothing is held any more; the ledger has the same."""
        async with grpc.aio.insecure_channel(self.gateway, options=CHANNEL) as channel:
            stub = EntitlementGatewayStub(channel)

            async def look() -> pb.Balance:
                answer = await stub.GetBalance(pb.GetBalanceRequest(customer=customer), timeout=DEADLINE_S)
                return answer.balance

            return (await until(look, lambda found: not found.held_nanos, "something stays held")).settled_nanos


class Page(Desk):
    """Runs the page's commands against an example that runs."""

    def __init__(self, folder: Path, example: Example) -> None:
        super().__init__(folder)
        self._stack, self._gateway, self._admin = example, example.gateway, example.admin
        self._address = example.address

    def _here(self, text: str) -> str:
        return super()._here(text).replace("127.0.0.1:8000", self._address)


@pytest.fixture(scope="module")
def example(folders: Callable[[], Path]) -> Iterator[Example]:
    with Example(folders()) as running:
        yield running


@pytest.fixture
async def api(example: Example) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"http://{example.address}/v1", api_key="unused") as client:
        yield client


def by(customer: str) -> dict[str, str]:
    return {"x-customer-id": customer}


def ask(words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {words} words"}]


def test_the_page(example: Example, tmp_path: Path) -> None:
    page = Page(tmp_path, example)
    for block in blocks(HERE / "README.md"):
        if block.kind == "console":
            page.run(block)
    assert len(page.executed) == 5 and not page.left_out


async def test_answers(example: Example, api: AsyncOpenAI) -> None:
    customer = example.customer(USD)
    assert [model.id for model in (await api.models.list()).data] == ["demo"]  # Without anybody to charge.
    chat = await api.chat.completions.create(model="demo", messages=ask(5), extra_headers=by(customer))
    assert chat.choices[0].message.content == "the quick brown fox jumps "
    text = await api.completions.create(model="demo", prompt="Say 2", extra_headers=by(customer))
    assert (text.choices[0].text, text.usage.completion_tokens) == ("the quick ", 2)
    assert await example.settled(customer) == 5 * READ + 7 * WRITTEN


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
async def test_a_stream(example: Example, api: AsyncOpenAI, options: dict[str, object]) -> None:
    customer = example.customer(USD)
    stream = await api.chat.completions.create(
        model="demo", messages=ask(100), stream=True, extra_headers=by(customer), **options
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).count(" ") == 100
    assert [chunk.usage.completion_tokens for chunk in chunks if not chunk.choices] == ([100] if options else [])
    assert await example.settled(customer) == 3 * READ + 100 * WRITTEN


async def test_a_stream_that_the_money_ends(example: Example, api: AsyncOpenAI) -> None:
    customer = example.customer(3 * READ + 400 * WRITTEN)  # More than is reserved after the answers of other tests.
    stream = await api.chat.completions.create(
        model="demo",
        messages=ask(10_000),
        stream=True,
        stream_options={"include_usage": True},
        extra_headers=by(customer),
    )
    chunks = [chunk async for chunk in stream]
    *words, last, usage = chunks
    assert last.choices[0].finish_reason == "length" and last.id == words[0].id
    assert last.model_extra["entitlement"]["reason"] == "INSUFFICIENT_CREDITS"
    assert 380 <= len(words) <= 401 and usage.usage.completion_tokens == len(words)
    assert await example.settled(customer) == 3 * READ + len(words) * WRITTEN


async def test_no_credit_is_an_error_that_is_not_tried_again(example: Example, api: AsyncOpenAI) -> None:
    customer = example.customer(10 * WRITTEN)
    with pytest.raises(openai.APIStatusError) as refused:
        await api.chat.completions.create(model="demo", messages=ask(5), stream=True, extra_headers=by(customer))
    error = refused.value
    assert (error.status_code, error.type, error.code) == (402, "insufficient_quota", "insufficient_credits")
    assert error.body["message"] == "the credit does not cover this request"
    assert error.request.headers["x-stainless-retry-count"] == "0"
    assert await example.settled(customer) == 0


async def test_other_errors_are_of_their_classes(api: AsyncOpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="does not say whose it is"):
        await api.chat.completions.create(model="demo", messages=ask(5))
    with pytest.raises(openai.PermissionDeniedError, match="the customer is not known"):
        await api.chat.completions.create(model="demo", messages=ask(5), extra_headers=by("nobody"))
    with pytest.raises(openai.PermissionDeniedError, match="is not metered here"):
        await api.images.generate(model="demo", prompt="a fox", extra_headers=by("alice"))
    with pytest.raises(openai.BadRequestError, match="n: -1 is not a whole number"):
        await api.chat.completions.create(model="demo", messages=ask(5), n=-1, extra_headers=by("alice"))


async def test_a_caller_who_leaves(example: Example, api: AsyncOpenAI) -> None:
    customer = example.customer(USD)
    stream = await api.chat.completions.create(
        model="demo", messages=ask(100_000), stream=True, extra_headers=by(customer)
    )
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 20:
            break
    await stream.close()
    charged = await example.settled(customer)  # The server has noticed: the answer is far from its end.
    assert 3 * READ + seen * WRITTEN <= charged < 10_000 * WRITTEN
    written = (charged - 3 * READ) // WRITTEN
    assert example.said(f"the caller has left; tokens written: {written}")
