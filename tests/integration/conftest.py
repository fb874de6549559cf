"""Real PostgreSQL and Valkey, started once; the real schema, emptied before each test that asks for `core` or `api`."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text

from services.captioner import routes as captioner_routes
from services.embedded.servers import start_postgres, start_valkey
from services.evaluator import app as evaluator
from services.trainer import app as trainer
from shared.config import CoreSettings
from shared.core import Core
from shared.db.migrate import migrate
from shared.db.models import Base
from shared.db.session import Database
from shared.web.api import create_api
from shared.web.auth import Scope, create_key
from shared.web.serve import BoundedProtocol
from tests.integration.captioner_server import CaptionerServer, captioner_server
from tests.integration.support import DEAD_REDIS, JSON_LIMIT, UPLOAD_LIMIT, Api, Servers, client, wait_for
from tests.s3_server import S3Server, s3_server

ROOT = Path(__file__).resolve().parents[2]
ROUTERS = (captioner_routes.router, *trainer.ROUTERS, *evaluator.ROUTERS)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    state = tmp_path_factory.mktemp("state")
    with ExitStack() as stop:
        postgres = start_postgres(state)
        stop.callback(postgres.stop)
        valkey = start_valkey(state)
        stop.callback(valkey.stop)
        database = Database(postgres.url)
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ALTER SYSTEM SET fsync = off"))  # nothing here outlives the session
            connection.execute(text("SELECT pg_reload_conf()"))
        migrate(database)
        database.close()
        yield Servers(postgres.url, valkey.url)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="session")
def settings(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> CoreSettings:
    return CoreSettings(
        database_url=servers.database_url,
        redis_url=servers.redis_url,
        storage_url=f"file://{tmp_path_factory.mktemp('store')}",
        service_token="the service token",
        bootstrap_key=None,
        max_json_bytes=JSON_LIMIT,
        max_upload_bytes=UPLOAD_LIMIT,
        lease_seconds=30,
        reconcile_seconds=0.1,
        requeue_after_seconds=0,
        max_failures=3,
    )


@pytest.fixture(scope="session")
def _core(settings: CoreSettings) -> Iterator[Core]:
    core = Core.from_settings(settings, pool_size=20)
    yield core
    core.close()


@pytest.fixture
def core(_core: Core) -> Core:
    """The empty database, the empty queue."""
    tables = ", ".join(Base.metadata.tables)
    with _core.db.transaction() as session:
        session.execute(text(f"TRUNCATE {tables} CASCADE"))
    _core.queue.redis.flushall()
    return _core


@pytest.fixture
def core_without_redis(core: Core) -> Iterator[Core]:
    """The same database and store, and a Redis that nobody answers at."""
    settings = core.settings.model_copy(update={"redis_url": type(core.settings.redis_url)(DEAD_REDIS)})
    deaf = Core.from_settings(settings, pool_size=5)
    yield deaf
    deaf.close()


@pytest.fixture(scope="session")
def app(_core: Core) -> FastAPI:
    """Every service's routes; the captioner's engines are not started."""
    return create_api("Captune", _core, ROUTERS)


@pytest.fixture
def client_for(app: FastAPI, core: Core) -> Callable[..., TestClient]:
    """`client_for("anna", "read")`: a client with a fresh key."""

    def make(owner: str, *scopes: Scope) -> TestClient:
        with core.transaction() as session:
            _, secret = create_key(session, owner=owner, name="test", scopes=scopes)
        return client(app, secret)

    return make


@pytest.fixture
def api(app: FastAPI, client_for: Callable[..., TestClient]) -> Api:
    return Api(
        anna=client_for("anna", "read", "write"),
        ben=client_for("ben", "read", "write"),
        admin=client_for("root", "admin"),
        reader=client_for("anna", "read"),
        nobody=client(app, None),
    )


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model "tiny"."""
    from tests.tiny_clip import write_tiny_clip

    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny").parent


@pytest.fixture
def lab(core: Core, model_root: Path, tmp_path: Path) -> Iterator[Any]:
    """A `tests.integration.evaluations.Lab`: the model "tiny", and room for its weights in an upload."""
    from shared.clip import warm
    from tests.integration.evaluations import Lab, open_model

    changes = {"model_roots": [model_root], "model_cache": tmp_path, "cache_bytes": 64 * 2**20}
    limits = {"max_json_bytes": 10**6, "max_upload_bytes": 2 * 10**7}
    roomy = Core(core.settings.model_copy(update=changes | limits), core.db, core.queue, core.store)
    app = create_api("Captune", roomy, ROUTERS)

    def connect(owner: str, *scopes: Scope) -> TestClient:
        with core.transaction() as session:
            _, secret = create_key(session, owner=owner, name="test", scopes=scopes)
        return client(app, secret)

    yield Lab(roomy, open_model(model_root, tmp_path), connect)
    warm.forget()


@pytest.fixture(scope="session")
def base_url(app: FastAPI) -> Iterator[str]:
    """The same app behind a real socket: for streams, and bodies sent in pieces."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, http=BoundedProtocol, log_config=None, lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture
def spawn(core: Core) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`spawn("shared.jobs.worker", "ingest")`: a real process on the test's database and queue, killed at the end."""
    settings = core.settings
    environment = os.environ | {
        "DATABASE_URL": settings.database_url.get_secret_value(),
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "STORAGE_URL": settings.storage_url,
        "CAPTUNE_RECONCILE_SECONDS": "0.1",
        "CAPTUNE_REQUEUE_AFTER_SECONDS": "0.2",
        "OMP_NUM_THREADS": "1",
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(module: str, *arguments: str, **extra: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment | extra, cwd=ROOT)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CaptionerServer]:
    with captioner_server() as running:
        running.serve_worker(monkeypatch)
        yield running
