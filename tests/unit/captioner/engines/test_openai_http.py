"""Pictures and the key go to the servers that were named, and the key goes nowhere else."""

import logging
from typing import Any

import pytest

from services.captioner.engines.base import CaptionRequest
from services.captioner.engines.openai import OpenAIEngine
from services.captioner.settings import EngineSpec
from shared.errors import CaptuneError, InvalidInput, Unavailable
from tests.openai_engine import KEY, caption, make
from tests.openai_server import OpenAIServer, cut, drop, ok, raw, status


def test_redirects_are_not_followed(server: OpenAIServer) -> None:
    engine = make(server)
    with OpenAIServer() as elsewhere:
        server.script.append(status(307, Location=f"{elsewhere.url}/chat/completions"))
        with pytest.raises(Unavailable) as error:
            caption(engine)
        assert error.value.code == "redirected"
        assert elsewhere.seen == []


def test_plain_http_goes_past_proxies(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenAIServer() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert caption(make(server)).text == "a red fox"
        assert (proxy.looks, proxy.seen) == (0, [])


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_key_is_told_without_the_key(server: OpenAIServer, code: int) -> None:
    engine = make(server)
    server.script.append(status(code, f"Incorrect API key provided: {KEY[:12]}..."))
    with pytest.raises(Unavailable, match="api_key") as error:
        caption(engine)
    assert error.value.code == "key_refused"
    assert KEY[:12] not in error.value.message
    assert len(server.seen) == 1
    # With no other server to go to, each request is told the same; it is not made to wait.
    server.script.append(status(code))
    with pytest.raises(Unavailable, match="api_key"):
        caption(engine)
    assert (len(server.seen), server.looks) == (2, 1)


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ({"model": None}, "incomplete_engine"),
        ({"base_urls": []}, "incomplete_engine"),
        ({"base_urls": [f"http://user:{KEY}@127.0.0.1:1/v1"]}, "invalid_base_url"),
        ({"base_urls": [f"http://127.0.0.1:1/v1?key={KEY}"]}, "invalid_base_url"),
        ({"api_key": f"{KEY}\nx"}, "invalid_api_key"),
    ],
)
def test_settings_that_cannot_work(spec: dict[str, Any], code: str) -> None:
    options: dict[str, Any] = {"type": "openai", "model": "tiny", "base_urls": ["http://127.0.0.1:1/v1"], **spec}
    engine = OpenAIEngine(EngineSpec(**options), "remote")
    with pytest.raises(InvalidInput) as error:
        engine.load()
    assert error.value.code == code
    assert KEY not in str(error.value)


def test_the_key_shows_nowhere(server: OpenAIServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = []
    troubles = [status(500, KEY), status(429, KEY), status(400, KEY), status(401, KEY), status(404, KEY), cut, drop]
    wrong = [ok(model=KEY), raw(KEY.encode())]
    for trouble in [*troubles, *wrong]:
        server.otherwise = trouble
        engine = make(server, timeout_s=0.2)
        prepared = engine.prepare(CaptionRequest((), "x"))
        shown += [repr(engine.spec), repr(engine), repr(vars(engine)), engine.revision, repr(prepared)]
        with pytest.raises(CaptuneError) as error:
            engine.generate([prepared])
        shown.append(error.getrepr(style="long", showlocals=False).__str__() + error.value.message)
    server.stop()
    with pytest.raises(Unavailable) as unreachable:
        caption(engine)
    shown += [str(unreachable.value), caplog.text, *(str(vars(record)) for record in caplog.records)]
    assert caplog.records
    assert not [text for text in shown if KEY in text]
