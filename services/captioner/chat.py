"""`POST /v1/chat/completions` and `GET /v1/models`: one route, one batcher, one engine per model id.

The app provides `app.state.batchers: dict[str, Batcher]` and `app.state.captioner_settings: CaptionerSettings`.
"""

import asyncio
import base64
import binascii
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response
from PIL import Image

from services.captioner.batcher import Batcher
from services.captioner.engines.base import CaptionRequest, Generation, fit
from services.captioner.openai_schema import (
    ChatCompletion,
    ChatRequest,
    Choice,
    ErrorResponse,
    ImagePart,
    ModelCard,
    ModelList,
    OpenAIRoute,
    ResponseMessage,
    Served,
    Usage,
)
from services.captioner.settings import CaptionerSettings
from shared.auth import require
from shared.datasets.images import decode
from shared.errors import InvalidInput, NotFound, TooLarge

router = APIRouter(prefix="/v1", tags=["chat"], route_class=OpenAIRoute)

# Apart from the server's own pool: an unpacked picture can take 300 MB, so few are unpacked at a time.
_DECODERS = ThreadPoolExecutor(4, thread_name_prefix="decode")

_CLIENT_GONE = 499  # nobody reads it; it keeps the access log honest


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    dependencies=[Depends(require("write"))],
    responses={code: {"model": ErrorResponse} for code in (400, 401, 404, 413, 429, 503)},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> ChatCompletion | Response:
    """Caption images (data URIs) with one of the models of `GET /v1/models`."""
    batcher = _batcher(request, body.model)
    settings: CaptionerSettings = request.app.state.captioner_settings
    caption_request = await asyncio.get_running_loop().run_in_executor(
        _DECODERS, to_caption_request, body, settings, batcher.engine.spec.max_pixels
    )
    generation = await _unless_gone(request, batcher, caption_request)
    if generation is None:
        return Response(status_code=_CLIENT_GONE)
    return ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=body.model,
        choices=[
            Choice(index=0, message=ResponseMessage(content=generation.text), finish_reason=generation.finish_reason)
        ],
        usage=Usage(
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=generation.completion_tokens,
            total_tokens=generation.prompt_tokens + generation.completion_tokens,
        ),
        system_fingerprint=batcher.engine.revision,
    )


@router.get("/models", dependencies=[Depends(require("read"))])
async def list_models(request: Request) -> ModelList:
    """The caption models served here. Fine-tuned classifiers have their own list, `/v1/classifiers`."""
    return ModelList(data=[_card(batcher) for batcher in request.app.state.batchers.values()])


@router.get("/models/{model}", dependencies=[Depends(require("read"))], responses={404: {"model": ErrorResponse}})
async def get_model(model: Annotated[str, Path()], request: Request) -> ModelCard:
    """One caption model."""
    return _card(_batcher(request, model))


def to_caption_request(body: ChatRequest, settings: CaptionerSettings, max_pixels: int) -> CaptionRequest:
    """Text and decoded pictures of a chat request. Blocks: it unpacks images. Raises for what is not served."""
    if (body.n or 1) > 1:
        raise InvalidInput("Only n = 1 is served; send the request n times.", code="unsupported_value", param="n")
    if body.stream:
        raise InvalidInput(
            "Streaming is not served; leave 'stream' out or set it to false.", code="unsupported_value", param="stream"
        )
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidInput(
            "max_tokens and max_completion_tokens differ; send only one of them.",
            code="invalid_value",
            param="max_tokens",
        )
    texts: list[str] = []
    uris: list[tuple[str, str]] = []
    for number, message in enumerate(body.messages):
        if message.role == "assistant":
            raise InvalidInput(
                "Messages of the assistant are not supported: each request is one turn, with images and instructions "
                "from 'system' and 'user'.",
                code="unsupported_value",
                param=f"messages.{number}.role",
            )
        if isinstance(message.content, str):
            texts.append(message.content)
            continue
        for index, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                uris.append((part.image_url.url, f"messages.{number}.content.{index}.image_url.url"))
            else:
                texts.append(part.text)
    if len(uris) > settings.max_images:
        raise InvalidInput(
            f"The request has {len(uris)} images; at most {settings.max_images} are accepted.",
            code="too_many_images",
            param="messages",
        )
    prompt = "\n".join(text for text in texts if text.strip())
    if not prompt:
        raise InvalidInput("The messages hold no text; say what to write.", code="empty_prompt", param="messages")
    defaults = CaptionRequest((), "")
    return CaptionRequest(
        images=tuple(fit(_image(uri, param, settings), max_pixels) for uri, param in uris),
        prompt=prompt,
        max_tokens=next(iter(limits), None) or defaults.max_tokens,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        seed=body.seed,
        metadata=body.metadata or {},
    )


def _image(uri: str, param: str, settings: CaptionerSettings) -> Image.Image:
    scheme = uri.partition(":")[0].lower()
    head, comma, payload = uri.partition(",")
    if scheme != "data":
        raise InvalidInput(
            f"Image URLs of scheme {scheme[:12]!r} are not fetched: a server that follows any URL can be sent to "
            "places inside its own network. Send the picture itself as a data URI (data:image/jpeg;base64,...).",
            code="remote_image_url",
            param=param,
        )
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidInput(
            "The data URI is not of the form data:image/<type>;base64,<data>.", code="invalid_data_uri", param=param
        )
    if len(payload) * 3 // 4 > settings.max_image_bytes + 2:
        raise TooLarge(
            f"The image has about {len(payload) * 3 // 4} bytes; at most {settings.max_image_bytes} are accepted.",
            code="image_too_large",
            param=param,
        )
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(
            f"The data URI is not valid base64: {error}.", code="invalid_data_uri", param=param
        ) from error
    try:
        return decode(data, max_pixels=settings.max_image_pixels)
    except InvalidInput as error:
        raise InvalidInput(error.message, code=error.code, param=param) from error


async def _unless_gone(request: Request, batcher: Batcher, caption_request: CaptionRequest) -> Generation | None:
    """The batcher's answer, or None when the client hangs up first; its work is dropped then."""
    answer = asyncio.ensure_future(batcher.submit(caption_request))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        gone.cancel()
        answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    engine = batcher.engine
    return ModelCard(
        id=engine.name,
        created=batcher.started_at,
        captune=Served(
            engine=engine.spec.type, revision=engine.revision, precision=engine.precision, ready=batcher.ready
        ),
    )
