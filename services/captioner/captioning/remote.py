"""The caption worker's side of the MLLM endpoint: OpenAI-shaped chat completions over HTTP."""

import asyncio
import base64
import json
import random
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import httpx

from services.captioner.captioning.slots import Slots
from services.captioner.settings import CaptionWorkerSettings
from shared import tracing
from shared.errors import CaptuneError, InvalidInput, Unavailable

REFUSALS = (400, 413, 422)  # of this very request; any other failure says something of the server
BUSY = (429, 503)
ENGINE_FAILED = "engine_failed"  # the error code of a 500 where the model broke on this very request
ENGINE_TRIES = 3  # answers with that code until it is this caption's refusal
TRIES = 10  # other failures of one request, each after others were answered, until they are
GRACE_SECONDS = 30.0  # the captioner answers by its own deadline, unless it hangs
LONGEST_TEXT = 8000  # characters; a caption has a few hundred
LOADING_SECONDS = 1800.0  # a model of many gigabytes is downloaded once
LONGEST_PAUSE = 30.0  # seconds, whatever a Retry-After says
T = TypeVar("T")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    milliseconds: float


class CaptionClient(Protocol):
    """What a caption job asks of a captioner: `Captioner`, or a stand-in that a benchmark measures the job with."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def model(self, name: str) -> dict[str, Any]: ...

    async def caption(self, model: str, revision: str, picture: bytes, prompt: str, **options: Any) -> Reply: ...


def encode_picture(data: bytes, media_type: str) -> bytes:
    """A picture as a part of a message, in JSON: done once for all its prompts."""
    head = f'{{"type":"image_url","image_url":{{"url":"data:{media_type};base64,'
    return b"".join((head.encode(), base64.b64encode(data), b'"}}'))


class Captioner:
    """Failures that are not the request's own (connection, 401, 404, 429, 5xx, an unreadable answer) are retried with
    jitter, honouring Retry-After. Two things end that. `Unavailable`: this request has failed for `patience` seconds
    (waiting for a slot not counted), and nobody else was answered either. `InvalidInput`: the request itself is at
    fault, for the model broke on it ENGINE_TRIES times, or it failed TRIES times while others were answered. Being busy
    (429, 503, no answer in time) is never a request's fault; it lowers how many are in flight.

    Proxy settings are ignored: pictures go to the captioner and nowhere else.

    One httpx client per connection: measured at 64 in flight, a request costs 0.5 ms of CPU so, and 2.4 ms where they
    share a pool, which httpcore walks through for every request."""

    def __init__(self, settings: CaptionWorkerSettings, patience: float = 120.0) -> None:
        self._base = settings.captioner_url.rstrip("/") + "/v1"
        self._headers = {
            **tracing.outgoing(),
            "Authorization": f"Bearer {settings.service_token.get_secret_value()}",
            "Content-Type": "application/json",
        }
        self._tls = ssl.create_default_context()
        self._patience = patience
        self.timeout = httpx.Timeout(settings.request_timeout_s + GRACE_SECONDS, connect=5.0)
        self.slots = Slots(settings.caption_concurrency)
        self._idle: list[httpx.AsyncClient] = []
        self._clients: list[httpx.AsyncClient] = []
        self._answered = float("-inf")  # when the captioner last did what it was asked to

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.aclose()

    async def model(self, name: str) -> dict[str, Any]:
        """What `/v1/models` says of a model: `{engine, revision, precision, ...}`. Waits while it loads.
        Raises InvalidInput if it is not served, or could not be loaded."""
        deadline = time.monotonic() + LOADING_SECONDS
        while True:
            cards = await self._send("GET", "/models", None, _cards)
            if name not in cards:
                raise InvalidInput(
                    f"the captioner does not serve '{name}'; it serves: {', '.join(sorted(cards)) or 'none'}",
                    code="unknown_engine",
                    param="engine",
                )
            if cards[name]["ready"]:
                return cards[name]
            if error := cards[name].get("error"):
                raise InvalidInput(
                    f"the caption model '{name}' could not be loaded: {error}",
                    code="engine_failed_to_load",
                    param="engine",
                )
            if time.monotonic() > deadline:
                raise Unavailable(f"the caption model '{name}' has not loaded; see the captioner's /readyz")
            await asyncio.sleep(1.0)

    async def caption(self, model: str, revision: str, picture: bytes, prompt: str, **options: Any) -> Reply:
        """One caption by this very revision of the model; `picture` as `encode_picture` made it. Raises InvalidInput
        with the server's words where this request is refused for good, Unavailable where another revision is served
        by now."""
        words = json.dumps({"type": "text", "text": prompt}).encode()
        rest = json.dumps({"model": model, **options}).encode()
        body = b"".join((b'{"messages":[{"role":"user","content":[', picture, b",", words, b"]}],", rest[1:]))
        began = time.perf_counter()
        reply, served = await self._send("POST", "/chat/completions", body, _reply)
        if served != revision:
            raise Unavailable(
                f"the caption model '{model}' was replaced while the job ran; it starts over with the new one"
            )
        return Reply(**reply, milliseconds=round(1000 * (time.perf_counter() - began), 1))

    async def _send(self, method: str, path: str, body: bytes | None, read: Callable[[Any], T]) -> T:
        failed_at: float | None = None  # the last time
        failing_since = 0.0
        broke = faults = 0
        wait = 0.25
        while True:
            queued = time.monotonic()
            async with self.slots:
                failing_since += time.monotonic() - queued
                response = await self._try(method, path, body)
            after: float | None = None
            busy = isinstance(response, httpx.ReadTimeout)
            faulty = False
            if isinstance(response, httpx.RequestError):
                reason = f"cannot be reached ({type(response).__name__})"
            elif response.is_success:
                try:
                    found = read(response.json())
                except (ValueError, KeyError, TypeError, IndexError):
                    reason, faulty = "answered with something that is no answer", True
                else:
                    self._answered = time.monotonic()
                    self.slots.widen()
                    return found
            elif response.status_code in REFUSALS:
                self._answered = time.monotonic()
                raise _refused(response)
            else:
                reason, after = f"answered {response.status_code}", _retry_after(response)
                busy = response.status_code in BUSY
                faulty = not busy
                refusal = _refused(response)
                broke += refusal.code == ENGINE_FAILED
                if broke == ENGINE_TRIES:
                    raise refusal
            now = time.monotonic()
            if busy:
                self.slots.narrow()
            if failed_at is None:
                failing_since = now
            elif faulty and self._answered > failed_at:
                faults += 1
            if faults == TRIES - 1:
                raise InvalidInput(
                    f"the captioner {reason} each of {TRIES} times it was asked this, and others were answered",
                    code="captioner_failed",
                )
            failed_at = now
            pause = wait * random.uniform(0.5, 1.5) if after is None else after * random.uniform(1.0, 1.2)
            if now + pause - max(failing_since, self._answered) > self._patience:
                raise Unavailable(f"the captioner {reason} for {self._patience:.0f} s; is it running?", retry_after=10)
            await asyncio.sleep(pause)
            wait = min(wait * 2, 5.0)

    async def _try(self, method: str, path: str, body: bytes | None) -> httpx.Response | httpx.RequestError:
        if self._idle:
            client = self._idle.pop()
        else:
            client = httpx.AsyncClient(headers=self._headers, verify=self._tls, timeout=self.timeout, trust_env=False)
            self._clients.append(client)
        try:
            return await client.request(method, self._base + path, content=body)
        except httpx.RequestError as error:
            return error
        finally:
            self._idle.append(client)


def _cards(answer: Any) -> dict[str, dict[str, Any]]:
    return {card["id"]: dict(card["captune"]) for card in answer["data"]}


def _reply(answer: Any) -> tuple[dict[str, Any], str]:
    choice, usage = answer["choices"][0], answer["usage"]
    reply = {
        "text": _storable((choice["message"]["content"] or "")[:LONGEST_TEXT]),
        "finish_reason": str(choice["finish_reason"]),
        "prompt_tokens": int(usage["prompt_tokens"]),
        "completion_tokens": int(usage["completion_tokens"]),
    }
    return reply, answer["system_fingerprint"]


def _storable(text: str) -> str:
    """A model may emit what PostgreSQL's text cannot hold: NUL and lone surrogates."""
    return _UNSTORABLE.sub("\ufffd", text)


def _retry_after(response: httpx.Response) -> float | None:
    header = response.headers.get("Retry-After", "")
    return min(float(header), LONGEST_PAUSE) if header.isascii() and header.isdigit() else None


def _refused(response: httpx.Response) -> CaptuneError:
    try:
        error = response.json()["error"]
        message, code = error["message"], error["code"]
    except (ValueError, KeyError, TypeError):
        message, code = f"the captioner answered {response.status_code}", None
    return InvalidInput(message, code=code or "captioner_refused")
