"""What an OpenAI-compatible server's answer means: a caption, or which trouble and whose. Pure functions of bytes."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from services.captioner.engines.base import FinishReason
from services.captioner.engines.thinking import strip_thinking

#: What a try says about the server it went to.
#: ok: it answered; refused: it works, the request is at fault; busy: it asks for less; slow: it did not answer in time;
#: faulty: it broke this answer; down: nobody is there; misplaced: it is not the server, model or key we think it is.
Verdict = Literal["ok", "refused", "busy", "slow", "faulty", "down", "misplaced"]

# Not text that PostgreSQL or UTF-8 can hold: NUL and lone surrogates, which JSON can spell.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
# What hosted servers put behind the name they were asked for: "-2024-08-06", "-0613", "@20241022", ":latest", "-v1:0".
# Any other longer name ("gpt-4o-mini" for "gpt-4o") is another model.
_VERSION = re.compile(r"[-@:](\d{3,}[\d-]*|v\d[\w.:-]*|latest)")
_MOST_TOKENS = 2**31 - 1
_MOST_CHARACTERS = 8_000  # of a text without its thoughts; several times the longest caption one may ask for
_DAY_S = 86400.0


@dataclass(frozen=True)
class Reply:
    """A finished text; empty where the model said nothing or, `filtered`, where the server withheld it."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    filtered: bool = False


@dataclass(frozen=True)
class Trouble:
    """Why a try brought no caption. `words` may quote the server: redact the key and shorten before showing them."""

    verdict: Verdict
    reason: str  # label of the retries metric, code of the error
    words: str
    retry_after: float | None = None  # seconds


def read_completion(status: int, headers: Mapping[str, str], body: bytes, model: str) -> Reply | Trouble:
    """The answer to one chat completion with `n` = 1 that asked for `model`. Never raises."""
    if not 200 <= status < 300:
        return read_refusal(status, headers, body)
    data = _json(body)
    if not isinstance(data, dict):
        kind = headers.get("content-type", "no content type")
        return Trouble("faulty", "bad_body", f"answered {len(body)} bytes of {kind} that are not a JSON object")
    if "choices" not in data and data.get("error"):  # some gateways answer 200 with an error inside
        return Trouble("faulty", "server_error", f"answered an error: {_error_words(data)}")
    answered = data.get("model")
    if isinstance(answered, str) and answered and not same_model(model, answered):
        return Trouble(
            "misplaced",
            "wrong_model",
            f"was asked for model {model!r}, but {answered!r} answered; set the engine's model to the one you mean",
        )
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        count = len(choices) if isinstance(choices, list) else "no list of"
        return Trouble("faulty", "wrong_count", f"answered {count} choices where one was asked for")
    return _read_choice(choices[0], data.get("usage"))


def _read_choice(choice: Any, usage: Any) -> Reply | Trouble:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return Trouble("faulty", "bad_body", "answered a choice without a message")
    text = _content(message.get("content"))
    if text is None:
        return Trouble("faulty", "bad_body", "answered a message whose content is not text")
    if not text and isinstance(message.get("refusal"), str):
        text = message["refusal"]  # a refusal in words: the quality checks flag it as such
    usage = usage if isinstance(usage, dict) else {}
    text = strip_thinking(_UNSTORABLE.sub("\ufffd", text))
    cut = choice.get("finish_reason") == "length" or len(text) > _MOST_CHARACTERS
    return Reply(
        text=text[:_MOST_CHARACTERS],
        finish_reason="length" if cut else "stop",
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        filtered=choice.get("finish_reason") == "content_filter",
    )


def _content(content: Any) -> str | None:
    """Text of a message's content: a string, null (empty), or a list of parts. None for anything else."""
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else None


def read_models(status: int, headers: Mapping[str, str], body: bytes, model: str) -> Trouble | None:
    """What is wrong with a server by its answer to `GET /models`; None where it serves `model` or keeps no such list
    (404, 405)."""
    if status in (404, 405):
        return None
    if not 200 <= status < 300:
        return read_refusal(status, headers, body)
    data = _json(body)
    cards = data.get("data") if isinstance(data, dict) else None
    if not isinstance(cards, list):
        return Trouble("faulty", "bad_body", "its /models is not a list of models; base_urls should end in /v1")
    names = [card["id"] for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]
    if any(same_model(model, name) for name in names):
        return None
    listed = _UNSTORABLE.sub("\ufffd", ", ".join(sorted(names)[:20])) or "none"
    return Trouble("misplaced", "model_not_served", f"does not serve model {model!r}; it serves: {listed}")


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Trouble:
    """The trouble behind a status that is not a success."""
    if 300 <= status < 400:
        # Following would carry pictures and key to wherever it points.
        return Trouble("misplaced", "redirected", "answered with a redirect, which is not followed; correct base_urls")
    if status in (401, 403):
        # Their words often quote a part of the key.
        return Trouble(
            "misplaced", "key_refused", f"refused the key ({status}); set the engine's api_key to a valid one"
        )
    said = f"answered {status}: {_error_words(_json(body))}"
    if status == 404:
        return Trouble("misplaced", "not_found", f"{said} (is the model's name right, and does base_urls end in /v1?)")
    if status in (402, 405, 410):
        return Trouble("misplaced", "refused_by_server", said)
    if status in (429, 503, 529):
        return Trouble(
            "busy", "rate_limited" if status == 429 else "overloaded", said, retry_after(headers.get("retry-after"))
        )
    if 400 <= status < 500 and status not in (408, 409, 425):
        return Trouble("refused", "refused_by_server", said)
    return Trouble("faulty", "server_error", said)


def retry_after(header: str | None) -> float | None:
    """Seconds to wait by a `Retry-After` header (seconds or an HTTP date), a day at most; None if it cannot be read."""
    if header is None:
        return None
    if re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*", header):
        return min(float(header), _DAY_S)
    try:
        then = parsedate_to_datetime(header)
        seconds = (then if then.tzinfo else then.replace(tzinfo=UTC)) - datetime.now(UTC)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return min(max(0.0, seconds.total_seconds()), _DAY_S)


def same_model(asked: str, answered: str) -> bool:
    """Whether a server that calls its model `answered` serves what was `asked` for: the same name, a dated version of
    it, or either with the owner's path in front."""
    asked, answered = asked.casefold().removesuffix("-latest"), answered.casefold().removesuffix("-latest")
    if asked == answered or answered.endswith("/" + asked) or asked.endswith("/" + answered):
        return True
    return answered.startswith(asked) and bool(_VERSION.fullmatch(answered[len(asked) :]))


def _error_words(data: Any) -> str:
    """What an error body says: OpenAI's `{"error": {"message"}}` or one of its relatives."""
    for _ in range(4):
        if isinstance(data, dict):
            data = next((data[key] for key in ("error", "message", "detail", "msg") if data.get(key)), None)
        elif isinstance(data, list):
            data = data[0] if data else None
    words = " ".join(data.split()) if isinstance(data, str) else ""
    return _UNSTORABLE.sub("\ufffd", words) or "no words that can be read"


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _count(value: Any) -> int:
    """A token count that a database column holds; 0 where the server tells none."""
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else 0
