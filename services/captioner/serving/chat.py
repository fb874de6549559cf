"""`POST /v1/chat/completions` and `GET /v1/models`: one route, one batcher, one engine per model id.

The app provides `app.state.batchers: dict[str, Batcher]` and `app.state.captioner_settings: CaptionerSettings`.
"""

import asyncio
import time
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Path, Request, Response

from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.serving.batcher import Batcher
from services.captioner.serving.chat_request import to_caption_requests
from services.captioner.serving.chat_stream import EventStream, Samples, cut, disconnected, usage_of
from services.captioner.serving.openai_schema import (
    ChatCompletion,
    ChatRequest,
    Choice,
    ErrorResponse,
    ModelCard,
    ModelList,
    OpenAIRoute,
    ResponseMessage,
    Served,
    StreamOptions,
)
from services.captioner.settings import CaptionerSettings
from shared.errors import NotFound
from shared.web.auth import require

T = TypeVar("T")

router = APIRouter(prefix="/v1", tags=["chat"], route_class=OpenAIRoute)

# Apart from the server's own pool: an unpacked picture can take 300 MB, so few are unpacked at a time.
_DECODERS = ThreadPoolExecutor(4, thread_name_prefix="decode")

_CLIENT_GONE = 499  # nobody reads it; it keeps the access log honest


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    dependencies=[Depends(require("write"))],
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "the completion; with `stream`, its chunks"},
        **{code: {"model": ErrorResponse} for code in (400, 401, 404, 413, 429, 503)},
    },
)
async def create_chat_completion(body: ChatRequest, request: Request) -> ChatCompletion | Response:
    """Caption images (data URIs) with one of the models of `GET /v1/models`."""
    batcher = _batcher(request, body.model)
    settings: CaptionerSettings = request.app.state.captioner_settings
    with batcher.unpacking():
        requests = await asyncio.get_running_loop().run_in_executor(
            _DECODERS, to_caption_requests, body, settings, batcher.engine.spec.max_pixels
        )
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": batcher.engine.revision,
    }
    if body.stream:
        return await _stream(request, batcher, requests, head, body.stream_options or StreamOptions())
    generations = await _unless_gone(request, _all_of(batcher, requests))
    if generations is None:
        return Response(status_code=_CLIENT_GONE)
    choices = [
        Choice(index=index, message=ResponseMessage(content=each.text), finish_reason=each.finish_reason)
        for index, each in enumerate(generations)
    ]
    return ChatCompletion(**head, choices=choices, usage=usage_of(generations))


async def _stream(
    request: Request,
    batcher: Batcher,
    requests: Sequence[CaptionRequest],
    head: dict[str, Any],
    options: StreamOptions,
) -> Response:
    samples = Samples(batcher, requests)
    try:
        first = await _unless_gone(request, samples.next())
    except BaseException:
        samples.drop()
        raise
    if first is None:
        samples.drop()
        return Response(status_code=_CLIENT_GONE)
    return EventStream(samples, first, head, include_usage=bool(options.include_usage))


@router.get("/models", dependencies=[Depends(require("read"))])
async def list_models(request: Request) -> ModelList:
    """The caption models served here. Fine-tuned classifiers have their own list, `/v1/classifiers`."""
    return ModelList(data=[_card(batcher) for batcher in request.app.state.batchers.values()])


@router.get("/models/{model}", dependencies=[Depends(require("read"))], responses={404: {"model": ErrorResponse}})
async def get_model(model: Annotated[str, Path()], request: Request) -> ModelCard:
    """One caption model."""
    return _card(_batcher(request, model))


async def _all_of(batcher: Batcher, requests: Sequence[CaptionRequest]) -> list[Generation]:
    """Every sample, or the error of the first that fails; the others' work is dropped then."""
    tasks = [asyncio.ensure_future(batcher.submit(each)) for each in requests]
    try:
        return [cut(generation, requests[0].stop) for generation in await asyncio.gather(*tasks)]
    finally:
        for task in tasks:
            task.cancel()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work comes to, or None when the client hangs up first; the work is cancelled then."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        gone.cancel()
        answer.cancel()


def _batcher(request: Request, model: str) -> Batcher:
    batchers: dict[str, Batcher] = request.app.state.batchers
    if model not in batchers:
        raise NotFound(
            f"Model {model!r} is not served here. Choose one of: {', '.join(sorted(batchers))}.",
            code="model_not_found",
            param="model",
        )
    return batchers[model]


def _card(batcher: Batcher) -> ModelCard:
    engine, rate = batcher.engine, batcher.rate()
    return ModelCard(
        id=engine.name,
        created=batcher.started_at,
        captune=Served(
            engine=engine.spec.type,
            revision=engine.revision,
            precision=engine.precision,
            ready=batcher.ready,
            error=batcher.error if batcher.gave_up else None,
            captions_per_second=None if rate is None else round(rate.captions_per_second, 3),
        ),
    )
