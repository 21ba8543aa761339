"""A callback for the LiteLLM proxy: reserves before a call, meters its stream, charges what it was.

    litellm_settings:
      callbacks: gateway.integrations.litellm.entitlement

`entitlement` is made when the proxy asks for it, from ENTITLEMENT_LLM_* in the environment (see Settings).

A bill goes from hook to hook in a dictionary of this process, under its hold's id, which travels in the request's
metadata: all hooks of a request run in the process that took it. Not under LiteLLM's call id, which a caller may choose
by header and use twice. A Meter and not Reserve and Settle: it keeps its hold for as long as a call takes, says when
the money ends, and is charged by the gateway for what it has told when this process dies.

What ends a bill, once:

async_log_success_event       LiteLLM has the answer's usage, also after a caller who left in the middle of a stream
async_post_call_failure_hook  the proxy answers with an error; not `async_log_failure_event`, which tells of every
                              attempt, before retries and fallbacks of the same request
the stream's iterator         the money has gone
LOGGED_S, LONGEST_S           nobody said anything, so long after a stream's end or a request's begin: what was seen
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Final, NoReturn, Protocol, cast

import litellm
import orjson
import structlog
from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger

from entitlement.errors import InvalidArgument
from gateway.client import Client, EntitlementCallError, Signal
from gateway.integrations import openai
from gateway.integrations.bill import Bill
from gateway.integrations.callers import Caller, Key, caller_of_key
from gateway.integrations.gate import Gate, Refused, malformed
from gateway.integrations.openai import CHAT, EMBEDDINGS, RESPONSES, TEXT, Ask, Json
from gateway.integrations.settings import Settings, load
from gateway.integrations.sse import Splitter

HOLD: Final = "entitlement_hold"  # in a request's metadata
LONGEST_S: Final = 7_200.0  # LiteLLM's own limit is 6,000
LOGGED_S: Final = 30.0  # after a stream's end
MOST_OPEN: Final = 10_000  # requests at a time
_KINDS: Final = {
    "completion": CHAT,
    "text_completion": TEXT,
    "embedding": EMBEDDINGS,
    "embeddings": EMBEDDINGS,
    "responses": RESPONSES,
    "anthropic_messages": CHAT,
}
_STOPPABLE: Final = (CHAT, TEXT)
_log = structlog.get_logger(__name__)


class Logging(Protocol):
    """LiteLLM's, of one request."""

    async def async_success_handler(self, result: object, *, cache_hit: bool) -> None: ...


class _Open:
    """A bill that is not made up yet."""

    def __init__(self, bill: Bill, caller: Caller) -> None:
        self.bill = bill
        self.caller = caller
        self.timer: asyncio.TimerHandle | None = None


