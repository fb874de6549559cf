"""A chat request, checked and unpacked: what the engines are asked."""

import base64
import binascii
from dataclasses import replace

from PIL import Image

from services.captioner.engines.base import CaptionRequest, fit
from services.captioner.serving.openai_schema import ChatRequest, ImagePart
from services.captioner.settings import CaptionerSettings
from shared.datasets.images import decode
from shared.errors import InvalidInput, TooLarge

_SEEDS = 2**64


def to_caption_requests(body: ChatRequest, settings: CaptionerSettings, max_pixels: int) -> list[CaptionRequest]:
    """One request per sample, `n` in all, which differ in their seeds. Blocks: it unpacks images. Raises for what is
    not served."""
    if body.stream_options is not None and not body.stream:
        raise InvalidInput(
            "stream_options is for streams; set stream to true or leave it out.",
            code="unsupported_value",
            param="stream_options",
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
    first = CaptionRequest(
        images=tuple(fit(_image(uri, param, settings), max_pixels) for uri, param in uris),
        prompt=prompt,
        max_tokens=next(iter(limits), None) or defaults.max_tokens,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        seed=body.seed,
        stop=tuple(body.stop or ()),
        metadata=body.metadata or {},
    )
    return [first, *(replace(first, seed=_counted_up(body.seed, sample)) for sample in range(1, body.n or 1))]


def _counted_up(seed: int | None, sample: int) -> int | None:
    """Past the largest seed that is accepted comes the smallest."""
    return None if seed is None else (seed + sample + _SEEDS // 2) % _SEEDS - _SEEDS // 2


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
