"""The caption worker's side of the MLLM endpoint: OpenAI-shaped chat completions over HTTP."""

import base64
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import httpx

from shared.errors import CaptuneError, InvalidInput, Unavailable

REFUSALS = (400, 413, 422)  # of this very request; any other failure says something of the server
LOADING_SECONDS = 1800.0  # a model of many gigabytes is downloaded once


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    milliseconds: float


class Captioner:
    """`check` is called before every try and may raise to stop. Failures that are not the request's own
    (connection, 401, 404, 429, 5xx) are retried with jitter, honouring Retry-After, for `patience` seconds; then
    `Unavailable`. Proxy settings are ignored: pictures go to the captioner and nowhere else."""

    def __init__(self, url: str, token: str, check: Callable[[], None], patience: float = 120.0) -> None:
        self._http = httpx.Client(
            base_url=url.rstrip("/") + "/v1",
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(300.0, connect=5.0),
            trust_env=False,
            limits=httpx.Limits(max_connections=64),
        )
        self._check, self._patience = check, patience

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def model(self, name: str) -> dict[str, Any]:
        """What `/v1/models` says of a model: `{engine, revision, precision}`. Waits while it loads.
        Raises InvalidInput if it is not served."""
        deadline = time.monotonic() + LOADING_SECONDS
        while True:
            cards = {card["id"]: dict(card["captune"]) for card in self._send("GET", "/models").json()["data"]}
            if name not in cards:
                raise InvalidInput(
                    f"the captioner does not serve '{name}'; it serves: {', '.join(sorted(cards)) or 'none'}",
                    code="unknown_engine",
                    param="engine",
                )
            if cards[name]["ready"]:
                return cards[name]
            if time.monotonic() > deadline:
                raise Unavailable(f"the caption model '{name}' has not loaded; see the captioner's /readyz")
            self._check()
            time.sleep(1.0)

    def caption(self, model: str, revision: str, image: bytes, media_type: str, prompt: str, **options: Any) -> Reply:
        """One caption by this very revision of the model. Raises InvalidInput with the server's words where this
        request is refused for good, Unavailable where another revision is served by now."""
        uri = f"data:{media_type};base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": prompt}]
        body = {"model": model, "messages": [{"role": "user", "content": content}], **options}
        began = time.perf_counter()
        answer = self._send("POST", "/chat/completions", json=body).json()
        if answer["system_fingerprint"] != revision:
            raise Unavailable(
                f"the caption model '{model}' was replaced while the job ran; it starts over with the new one"
            )
        choice, usage = answer["choices"][0], answer["usage"]
        return Reply(
            text=_storable(choice["message"]["content"] or ""),
            finish_reason=choice["finish_reason"],
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            milliseconds=round(1000 * (time.perf_counter() - began), 1),
        )

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        deadline, wait = time.monotonic() + self._patience, 0.25
        while True:
            self._check()
            after: float | None = None
            try:
                response = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                reason = f"cannot be reached ({type(error).__name__})"
            else:
                if response.is_success:
                    return response
                if response.status_code in REFUSALS:
                    raise _refused(response)
                reason = f"answered {response.status_code}"
                header = response.headers.get("Retry-After", "")
                after = float(header) if header.isdigit() else None
            pause = after if after is not None else wait * random.uniform(0.5, 1.5)
            if time.monotonic() + pause > deadline:
                raise Unavailable(f"the captioner {reason} for {self._patience:.0f} s; is it running?", retry_after=10)
            time.sleep(pause)
            wait = min(wait * 2, 5.0)


def _storable(text: str) -> str:
    """A model may emit what PostgreSQL's text cannot hold: NUL and lone surrogates."""
    return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in text)


def _refused(response: httpx.Response) -> CaptuneError:
    try:
        error = response.json()["error"]
        message, code = error["message"], error["code"]
    except (ValueError, KeyError, TypeError):
        message, code = f"the captioner answered {response.status_code}", None
    return InvalidInput(message, code=code or "captioner_refused")