class EntitlementLogger(CustomLogger):
    """One for a process."""

    def __init__(self, settings: Settings | None = None, *, client: Client | None = None) -> None:
        """Raises InvalidArgument for settings that cannot be followed: the proxy does not start."""
        super().__init__()
        self._settings = load() if settings is None else settings
        self._gate = Gate(self._settings, client=client)
        self._free = self._settings.free_calls
        self._open: dict[str, _Open] = {}

    async def async_pre_call_hook(
        self, user_api_key_dict: Key, cache: object, data: MutableMapping[str, object], call_type: str
    ) -> None:
        """Raises HTTPException for what is not granted."""
        metadata = _metadata(data)
        if call_type in self._free:
            return
        try:
            caller, ask = caller_of_key(self._settings, user_api_key_dict), _ask(call_type, data)
            if len(self._open) >= MOST_OPEN:
                raise Refused(503, f"more than {MOST_OPEN} requests at a time", "overloaded", retry_s=1)
            bill = await self._gate.open(caller, ask)
        except InvalidArgument as error:
            _refuse(malformed(error))
        except Refused as refused:
            _refuse(refused)
        metadata[HOLD] = hold = bill.meter.hold
        self._open[hold] = _Open(bill, caller)
        self._wait(hold, LONGEST_S, whole=False)

    async def async_log_success_event(
        self, kwargs: Mapping[str, object], response_obj: object, start_time: object, end_time: object
    ) -> None:
        """Charges the usage. An answer of LiteLLM's cache costs nothing."""
        params = kwargs.get("litellm_params")
        if (found := self._take(params if isinstance(params, Mapping) else {})) is None:
            return
        if kwargs.get("cache_hit") is True:
            self._gate.drop(found.bill)
            return
        if usage := _usage(kwargs, response_obj):
            found.bill.usage(usage)
        elif not found.bill.ask.streams:
            found.bill.chunk(openai.written_by(_read(response_obj)))
        self._gate.finish(found.bill, found.caller, whole=True)

    async def async_post_call_failure_hook(
        self,
        request_data: Mapping[str, object],
        original_exception: Exception,
        user_api_key_dict: Key,
        traceback_str: str | None = None,
    ) -> None:
        """Gives the hold back, or charges what was written. Also comes for requests that this callback has refused."""
        if (found := self._take(request_data)) is None:
            return
        if found.bill.began or getattr(original_exception, "status_code", 0) == 499:  # Its caller has gone.
            self._gate.finish(found.bill, found.caller, whole=False)
        else:
            self._gate.drop(found.bill)

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Key, response: AsyncIterable[object], request_data: Mapping[str, object]
    ) -> AsyncGenerator[object]:
        found = self._open.get(_hold(request_data))
        if found is None or _is_cached(response):
            async for chunk in response:
                yield chunk
            return
        texts, whole = _Texts(), False
        try:
            async for chunk in response:
                if not await _has_room(found.bill):
                    self._take(request_data)
                    self._gate.finish(found.bill, found.caller, whole=True)
                    yield _ending(chunk)
                    await _log_stopped(response, request_data)
                    break
                found.bill.chunk(texts.of(chunk))
                yield chunk
            whole = True
        finally:
            self._wait(_hold(request_data), LOGGED_S, whole=whole)

    def _take(self, holder: Mapping[str, object]) -> _Open | None:
        """None: it was refused, is not charged, or has ended."""
        found = self._open.pop(_hold(holder), None)
        if found is not None and found.timer is not None:
            found.timer.cancel()
        return found

    def _wait(self, hold: str, within_s: float, *, whole: bool) -> None:
        """For LiteLLM to say how it ended."""
        if (found := self._open.get(hold)) is not None:
            if found.timer is not None:
                found.timer.cancel()
            found.timer = asyncio.get_running_loop().call_later(within_s, self._forget, hold, whole)

    def _forget(self, hold: str, whole: bool) -> None:
        found = self._open.pop(hold)
        _log.warning("LiteLLM did not say how a request ended", hold=hold, model=found.bill.ask.model)
        self._gate.finish(found.bill, found.caller, whole=whole)


def __getattr__(name: str) -> EntitlementLogger:
    """`entitlement`, for this process: made when it is asked for."""
    if name != "entitlement":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = EntitlementLogger()
    return made


# What LiteLLM's values say


def _ask(call_type: str, data: Mapping[str, object]) -> Ask:
    kind = _KINDS.get(call_type) or _KINDS.get(call_type.removeprefix("a"))
    if kind is None:
        raise Refused(403, f"{call_type} is not metered here", "not_metered")
    if "," in str(data.get("model")):  # LiteLLM asks each of them, and tells of each.
        raise InvalidArgument("model", "names several models; expected one")
    return openai.ask_of(kind, _request(data))


def _request(data: Mapping[str, object]) -> Json:
    """The caller's fields, as they are by now. LiteLLM has put its own beside them, which no model reads."""
    asked = data.get("proxy_server_request")
    body = asked.get("body") if isinstance(asked, Mapping) else None
    names = {"model", "stream", "messages", "prompt", "input", *(body if isinstance(body, Mapping) else data)}
    return {name: value for name, value in data.items() if name in names and name not in _LITELLMS}


_LITELLMS: Final = ("metadata", "litellm_metadata", "litellm_logging_obj", "proxy_server_request", "cache", "user")


def _metadata(data: MutableMapping[str, object]) -> MutableMapping[str, object]:
    """The metadata that goes from hook to hook. What a caller has put there in our name is taken away."""
    for name in _METADATA:
        if isinstance(found := data.get(name), dict):
            found.pop(HOLD, None)
    name = next((name for name in _METADATA if isinstance(data.get(name), dict)), "metadata")
    return cast(dict[str, object], data.setdefault(name, {}))


