from collections.abc import Iterator
from pathlib import Path

import pytest

from services.captioner.engines import openai, openai_servers
from tests import tiny_mllm
from tests.openai_server import OpenAIServer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL; not to be changed."""
    return tiny_mllm.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(openai_servers, "_FIRST_REST_S", 0.1)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running
