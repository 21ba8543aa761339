"""What the integrations read: settings, callers, requests, answers and events."""

from __future__ import annotations

import hashlib
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from entitlement.errors import InvalidArgument
from gateway.client import Usage as Line
from gateway.integrations import openai
from gateway.integrations.callers import Caller, Callers
from gateway.integrations.openai import Usage, kind_of, read_request, usage_of, written_by
from gateway.integrations.settings import Kind, Settings, load, tokenizer_of
from gateway.integrations.sse import MAX_EVENT_BYTES, Splitter


class TestSettings:
    def test_they_come_from_the_environment(self) -> None:
        assert load({"ENTITLEMENT_LLM_GATEWAY": "unix:/x", "ENTITLEMENT_LLM_AWAY_S": "5", "OTHER": "y"}) == Settings(
            gateway="unix:/x", away_s=5
        )

    @pytest.mark.parametrize(
        ("name", "value", "problem"),
        [
            ("NOTHING", "1", "nothing: is not a setting; known are gateway, "),
            ("AWAY_S", "0", "away_s: 0 is outside 1..3600"),
            ("AWAY_S", "x", "away_s: "),
            ("ON_BREAK", "free", "on_break: 'free' is not one of charge, reported"),
            ("STREAM_USAGE", "", "stream_usage: '' is not one of ask, continuous, leave"),
            ("INPUT", "", "input: is empty; expected feature?name=value&name=value"),
            ("INPUT", "tokens?model", "input: 'tokens?model' is not feature?name=value&name=value"),
            ("OUTPUT", "to kens", "output: "),
            ("CACHED", "tokens?a=b c", "cached: "),
            ("CUSTOMER_HEADER", "", "customer_header: is empty, and there are no keys: nobody could be charged"),
        ],
    )
    def test_bad_ones_are_named(self, name: str, value: str, problem: str) -> None:
        with pytest.raises(InvalidArgument) as refusal:
            load({f"ENTITLEMENT_LLM_{name}": value})
        assert str(refusal.value).startswith(problem)

    def test_the_model_stands_in_a_dimension(self) -> None:
        kind = Kind.parse("input", "tokens?model={model}&token_type=input")
        assert kind.usage("a/b", 3) == Line("tokens", 3, {"model": "a/b", "token_type": "input"})
        assert Kind.parse("input", "calls").usage("m", 3) == Line("calls", 3)

    def test_the_tokenizer_is_imported(self) -> None:
        assert tokenizer_of(Settings()) is None
        assert tokenizer_of(Settings(tokenizer="operator:concat")) is not None
        for name in ("operator", "operator:nothing", "no.such:module", "string:digits"):
            with pytest.raises(InvalidArgument, match="tokenizer: "):
                tokenizer_of(Settings(tokenizer=name))


class TestCallers:
    def test_by_headers(self) -> None:
        callers = Callers(Settings(customer_header="X-Who", subject_header="X-Sub"))
        assert callers.find({"x-who": "amy"}) == Caller("amy")
        assert callers.find({"x-who": "amy", "x-sub": "key-1"}) == Caller("amy", "key-1")
        assert callers.find({"x-sub": "key-1"}) is None
        with pytest.raises(InvalidArgument, match="customer: "):
            callers.find({"x-who": "a:b"})

    def test_by_keys_and_by_nothing_else(self, tmp_path: Path) -> None:
        name = hashlib.sha256(b"sk-1").hexdigest()
        file = tmp_path / "keys.json"
        file.write_bytes(orjson.dumps({name: {"customer": "amy", "subject": "s"}}))
        callers = Callers(Settings(keys=str(file)))
        assert callers.find({"authorization": "Bearer sk-1", "x-customer-id": "bob"}) == Caller("amy", "s")
        assert callers.find({"authorization": "bearer  sk-1"}) == Caller("amy", "s")
        for header in ("", "sk-1", "Basic sk-1", "Bearer sk-2"):
            assert callers.find({"authorization": header, "x-customer-id": "bob"}) is None

    @pytest.mark.parametrize("text", [b"", b"[]", b'{"x": {"customer": "amy"}}', b'{"%s": {}}' % (b"0" * 64)])
    def test_a_file_that_cannot_be_read(self, tmp_path: Path, text: bytes) -> None:
        file = tmp_path / "keys.json"
        file.write_bytes(text)
        with pytest.raises(InvalidArgument, match="keys: "):
            Callers(Settings(keys=str(file)))


