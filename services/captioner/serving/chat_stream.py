"""A chat completion as server-sent events, in OpenAI's chunks: each sample's role, its text piece by piece, why it
ended; then the usage where asked for, and `[DONE]`."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.serving.batcher import Batcher
from services.captioner.serving.openai_schema import ChatCompletionChunk, ChunkChoice, Delta, Usage, error_response
from shared.errors import CaptuneError

logger = logging.getLogger(__name__)

_Event = str | Generation


class Samples:
    """The samples of one request, run together. What they say is had from `next`, in the order it came."""

    def __init__(self, batcher: Batcher, requests: Sequence[CaptionRequest]) -> None:
        self.count = len(requests)
        self._events: asyncio.Queue[tuple[int, _Event | Exception]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._tasks = [
            self._loop.create_task(self._run(batcher, index, replace(request, on_text=self._listener(index))))
            for index, request in enumerate(requests)
        ]

    async def next(self) -> tuple[int, _Event]:
        """(sample, a piece of its text) or, as the sample's last, (sample, all of it). An error of one ends all."""
        index, event = await self._events.get()
        if isinstance(event, Exception):
            self.drop()
            raise event
        return index, event

    def drop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _listener(self, index: int) -> Callable[[str], None]:
        def on_text(piece: str) -> None:  # on the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its client with it
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, piece))

        return on_text

    async def _run(self, batcher: Batcher, index: int, request: CaptionRequest) -> None:
        event: Generation | Exception
        try:
            event = cut(await batcher.submit(request), request.stop)
        except Exception as error:
            event = error
        self._events.put_nowait((index, event))


class EventStream(StreamingResponse):
    """`first` is what `samples.next()` gave already: it has to be awaited before the status is sent, so that a request
    that fails at once is answered with an error's status. `head`: the fields that all chunks share."""

    media_type = "text/event-stream"

    def __init__(
        self, samples: Samples, first: tuple[int, _Event], head: dict[str, Any], *, include_usage: bool
    ) -> None:
        self._samples, self._head, self._include_usage = samples, head, include_usage
        super().__init__(self._events(first), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self.stream_response(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(OSError):  # how some servers tell that the client hung up
                    sending.result()
        finally:
            gone.cancel()
            sending.cancel()
            self._samples.drop()

    async def _events(self, first: tuple[int, _Event]) -> AsyncIterator[bytes]:
        sent = [""] * self._samples.count
        generations: dict[int, Generation] = {}
        for index in range(self._samples.count):
            yield self._chunk(index, Delta(role="assistant", content=""))
        index, event = first
        try:
            while True:
                piece = event if isinstance(event, str) else _rest(event.text, sent[index])
                if piece:
                    sent[index] += piece
                    yield self._chunk(index, Delta(content=piece))
                if isinstance(event, Generation):
                    generations[index] = event
                    yield self._chunk(index, Delta(), event)
                if len(generations) == self._samples.count:
                    break
                index, event = await self._samples.next()
        except Exception as error:
            yield _error(error)
            return
        if self._include_usage:
            usage = usage_of([generations[index] for index in sorted(generations)])
            yield _event(ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=[], usage=usage))
        yield b"data: [DONE]\n\n"

    def _chunk(self, index: int, delta: Delta, ended: Generation | None = None) -> bytes:
        choice = ChunkChoice(index=index, delta=delta, finish_reason=ended and ended.finish_reason, logprobs=None)
        no_usage_yet = {"usage": None} if self._include_usage else {}
        return _event(
            ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=[choice], **no_usage_yet)
        )


async def disconnected(receive: Receive) -> None:
    """Returns when the client hangs up. The request's body has to be read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def cut(generation: Generation, stop: Sequence[str]) -> Generation:
    """Ends the text before the first of `stop`, for engines that do not look for it themselves."""
    ends = [end for word in stop if (end := generation.text.find(word)) >= 0]
    return replace(generation, text=generation.text[: min(ends)], finish_reason="stop") if ends else generation


def usage_of(generations: Sequence[Generation]) -> Usage:
    """As OpenAI counts: the prompt once, what was written of every sample."""
    read = generations[0]
    return Usage.of(read.prompt_tokens, sum(each.completion_tokens for each in generations), read.image_tokens)


def _rest(text: str, sent: str) -> str:
    if not text.startswith(sent):
        raise RuntimeError("the engine's text does not begin with the pieces it had sent")
    return text[len(sent) :]


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def _error(error: Exception) -> bytes:
    """The status is out already, so the error comes as an event; OpenAI's clients raise it. No `[DONE]` follows."""
    if not isinstance(error, CaptuneError):
        logger.error("unexpected error in a stream", exc_info=error)
        error = CaptuneError("Internal error; the server's log has the details.")
    body = error_response(error.status, error.message, error.code, error.param).body
    return b"data: " + bytes(body) + b"\n\n"
