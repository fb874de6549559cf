"""One running stack for the session, driven over HTTP like a user does: real PostgreSQL and Valkey, every process of
its own, models small enough that a run takes about a second."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from captune import Client
from services.embedded.stack import Stack
from shared.schemas.captions import CaptionJob
from shared.schemas.datasets import Dataset
from tests.e2e import pictures
from tests.e2e.waiting import succeeded
from tests.openai_server import OpenAIServer, after, echo
from tests.tiny_clip import write_tiny_clip
from tests.tiny_mllm import build

PROVIDER_KEY, DATABASE_PASSWORD = "sk-of-the-model-server-5d1c", "password-of-the-database-77aa"
OUTSIDE = ("CAPTUNE_", "DATABASE_URL", "REDIS_URL", "STORAGE_URL")  # settings of whoever runs the tests


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(OUTSIDE):
                patch.delenv(name)
        patch.setenv("OMP_NUM_THREADS", "1")  # many processes on few cores
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP (`clip`) and a multimodal LLM (`mllm`), both with random weights."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_clip(folder / "clip")
    build(folder / "mllm")
    return folder


@dataclass
class ModelServer:
    """Somebody else's model server, which can be taken away and brought back at the same address."""

    running: OpenAIServer

    def stop(self) -> None:
        self.running.stop()

    def start(self) -> None:
        self.running = OpenAIServer(port=self.running.port, otherwise=after(0.02, echo))
        self.running.__enter__()


@pytest.fixture(scope="session")
def model_server() -> Iterator[ModelServer]:
    server = ModelServer(OpenAIServer(otherwise=after(0.02, echo)))
    server.running.__enter__()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, models: Path, model_server: ModelServer) -> Iterator[Stack]:
    remote = {"type": "openai", "model": "tiny", "base_urls": [model_server.running.url], "concurrency": 8}
    remote["api_key"] = PROVIDER_KEY
    tiny = {"type": "hf", "model": str(models / "mllm"), "precision": "nf4", "device": "cpu"}
    env = {
        "CAPTUNE_MODEL_ROOTS": str(models),
        "CAPTUNE_ENGINES": json.dumps({"attributes": {}, "tiny": tiny, "remote": remote}),
        "PGPASSWORD": DATABASE_PASSWORD,  # which this PostgreSQL does not ask for; its clients have it all the same
        "CAPTUNE_LEASE_SECONDS": "2",
        "CAPTUNE_RECONCILE_SECONDS": "0.3",
        "CAPTUNE_REQUEUE_AFTER_SECONDS": "1",
        "CAPTUNE_CHECKPOINT_SECONDS": "0",
    }
    with Stack(tmp_path_factory.mktemp("state"), port=0, env=env) as running:
        yield running


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url, stack.api_key) as connected:
        yield connected


@pytest.fixture(scope="session")
def http(stack: Stack) -> Iterator[httpx.Client]:
    """For what the client has no method for, and for requests no client would send."""
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    with httpx.Client(base_url=stack.url, headers=headers, timeout=30.0) as connected:
        yield connected


@pytest.fixture(scope="session")
def shapes(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """3 classes with 8 pictures to train on, 2 for validation and 4 for testing each."""
    folder = pictures.write_folder(tmp_path_factory.mktemp("shapes"), pictures.by_split(8, 2, 4))
    return succeeded(client, client.push(folder, name="shapes", domain="simple shapes"))


@pytest.fixture(scope="session")
def captions(client: Client, shapes: Dataset) -> CaptionJob:
    return succeeded(client, client.caption(dataset_id=shapes.id, words=12))


@pytest.fixture(scope="session")
def many(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """660 pictures to caption: seconds of work, and more than the default engine remembers the measurements of."""
    archive = tmp_path_factory.mktemp("many") / "many.zip"
    pictures.write_zip(archive, pictures.by_split(220, 0, 1))
    return succeeded(client, client.push(archive, name="many", domain="simple shapes", val_fraction=0))
