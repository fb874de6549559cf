"""OpenAI's chat-completions shapes, as far as they are served, and its error shape as a route class."""

import logging
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from services.captioner.engines.base import FinishReason
from shared.datasets.report import printable
from shared.errors import CaptuneError
from shared.web.problems import headers_of, shortened

logger = logging.getLogger(__name__)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    url: str = Field(description="A data URI: `data:image/jpeg;base64,...`. Nothing is fetched from the network.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Accepted and not used.")


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(_Strict):
    include_usage: bool | None = Field(None, description="The last chunk tells the tokens.")
    include_obfuscation: bool | None = Field(None, description="Accepted and not used.")


_StopWord = Annotated[str, Field(min_length=1, max_length=200)]
_MOST_STOPS = 4


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class ChatRequest(_Strict):
    """What is not listed here is refused rather than ignored, as it could change the answer."""

    model: str
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=1_000)
    max_tokens: int | None = Field(None, ge=1, le=4096)
    max_completion_tokens: int | None = Field(None, ge=1, le=4096)
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(
        None, ge=1, le=16, description="Samples. Where a seed is given, it is counted up by one each."
    )
    stop: Annotated[
        Annotated[list[_StopWord], Field(max_length=_MOST_STOPS)] | None,
        BeforeValidator(_listed),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "maxItems": _MOST_STOPS},
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(None, description="The text ends before the first of these.")
    stream: bool | None = Field(None, description="Server-sent events, one `chat.completion.chunk` each.")
    stream_options: StreamOptions | None = None
    metadata: dict[str, Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16, description="Handed to the engine: class_name, domain, characteristic, words."
    )
    user: str | None = None


class ResponseMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: ResponseMessage
    finish_reason: FinishReason
    logprobs: None = None


class PromptTokensDetails(BaseModel):
    image_tokens: int = Field(description="Of the prompt tokens, those that stand for images.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, read: int, written: int, image_tokens: int) -> "Usage":
        return cls(
            prompt_tokens=read,
            completion_tokens=written,
            total_tokens=read + written,
            prompt_tokens_details=PromptTokensDetails(image_tokens=image_tokens),
        )


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str = Field(description="The engine's revision: same fingerprint, same weights and precision.")


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: None


class ChatCompletionChunk(BaseModel):
    """What is not set is not sent."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Served(BaseModel):
    engine: str
    revision: str
    precision: str
    ready: bool
    error: str | None = Field(description="Why it will not serve; null while it serves, loads or goes on trying to.")
    captions_per_second: float | None = Field(description="Measured; null until the model is ready.")


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "captune"
    captune: Served


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class OpenAIRoute(APIRoute):
    """Answers every error as `{"error": {message, type, param, code}}`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            # Other types may be let in with far larger bodies, and all of this one is read at once.
            sent = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
            if request.method == "POST" and sent != "application/json":
                return error_response(
                    415,
                    f"Content-Type {sent!r} is not accepted; send application/json.",
                    "unsupported_media_type",
                    None,
                )
            try:
                return await handle(request)
            except CaptuneError as error:
                return error_response(error.status, error.message, error.code, error.param, headers_of(error))
            except RequestValidationError as error:
                return _validation_response(error)
            except HTTPException as error:
                return error_response(error.status_code, str(error.detail), None, None, dict(error.headers or {}))
            except OperationalError:
                logger.exception("database unreachable")
                message = "The database does not answer; nothing was changed, try again."
                return error_response(503, message, "database_unavailable", None, {"Retry-After": "2"})
            except Exception:
                logger.exception("unexpected error in %s", request.url.path)
                return error_response(500, "Internal error; the server's log has the details.", "internal_error", None)

        return handler


def error_response(
    status: int, message: str, code: str | None, param: str | None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """OpenAI's clients know 400 as a bad request; 422, as used on all other routes, becomes that."""
    status = 400 if status == 422 else status
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    body = ErrorResponse(error=ErrorDetail(message=shortened(message), type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status, headers)


def _validation_response(error: RequestValidationError) -> JSONResponse:
    # A union reports every branch; the one that got furthest is what the caller meant.
    worst = max(error.errors(), key=lambda each: len(each["loc"]))
    if worst["type"] == "json_invalid":
        return error_response(400, f"The body is not valid JSON: {worst['ctx']['error']}.", "invalid_json", None)
    loc = worst["loc"]
    # Only fields and positions: no names of union branches, which are types or follow a position.
    path = [
        str(step)
        for before, step in zip((None, *loc), loc, strict=False)
        if step != "body" and "[" not in str(step) and not (isinstance(before, int) and step in ("text", "image_url"))
    ]
    param = printable(".".join(path)) or None
    if worst["type"] == "extra_forbidden":
        return error_response(
            400, f"Parameter {param!r} is not supported here; leave it out.", "unsupported_parameter", param
        )
    return error_response(400, f"{param or 'body'}: {worst['msg']}.", "invalid_value", param)
