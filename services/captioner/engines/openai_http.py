"""The wire to model servers. The API key is known to this file alone, and leaves it in one header only."""

import time
from dataclasses import dataclass

import httpx

from services.captioner.engines.openai_replies import Trouble
from services.captioner.settings import EngineSpec
from shared.errors import InvalidInput

_CONNECT_S = 5.0
_MOST_BYTES = 8 * 2**20  # of an answer; a caption has a few hundred
_SHOWN = 300  # characters of a server's words
_KEEP_S = 4.0  # an idle connection; less than the 5 s after which uvicorn, under most of these servers, closes it


@dataclass(frozen=True)
class Answer:
    status: int
    headers: httpx.Headers
    body: bytes


class Wire:
    """Connections to each of `spec.base_urls`. Raises InvalidInput for a key or URL that cannot be used safely.
    Its clients live as long as the process."""

    def __init__(self, spec: EngineSpec, engine: str) -> None:
        self._key = _checked_key(spec, engine)
        self.addresses = _addresses(spec, engine)  # {URL up to /v1: host:port}
        self._clients = {url: self._client(url, spec.concurrency) for url in self.addresses}

    def send(self, url: str, method: str, path: str, until: float, content: bytes | None = None) -> Answer | Trouble:
        """The whole answer, by `until` (time.monotonic()). Errors below HTTP are troubles too; their texts are quoted
        only where no header can be in them."""
        left = max(0.01, until - time.monotonic())
        timeout = httpx.Timeout(left, connect=min(_CONNECT_S, left))
        body = bytearray()
        try:
            with self._clients[url].stream(method, url + path, content=content, timeout=timeout) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > _MOST_BYTES:
                        return Trouble("faulty", "bad_body", f"answers more than {_MOST_BYTES} bytes")
                    if time.monotonic() > until:  # httpx's own limit is between two bytes: a trickle would never end
                        return Trouble("slow", "timeout", "sends its answer too slowly")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            return Trouble("down", "unreachable", f"cannot be reached ({type(error).__name__}: {error})")
        except httpx.TimeoutException:
            return Trouble("slow", "timeout", f"did not answer within {left:.3g} s")
        except httpx.RequestError as error:
            return Trouble("faulty", "cut_off", f"broke off its answer ({type(error).__name__})")
        return Answer(response.status_code, response.headers, bytes(body))

    def say(self, trouble: Trouble) -> str:
        """A trouble's words without the key, which some servers quote, and not too many of them."""
        words = trouble.words.replace(self._key, "[api_key]") if self._key else trouble.words
        return words if len(words) <= _SHOWN else words[:_SHOWN] + "…"

    def _client(self, url: str, connections: int) -> httpx.Client:
        """A proxy named in the environment is used for https only, where it passes on what it cannot read. Over plain
        http it would see pictures and key, so those connections are always direct, as are those to this machine.
        Redirects are not followed: they could carry both to anywhere."""
        parsed = httpx.URL(url)
        here = parsed.host in ("localhost", "::1") or parsed.host.startswith("127.")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx.Client(
            headers={**headers, "Content-Type": "application/json", "Accept-Encoding": "identity"},
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_KEEP_S
            ),
            follow_redirects=False,
            trust_env=parsed.scheme == "https" and not here,
        )


def _checked_key(spec: EngineSpec, engine: str) -> str:
    key = spec.api_key.get_secret_value().strip() if spec.api_key else ""
    if not key.isascii() or not key.isprintable() or " " in key:
        # Sent all the same, the error of the HTTP library would quote it.
        raise InvalidInput(
            f"The api_key of engine {engine!r} holds characters that a header cannot carry (spaces, line breaks or "
            "letters outside ASCII). Copy it again.",
            code="invalid_api_key",
            param=f"engines.{engine}.api_key",
        )
    return key


def _addresses(spec: EngineSpec, engine: str) -> dict[str, str]:
    addresses: dict[str, str] = {}
    for url in spec.base_urls:
        if url.username or url.password or url.query or url.fragment:
            raise InvalidInput(
                f"A base URL of engine {engine!r} (host {url.host}) has a user, password, query or fragment. URLs are "
                "logged: give a key as api_key, and the URL up to /v1.",
                code="invalid_base_url",
                param=f"engines.{engine}.base_urls",
            )
        addresses[str(url).rstrip("/")] = f"{url.host}:{url.port}"
    return addresses
