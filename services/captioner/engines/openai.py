"""Any server that speaks OpenAI's chat completions: vLLM, SGLang, LMDeploy, Ollama, hosted ones; one or many of them.

One request is one caption; the batching is the server's. The engine's lanes keep up to `concurrency` requests in
flight, shared out over `base_urls` by what each can take (openai_servers.py). They travel by openai_http.py, and
whatever comes back becomes a caption or a `CaptuneError` (openai_replies.py).
"""

import base64
import hashlib
import io
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from services.captioner import metrics
from services.captioner.engines.base import CaptionRequest, Engine, Generation, fit
from services.captioner.engines.openai_http import Wire
from services.captioner.engines.openai_replies import Reply, Trouble, read_completion, read_models
from services.captioner.engines.openai_servers import Lease, Server, Servers
from services.captioner.settings import EngineSpec
from shared.errors import CaptuneError, InvalidInput, Unavailable

logger = logging.getLogger(__name__)

#: Raise when a change of these files changes what is sent for the same request, or what is made of the same answer.
CODE_VERSION = "openai1"

# In timeouts of one try, from when a lane takes a request: when the last try may begin, and when it ends. Two tries
# that run into their timeouts fit, and the last always has half of one, lest a server be blamed for our haste.
_LAST_TRY, _END = 1.5, 2.0
_LOOK_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0


@dataclass(frozen=True)
class Prepared:
    """One request's body but for its token limit, whose name is a matter of the server."""

    body: dict[str, Any] = field(repr=False)
    max_tokens: int
    stop: tuple[str, ...]


