"""What is read of the OpenAI API's requests and answers, and what is written in its shape. Pure.

Chat completions, completions, embeddings and responses; https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias, cast

import msgspec
import orjson

from entitlement.errors import InvalidArgument
from entitlement.identity import check_value

Json: TypeAlias = Mapping[str, object]
CHAT, TEXT, EMBEDDINGS, RESPONSES = "chat/completions", "completions", "embeddings", "responses"
KINDS: Final = (CHAT, TEXT, EMBEDDINGS, RESPONSES)
IMAGE_TOKENS: Final = 1_000  # of a picture or a recording, until the usage says how many it was
DONE: Final = b"data: [DONE]\n\n"
MOST_TOKENS: Final = 2**40  # of one answer: what says more is not believed
_NO_VALUE: Final = re.compile(r"[^A-Za-z0-9._~@/+-]")  # what cannot stand in a dimension's value
_MESSAGES: Final = ("messages", "input", "prompt")
_MEDIA: Final = ("image_url", "input_audio", "file", "file_data", "audio_url", "video_url")  # in a message
# Fields that no model reads; all others may be, whatever a server takes.
_SMALL: Final = frozenset(
    ("model", "user", "metadata", "stream", "stream_options", "service_tier", "logit_bias", "stop", "id", "request_id")
)
MAX_DEPTH: Final = 64  # of a request


class Usage(msgspec.Struct, frozen=True):
    """Tokens. `cached` are of `read`."""

    read: int
    written: int
    cached: int = 0


class Ask(msgspec.Struct, frozen=True):
    """What a request asks for. `model`: as a dimension's value, `_` for what cannot stand in one. `texts` are read, and
    `read` tokens beside them.
    """

    kind: str
    named: str  # the model, as the request has it
    model: str
    streams: bool
    answers: int  # that are written
    most: int  # tokens of one of them; 0: not said
    texts: tuple[str, ...]
    read: int
    wants_usage: bool  # the stream's caller asked for it
    echoes: bool = False  # the prompt comes back as well


def kind_of(path: str) -> str:
    """Of a path, whatever stands before it; "" for what is none of them."""
    path = path.rstrip("/")
    return next((kind for kind in KINDS if path.endswith(f"/v1/{kind}")), "")


def read_request(kind: str, body: bytes) -> tuple[Ask, dict[str, object]]:
    """Raises InvalidArgument, which names the field."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument("body", f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidArgument("body", "is not a JSON object")
    return ask_of(kind, found), found