# Where there are two, the other one is the model's: Anthropic and the responses API have a `metadata` of their own.
_METADATA: Final = ("litellm_metadata", "metadata")


def _hold(holder: Mapping[str, object]) -> str:
    for name in _METADATA:
        if isinstance(found := holder.get(name), Mapping) and isinstance(hold := found.get(HOLD), str):
            return hold
    return ""


def _usage(kwargs: Mapping[str, object], response: object) -> openai.Usage | None:
    """LiteLLM's count, where there is one: the model's own, or what it has counted of a stream."""
    found = kwargs.get("standard_logging_object")
    metadata = found.get("metadata") if isinstance(found, Mapping) else None
    usage = metadata.get("usage_object") if isinstance(metadata, Mapping) else None
    counted = openai.usage_of({"usage": usage} if usage else _read(response))
    if counted and not counted.read and not counted.written and _says_no_usage(kwargs.get("original_response")):
        return None
    return counted


def _says_no_usage(original: object) -> bool:
    """LiteLLM puts zeros where the model has said nothing of its usage. What it did say is here, as a text."""
    with suppress(orjson.JSONDecodeError):
        found = orjson.loads(original) if isinstance(original, str) else None
        return isinstance(found, dict) and not found.get("usage")
    return False


def _is_cached(response: object) -> bool:
    return getattr(response, "custom_llm_provider", "") == "cached_response"


def _read(found: object) -> Json:
    """An answer, or a chunk of one, as JSON has it."""
    dump = getattr(found, "model_dump", None)
    read = dump(exclude_none=True) if dump else found
    return cast(Json, read) if isinstance(read, dict) else {}


class _Texts:
    """Of one stream's chunks: values of LiteLLM's, or events as they were."""

    def __init__(self) -> None:
        self._splitter = Splitter()

    def of(self, chunk: object) -> Iterator[openai.Piece]:
        if not isinstance(chunk, str | bytes):
            return openai.written_by(_read(chunk))
        return self._events(chunk.encode() if isinstance(chunk, str) else chunk)

    def _events(self, data: bytes) -> Iterator[openai.Piece]:
        for event in self._splitter.feed(data):
            with suppress(orjson.JSONDecodeError):
                found = orjson.loads(event.data or b"{}")
                if isinstance(found, dict):
                    anthropic = found.get("type") == "content_block_delta"
                    yield from openai.written_by({"choices": [found]} if anthropic else found)


# How a stream ends when the money does


async def _has_room(bill: Bill) -> bool:
    if bill.ask.kind not in _STOPPABLE:
        return True
    with suppress(EntitlementCallError):  # Where it cannot be asked for so long, the answer ends as well.
        await bill.meter.room()
        return bill.meter.signal is not Signal.STOP
    return False


def _ending(last: object) -> object:
    """A chunk as the last one, which finishes its answers with `length`."""
    dumped = dict(_read(last))
    delta: dict[str, object] = {"text": ""} if dumped.get("object") == "text_completion" else {"delta": {}}
    choices = cast(list[Json], dumped.get("choices") or [{}])
    dumped["choices"] = [{"index": each.get("index", 0), **delta, "finish_reason": "length"} for each in choices]
    dumped.pop("usage", None)
    return type(last)(**dumped)


async def _log_stopped(response: object, data: Mapping[str, object]) -> None:
    """LiteLLM logs a stream that comes to its end: this one is told for it, so that its own records have it and its
    parallel requests are counted down.
    """
    logging, chunks = data.get("litellm_logging_obj"), getattr(response, "chunks", None)
    if logging is not None and chunks:
        whole = litellm.stream_chunk_builder(chunks=list(chunks), messages=data.get("messages"))
        await cast(Logging, logging).async_success_handler(whole, cache_hit=False)


def _refuse(refused: Refused) -> NoReturn:
    """LiteLLM makes the OpenAI API's error of it."""
    error = HTTPException(
        refused.status, refused.message, {"retry-after": str(refused.retry_s)} if refused.retry_s else None
    )
    error.type = refused.kind
    error.provider_specific_fields = {"entitlement": refused.code}
    raise error