class OpenAIEngine(Engine):
    """`spec.model` as the servers call it, served at each of `spec.base_urls`; `spec.api_key` where they want one."""

    warms_up = False  # captions cost money where the server is hosted

    def __init__(self, spec: EngineSpec, name: str | None = None, model_roots: Sequence[Path] = ()) -> None:
        super().__init__(spec, name, model_roots)
        self.max_batch = 1
        self.lanes = spec.concurrency

    def load(self) -> None:
        """Asks each server whether it serves the model. Raises InvalidInput for settings that cannot work, Unavailable
        where no server answers as it should. Servers in trouble are set aside while another one is well."""
        spec = self.spec
        if not spec.model or not spec.base_urls:
            missing = "model" if not spec.model else "base_urls"
            raise InvalidInput(
                f"Engine {self.name!r} has no {missing}. An engine of type 'openai' needs the model's name as its "
                "servers call it, and base_urls such as ['http://127.0.0.1:8000/v1'].",
                code="incomplete_engine",
                param=f"engines.{self.name}.{missing}",
            )
        self._model: str = spec.model
        self._wire = Wire(spec, self.name)
        self._servers = Servers(self.name, self._wire.addresses, spec.concurrency)
        troubles = {server: trouble for server in self._servers.all if (trouble := self._look(server))}
        said = {server: self._wire.say(trouble) for server, trouble in troubles.items()}
        if len(troubles) == len(self._servers.all):
            not_served = all(trouble.reason == "model_not_served" for trouble in troubles.values())
            raise (InvalidInput if not_served else Unavailable)(
                f"Engine {self.name!r}: " + "; ".join(f"{server.label} {words}" for server, words in said.items()),
                code=next(iter(troubles.values())).reason,
                param=f"engines.{self.name}",
            )
        for server, words in said.items():
            self._servers.set_aside(server, words)
        parts = ["openai", spec.model, spec.revision, f"max_pixels={spec.max_pixels}", CODE_VERSION]
        if spec.extra_body:
            told = json.dumps(spec.extra_body, sort_keys=True).encode()
            parts.append(f"extra={hashlib.sha256(told).hexdigest()[:12]}")
        self.revision = " ".join(part for part in parts if part)
        well, count = len(self._servers.all) - len(troubles), len(self._servers.all)
        logger.info("engine %s: %s ready, %d of %d servers answer", self.name, self.revision, well, count)

    def prepare(self, request: CaptionRequest) -> Prepared:
        # Pictures first, text after: the prompts of one picture then share their prefix, which servers cache.
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_uri(fit(image, self.spec.max_pixels))}}
            for image in request.images
        ]
        content.append({"type": "text", "text": request.prompt})
        body: dict[str, Any] = {
            **self.spec.extra_body,
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": request.temperature,
        }
        if request.seed is not None:
            body["seed"] = request.seed
        if request.stop:
            body["stop"] = list(request.stop)
        return Prepared(body, request.max_tokens, request.stop)

    def generate(self, prepared: Sequence[Prepared]) -> list[Reply]:
        """Blocks on the network; called by many lanes at once."""
        return [self._ask(item) for item in prepared]

    def finish(self, raw: Reply) -> Generation:
        return Generation(raw.text, raw.finish_reason, raw.prompt_tokens, raw.completion_tokens)

    def _ask(self, item: Prepared) -> Reply:
        """Tries until there is a reply, the request is refused for good, or time is up."""
        began = time.monotonic()
        last_try, end = began + _LAST_TRY * self.spec.timeout_s, began + _END * self.spec.timeout_s
        tried: set[Server] = set()
        pause, was_empty = _FIRST_PAUSE_S, False
        while True:
            lease = self._servers.acquire(last_try, tried)
            outcome = self._try(lease, item, end)
            if isinstance(outcome, Reply):
                if outcome.filtered:
                    logger.info("engine %s: %s withheld a text (content_filter)", self.name, lease.server.label)
                if outcome.text or outcome.filtered or was_empty:
                    return _until_stop(outcome, item.stop)
                was_empty, reason = True, "empty"
            elif _wants_other_limit(outcome, lease.server):
                lease.server.limit_field, reason = "max_completion_tokens", "limit_field"
            else:
                tried.add(lease.server)
                wait = random.uniform(0, pause)  # full jitter; what a server asked to wait, `acquire` waits
                pause, reason = min(2 * pause, _LONGEST_PAUSE_S), outcome.reason
                nowhere_else = outcome.verdict == "misplaced" and not self._servers.another_stands(tried)
                if outcome.verdict == "refused" or nowhere_else or time.monotonic() + wait >= last_try:
                    raise self._error(outcome, lease.server)
                time.sleep(wait)
            metrics.RETRIES.labels(self.name, reason).inc()

    def _try(self, lease: Lease, item: Prepared, end: float) -> Reply | Trouble:
        """One try by a lease, which is given back whatever happens."""
        outcome: Reply | Trouble = Trouble("faulty", "interrupted", "was not waited for")
        try:
            outcome = (self._probe(lease.server) if lease.probe else None) or self._complete(lease.server, item, end)
        finally:
            if isinstance(outcome, Reply):
                self._servers.release(lease, "ok")
            else:
                self._servers.release(lease, outcome.verdict, self._wire.say(outcome), outcome.retry_after)
        return outcome

    def _complete(self, server: Server, item: Prepared, end: float) -> Reply | Trouble:
        content = json.dumps({**item.body, server.limit_field: item.max_tokens}).encode()
        until = min(end, time.monotonic() + self.spec.timeout_s)
        answer = self._wire.send(server.url, "POST", "/chat/completions", until, content)
        if isinstance(answer, Trouble):
            return answer
        return read_completion(answer.status, answer.headers, answer.body, self._model)

    def _look(self, server: Server) -> Trouble | None:
        """Whether the server is there and serves the model."""
        answer = self._wire.send(server.url, "GET", "/models", time.monotonic() + _LOOK_S)
        if isinstance(answer, Trouble):
            return answer
        if answer.status in (404, 405):
            logger.info(
                "engine %s: %s has no list of models (%d); whether it serves %s shows with the first caption. If that "
                "fails, see that base_urls end in /v1",
                self.name,
                server.label,
                answer.status,
                self._model,
            )
        return read_models(answer.status, answer.headers, answer.body, self._model)

    def _probe(self, server: Server) -> Trouble | None:
        """`_look` at a server that was set aside: anything but a good answer means that it is not back."""
        trouble = self._look(server)
        return trouble and (trouble if trouble.verdict == "misplaced" else replace(trouble, verdict="down"))

    def _error(self, trouble: Trouble, server: Server) -> CaptuneError:
        message = f"Engine {self.name!r}: {server.label} {self._wire.say(trouble)}"
        if trouble.verdict == "refused" or trouble.reason == "not_found":
            return InvalidInput(message, code=trouble.reason, param="messages")
        wait = None if trouble.retry_after is None else max(1, round(trouble.retry_after))
        return Unavailable(message, code=trouble.reason, retry_after=wait)


def _data_uri(image: Image.Image) -> str:
    """As JPEG: a photo as PNG takes about three times the bytes. 4:4:4, because colour is much of what a caption tells
    and the usual halved chroma mixes the colours of thin and small parts with those around them."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _wants_other_limit(trouble: Trouble, server: Server) -> bool:
    """Newer models of some hosts refuse max_tokens and name what they want instead."""
    return (
        trouble.verdict == "refused"
        and server.limit_field == "max_tokens"
        and "max_completion_tokens" in trouble.words
        and "max_tokens" in trouble.words
    )


def _until_stop(reply: Reply, stop: Sequence[str]) -> Reply:
    """The reply cut before the first stop text, for servers that take the parameter and ignore it."""
    end = min((at for word in stop if word and (at := reply.text.find(word)) >= 0), default=None)
    return reply if end is None else replace(reply, text=reply.text[:end].rstrip(), finish_reason="stop")