def ask_of(kind: str, found: Json) -> Ask:
    """Raises InvalidArgument, which names the field."""
    named = found.get("model")
    if not isinstance(named, str):
        raise InvalidArgument("model", "is not there; expected a model's name")
    model = _NO_VALUE.sub("_", named)
    check_value("model", model)
    if found.get("background"):
        raise InvalidArgument("background", "is not metered: the answer would be fetched later; expected false")
    read = _Read()
    for name, value in found.items():
        if name not in _SMALL:
            read.see(value, names=name not in _MESSAGES, media=name in _MESSAGES)
    prompts = _prompts(found.get("prompt")) if kind == TEXT else 1
    answers = 0 if kind == EMBEDDINGS else max(_number(found, "n", 1), _number(found, "best_of", 1)) * prompts
    most = max(_number(found, name, 0) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"))
    options = found.get("stream_options")
    wants = isinstance(options, dict) and _flag(options, "include_usage")
    streams, echoes = _flag(found, "stream"), _flag(found, "echo")
    return Ask(kind, named, model, streams, answers, most, tuple(read.texts), read.tokens, wants, echoes)


def with_usage(request: Mapping[str, object], *, continuous: bool) -> bytes:
    """The request, which asks for the usage of its stream as well."""
    options = request.get("stream_options")
    asked = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    if continuous:
        asked["continuous_usage_stats"] = True
    return orjson.dumps({**request, "stream_options": asked})


def usage_of(answer: Json) -> Usage | None:
    """What an answer, or a chunk of it, says of its usage; None for nothing, and for what cannot be believed."""
    response = answer.get("response")
    found = answer.get("usage") or (response.get("usage") if isinstance(response, dict) else None)
    if not isinstance(found, dict):
        return None
    read = _count(found, "prompt_tokens", "input_tokens")
    written = _count(found, "completion_tokens", "output_tokens")
    if read is not None and written is None and (total := _count(found, "total_tokens")) is not None:
        written = max(0, total - read)
    if read is None or written is None:
        return None
    details = found.get("prompt_tokens_details") or found.get("input_tokens_details")
    cached = _count(details, "cached_tokens", "cached_tokens") if isinstance(details, dict) else 0
    return Usage(read, written, min(cached or 0, read))


class Piece(msgspec.Struct, frozen=True):
    """What a chunk adds to one of the answers. `tokens`: that it names one by one, whether it has their text or not."""

    index: int
    text: str
    tokens: int = 0


def written_by(chunk: Json) -> Iterator[Piece]:
    """What a chunk adds, or an answer has; what is empty is left out."""
    for choice in _dicts(chunk.get("choices")):
        text = "".join(_strings(choice.get("delta") or choice.get("message") or choice.get("text")))
        if (tokens := _listed(choice)) or text:
            yield Piece(_index(choice), text, tokens)
    kind = chunk.get("type")
    if isinstance(kind, str) and kind.endswith(".delta") and isinstance(delta := chunk.get("delta"), str) and delta:
        yield Piece(0, delta)
    for item in _dicts(chunk.get("output")):
        if text := "".join(_strings(item.get("content") or item.get("arguments") or item.get("summary"))):
            yield Piece(0, text)


def choice_of(chunk: Json) -> int | None:
    """The one answer that a chunk, and its usage, is of; None: of all."""
    choices = list(_dicts(chunk.get("choices")))
    return _index(choices[0]) if len(choices) == 1 else None


def _index(choice: Json) -> int:
    index = choice.get("index", 0)
    return index if isinstance(index, int) else 0


def _listed(choice: Json) -> int:
    """Tokens, in `logprobs` or as ids, as servers send them beside the text, or before it."""
    found = choice.get("logprobs")
    logprobs = found if isinstance(found, dict) else {}
    lists = (logprobs.get("content"), logprobs.get("tokens"), choice.get("token_ids"))
    return max(len(each) if isinstance(each, list) else 0 for each in lists)


def is_only_usage(chunk: Json) -> bool:
    """A chunk that is there for nothing else."""
    return chunk.get("choices") == [] and isinstance(chunk.get("usage"), dict)


class Ending:
    """What a stream needs to be ended before its time: which of its answers are open, and its last chunk."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._open: dict[int, bool] = {}
        self._last: Json = {}

    def see(self, chunk: Json) -> None:
        if self._ask.kind == RESPONSES:
            if isinstance(response := chunk.get("response"), dict):
                self._last = response
            return
        self._last = chunk
        for choice in _dicts(chunk.get("choices")):
            index = choice.get("index", 0)
            if isinstance(index, int):
                self._open[index] = choice.get("finish_reason") is None

    def write(self, reason: str, hold: str, usage: Usage) -> bytes:
        """The last events: each open answer is finished with `length`; `entitlement` says why."""
        why = {"reason": reason, "hold": hold}
        if self._ask.kind == RESPONSES:
            incomplete = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
            told = {"input_tokens": usage.read, "output_tokens": usage.written}
            told["total_tokens"] = usage.read + usage.written
            response = {**self._last, **incomplete, "usage": told}
            event = {"type": "response.incomplete", "response": response, "entitlement": why}
            return b"event: response.incomplete\n" + _data(event)
        head = {name: self._last[name] for name in ("id", "object", "created", "model") if name in self._last}
        empty: dict[str, object] = {"delta": {}} if self._ask.kind == CHAT else {"text": ""}
        indexes = [index for index, is_open in self._open.items() if is_open] or ([] if self._open else [0])
        choices = [{"index": index, **empty, "finish_reason": "length"} for index in indexes]
        events = _data({**head, "choices": choices, "entitlement": why})
        if self._ask.wants_usage:
            told = {"prompt_tokens": usage.read, "completion_tokens": usage.written}
            told["total_tokens"] = usage.read + usage.written
            events += _data({**head, "choices": [], "usage": told})
        return events + DONE


def error_body(message: str, kind: str, code: str) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _data(event: Json) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"


def _number(request: Json, name: str, default: int) -> int:
    found = request.get(name)
    if found is None:
        return default
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= MOST_TOKENS:
        raise InvalidArgument(name, f"{found!r} is not a whole number in 0..{MOST_TOKENS}")
    return found


def _count(usage: Json, *names: str) -> int | None:
    for name in names:
        found = usage.get(name)
        if isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= MOST_TOKENS:
            return found
    return None


def _prompts(prompt: object) -> int:
    """How many there are: a text, a list of texts, the tokens of one, a list of those."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _flag(request: Json, name: str) -> bool:
    """Servers take 1 and "true" for true: here nothing else is."""
    found = request.get(name)
    if found is not None and not isinstance(found, bool):
        raise InvalidArgument(name, f"{found!r} is neither true nor false")
    return found is True


class _Read:
    """What of a request a model may have to read: its texts, and tokens beside them."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens = 0

    def see(self, found: object, *, names: bool, media: bool, depth: int = 0) -> None:
        """`names`: those of fields count as well, of tools say. `media`: pictures and recordings have IMAGE_TOKENS.

        Raises InvalidArgument for what goes too deep.
        """
        if depth > MAX_DEPTH:
            raise InvalidArgument("body", f"is nested deeper than {MAX_DEPTH}")
        if isinstance(found, str):
            self.texts.append(found)
        elif isinstance(found, list):
            if found and isinstance(found[0], int):
                self.tokens += len(found)
                return
            for each in found:
                self.see(each, names=names, media=media, depth=depth + 1)
        elif isinstance(found, dict):
            for name, each in found.items():
                if media and name in _MEDIA:
                    self.tokens += IMAGE_TOKENS
                    continue
                if names:
                    self.texts.append(name)
                self.see(each, names=names, media=media, depth=depth + 1)


def _strings(found: object) -> Iterator[str]:
    """The texts of a delta or a message, and what it calls tools with."""
    if isinstance(found, str):
        yield found
    elif isinstance(found, list):
        for each in found:
            yield from _strings(each)
    elif isinstance(found, dict):
        for name, each in found.items():
            if name not in _LABELS:
                yield from _strings(each)


_LABELS: Final = ("role", "type", "id", "index", "annotations", "logprobs", "finish_reason")


def _dicts(found: object) -> Iterator[Json]:
    if isinstance(found, list):
        yield from (cast(Json, each) for each in found if isinstance(each, dict))
