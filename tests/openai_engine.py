"""The `openai` engine, set up against servers of tests/openai_server.py, and asked."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from services.captioner.engines import build
from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.engines.openai import OpenAIEngine
from services.captioner.settings import EngineSpec
from tests.openai_server import OpenAIServer

KEY = "sk-secret-0123456789abcdef"


def make(*servers: OpenAIServer, load: bool = True, **spec: Any) -> OpenAIEngine:
    """An engine named "remote" for the model "tiny"."""
    options = {"type": "openai", "model": "tiny", "api_key": KEY, "timeout_s": 5.0, **spec}
    engine = build("remote", EngineSpec(base_urls=[server.url for server in servers], **options))
    assert isinstance(engine, OpenAIEngine)
    if load:
        engine.load()
    return engine


def caption(engine: OpenAIEngine, prompt: str = "Describe the fox.", **options: Any) -> Generation:
    prepared = engine.prepare(CaptionRequest(options.pop("images", ()), prompt, **options))
    return engine.finish(engine.generate([prepared])[0])


def many(engine: OpenAIEngine, count: int, lanes: int | None = None) -> list[Generation]:
    """Answers to "prompt 0", "prompt 1", ..., asked from as many lanes as the engine wants."""
    with ThreadPoolExecutor(lanes or engine.lanes) as pool:
        return list(pool.map(lambda n: caption(engine, f"prompt {n}"), range(count)))
