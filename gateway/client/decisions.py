"""From requests to decisions over one lane: what the clients for tasks and for threads share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.errors import EntitlementCallError
from gateway.client.lane import Decider, Lane
from gateway.client.options import Options
from gateway.client.values import Decision, Request, decision, encode

_Answer = asyncio.Future[pb.CheckAndConsumeResponse]


class Decisions:
    """Belongs to the event loop it is made on."""

    def __init__(self, wire: Decider, options: Options) -> None:
        self._loop = asyncio.get_running_loop()
        self._options = options
        self.lane = Lane(
            wire,
            timeout_s=options.timeout_s,
            max_batch=options.max_batch,
            max_in_flight=options.max_in_flight,
            pipeline=options.pipeline,
            backoff=options.backoff,
        )

    async def decide(self, request: Request) -> Decision:
        return decision(await self._submitted(request))

    async def decide_many(self, requests: Iterable[Request]) -> list[Decision | EntitlementCallError]:
        """Submits as much as there is room for, and waits for the oldest when there is none."""
        answers: list[_Answer | EntitlementCallError] = []
        oldest = 0
        try:
            for request in requests:
                while self.lane.full and oldest < len(answers):
                    await _ended(answers[oldest])
                    oldest += 1
                answers.append(self._submitted_or_error(request))
                if len(answers) % self._options.max_batch == 0:
                    await asyncio.sleep(0)  # A whole batch: it leaves now.
            return [await _outcome(answer) for answer in answers]
        finally:
            for answer in answers:
                if isinstance(answer, asyncio.Future) and not answer.cancel() and not answer.cancelled():
                    answer.exception()  # Seen, when the caller has gone.

    def _submitted(self, request: Request) -> _Answer:
        key, data = encoded(request, self._options)
        answer: _Answer = self._loop.create_future()
        self.lane.submit(key, data, answer)
        return answer

    def _submitted_or_error(self, request: Request) -> _Answer | EntitlementCallError:
        try:
            return self._submitted(request)
        except EntitlementCallError as error:
            return error


def encoded(request: Request, options: Options) -> tuple[str, bytes]:
    """The request's key, made when it has none, and the request on the wire."""
    key = options.key(request.key)
    return key, encode(request, key, options.traceparent())


async def _ended(answer: _Answer | EntitlementCallError) -> None:
    if isinstance(answer, asyncio.Future):
        await asyncio.wait((answer,))


async def _outcome(answer: _Answer | EntitlementCallError) -> Decision | EntitlementCallError:
    if isinstance(answer, EntitlementCallError):
        return answer
    try:
        return decision(await answer)
    except EntitlementCallError as error:
        return error