class TestRequests:
    def test_paths(self) -> None:
        assert kind_of("/v1/chat/completions") == kind_of("/proxy/v1/chat/completions/") == "chat/completions"
        assert kind_of("/v1/completions") == "completions"
        assert kind_of("/chat/completions") == kind_of("/v1/files") == ""

    @pytest.mark.parametrize(
        ("kind", "body", "answers", "most", "read"),
        [
            ("chat/completions", {"messages": []}, 1, 0, 0),
            ("chat/completions", {"n": 3, "max_tokens": 5, "max_completion_tokens": 9}, 3, 9, 0),
            ("completions", {"prompt": ["a", "b"], "n": 2}, 4, 0, 0),
            ("completions", {"prompt": [1, 2, 3]}, 1, 0, 3),
            ("completions", {"prompt": [[1, 2], [3]], "best_of": 4}, 8, 0, 3),
            ("embeddings", {"input": [[1, 2], [3]]}, 0, 0, 3),
            ("responses", {"input": "abc", "max_output_tokens": 7}, 1, 7, 0),
            (
                "chat/completions",
                {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:" + "x" * 99_999}}]}]},
                1,
                0,
                openai.IMAGE_TOKENS,
            ),
        ],
    )
    def test_what_they_ask_for(self, kind: str, body: dict[str, Any], answers: int, most: int, read: int) -> None:
        ask, _ = read_request(kind, orjson.dumps({"model": "m", **body}))
        assert (ask.answers, ask.most, ask.read) == (answers, most, read)
        assert sum(map(len, ask.texts)) < 100

    def test_a_model_is_named_as_a_dimension_can_be(self) -> None:
        ask, request = read_request("chat/completions", b'{"model":"ft:llama3:8b"}')
        assert ask.model == "ft_llama3_8b" and request["model"] == "ft:llama3:8b"

    def test_texts_are_found_wherever_they_stand(self) -> None:
        messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
        tools = [{"function": {"name": "look", "parameters": {"type": "object"}}}]
        ask, _ = read_request("chat/completions", orjson.dumps({"model": "m", "messages": messages, "tools": tools}))
        assert {"hello", "look", "object"} <= set(ask.texts)

    def test_the_usage_is_asked_for_beside_what_was(self) -> None:
        body = openai.with_usage({"model": "m", "stream_options": {"x": 1}}, continuous=True)
        asked = {"x": 1, "include_usage": True, "continuous_usage_stats": True}
        assert orjson.loads(body) == {"model": "m", "stream_options": asked}

    @pytest.mark.parametrize("value", [-1, 1.5, True, "3", 2**41])
    def test_numbers_that_are_none(self, value: object) -> None:
        with pytest.raises(InvalidArgument, match="max_tokens: "):
            read_request("chat/completions", orjson.dumps({"model": "m", "max_tokens": value}))


class TestAnswers:
    @pytest.mark.parametrize(
        ("answer", "usage"),
        [
            ({"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, Usage(3, 4)),
            ({"usage": {"prompt_tokens": 0, "completion_tokens": 0}}, Usage(0, 0)),
            ({"usage": {"prompt_tokens": 3, "total_tokens": 3}}, Usage(3, 0)),
            ({"response": {"usage": {"input_tokens": 3, "output_tokens": 4}}}, Usage(3, 4)),
            (
                {"usage": {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 5}}},
                Usage(9, 4, 5),
            ),
            (
                {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 5}}},
                Usage(3, 4, 3),
            ),
            ({"usage": None}, None),
            ({"usage": {"prompt_tokens": 3}}, None),
            ({"usage": {"prompt_tokens": 7, "completion_tokens": None, "total_tokens": 57}}, Usage(7, 50)),
            ({"usage": {"prompt_tokens": -3, "completion_tokens": 4}}, None),
            ({"usage": {"prompt_tokens": True, "completion_tokens": 4}}, None),
            ({"usage": {"prompt_tokens": "3", "completion_tokens": 4}}, None),
            ({"usage": [3]}, None),
        ],
    )
    def test_usage(self, answer: dict[str, Any], usage: Usage | None) -> None:
        assert usage_of(answer) == usage

    @pytest.mark.parametrize(
        ("chunk", "texts"),
        [
            (
                {"choices": [{"delta": {"role": "assistant", "content": "ab"}}, {"text": "c"}, {"delta": {}}]},
                ["ab", "c"],
            ),
            ({"choices": [{"delta": {"reasoning_content": "hm", "content": None}}]}, ["hm"]),
            ({"choices": [{"delta": {"tool_calls": [{"id": "x", "function": {"arguments": "{}"}}]}}]}, ["{}"]),
            ({"choices": [{"message": {"role": "assistant", "content": "ab"}}]}, ["ab"]),
            ({"type": "response.output_text.delta", "delta": "ab"}, ["ab"]),
            ({"output": [{"content": [{"type": "output_text", "text": "ab"}]}]}, ["ab"]),
            ({"choices": "?"}, []),
            ({"choices": [None, 3]}, []),
        ],
    )
    def test_texts(self, chunk: dict[str, Any], texts: list[str]) -> None:
        assert [piece.text for piece in written_by(chunk)] == texts

    def test_an_ending_finishes_what_is_open(self) -> None:
        ask, _ = read_request("chat/completions", b'{"model":"m","n":3,"stream":true}')
        ending = openai.Ending(ask)
        ending.see({"id": "x", "choices": [{"index": 0, "finish_reason": None}, {"index": 1}]})
        ending.see({"id": "x", "choices": [{"index": 1, "finish_reason": "stop"}]})
        chunk, done, rest = ending.write("INSUFFICIENT_CREDITS", "h", Usage(1, 2)).split(b"\n\n")
        found = orjson.loads(chunk.removeprefix(b"data: "))
        assert found["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
        assert (done, rest) == (b"data: [DONE]", b"")

    def test_an_ending_of_a_response(self) -> None:
        ask, _ = read_request("responses", b'{"model":"m","stream":true}')
        ending = openai.Ending(ask)
        ending.see({"type": "response.created", "response": {"id": "r", "status": "in_progress"}})
        name, data = ending.write("USAGE_LIMIT_REACHED", "h", Usage(1, 2)).rstrip().split(b"\n")
        found = orjson.loads(data.removeprefix(b"data: "))
        assert name == b"event: response.incomplete" and found["type"] == "response.incomplete"
        assert found["response"]["id"] == "r" and found["response"]["status"] == "incomplete"
        assert found["response"]["usage"] == {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}


class TestEvents:
    def test_however_they_are_cut(self, seed: int) -> None:
        random = Random(seed)
        text = b'data: {"a":1}\n\n: ping\n\nevent: x\ndata: 1\ndata: 2\n\ndata:3\r\n\r\ndata: [DONE]\n\n'
        whole = Splitter().feed(text)
        assert [event.data for event in whole] == [b'{"a":1}', None, b"1\n2", b"3", b"[DONE]"]
        for _ in range(200):
            splitter, found, at = Splitter(), [], 0
            while at < len(text):
                step = random.randrange(1, 12)
                found += splitter.feed(text[at : at + step])
                at += step
            assert b"".join(event.raw for event in found) + splitter.rest() == text
            assert [event.data for event in found if event.raw.strip()] == [event.data for event in whole]

    def test_one_without_end_is_passed_on(self) -> None:
        splitter = Splitter()
        events = splitter.feed(b"x" * (MAX_EVENT_BYTES + 1))
        assert [event.data for event in events] == [None] and splitter.rest() == b""
