"""No secret is anywhere but where it belongs. Run last or alone: whatever the stack has done by then is searched."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis import Redis
from sqlalchemy import inspect, text

from captune import Client
from captune.errors import CaptuneAPIError
from services.embedded.stack import Stack
from shared.db.session import Database
from shared.schemas.captions import CaptionJob
from shared.schemas.datasets import Dataset
from tests.e2e.conftest import DATABASE_PASSWORD, PROVIDER_KEY, ModelServer
from tests.e2e.waiting import finished, succeeded

pytestmark = pytest.mark.timeout(180)
MISTYPED = "ck_a-key-that-somebody-mistyped-by-one"


@pytest.fixture(scope="module")
def secrets(
    stack: Stack, client: Client, http: httpx.Client, models: Path, shapes: Dataset, captions: CaptionJob
) -> dict[str, str]:
    """After a whole flow, with what goes wrong on the way: wrong keys, refused requests, jobs that fail."""
    made = client.create_key(owner="somebody", name="to be revoked", scopes=["read"])
    succeeded(client, client.caption(dataset_id=shapes.id, engine="remote", words=9, seed=77))
    method = {"type": "flyp", "hyperparameters": {"epochs": 1, "batch_size": 8}}
    trained = succeeded(client, client.train(model=str(models / "clip"), dataset_id=shapes.id, method=method))
    finished(client, client.train(model="/etc", dataset_id=shapes.id, method={"type": "zero_shot"}))
    assert trained.fine_tuned_model is not None
    http.get(f"/v1/classifiers/{trained.fine_tuned_model}/download").raise_for_status()
    for path in ("/v1/datasets", "/v1/keys", f"/v1/datasets/{shapes.id}?key={MISTYPED[:3]}"):
        assert httpx.get(stack.url + path, headers={"Authorization": f"Bearer {MISTYPED}"}).status_code == 401
    http.post("/v1/evaluations", json={"classifier_id": 7})
    client.revoke_key(made.id)
    with pytest.raises(CaptuneAPIError) as refused, Client(stack.url, made.key) as revoked:
        list(revoked.datasets())
    assert refused.value.status == 401
    return {
        "the admin's key": stack.api_key,
        "a key that was revoked": made.key,
        "a key that was mistyped": MISTYPED,
        "the service token": stack.env["CAPTUNE_SERVICE_TOKEN"],
        "the model server's key": PROVIDER_KEY,
        "the database's password": DATABASE_PASSWORD,
    }


def found(secrets: dict[str, str], where: str, data: bytes) -> list[str]:
    return [f"{name} in {where}" for name, secret in secrets.items() if secret.encode() in data]


def test_the_model_server_was_shown_its_key(secrets: dict[str, str], model_server: ModelServer) -> None:
    """Else the search below would prove nothing of it."""
    assert {each.headers["Authorization"] for each in model_server.running.seen} == {f"Bearer {PROVIDER_KEY}"}


def test_in_no_log(secrets: dict[str, str], stack: Stack) -> None:
    logs = list((stack.state_dir / "logs").iterdir())
    assert {"api.log", "worker-caption.log", "worker-fine_tune.log", "postgres.log"} <= {path.name for path in logs}
    assert "request" in (stack.state_dir / "logs" / "api.log").read_text()
    assert [each for path in logs for each in found(secrets, path.name, path.read_bytes())] == []


def test_in_no_file_but_the_connection(secrets: dict[str, str], stack: Stack) -> None:
    """Store, exports, checkpoints, PostgreSQL's own files, Valkey's append-only file."""
    paths = [path for path in stack.state_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(paths) > 100
    holders = {path for path in paths if found(secrets, path.name, path.read_bytes())}
    assert {path.name for path in holders} == {"connection.json"}
    for path in holders:
        assert path.stat().st_mode & 0o077 == 0, "for its owner alone"
        assert found(secrets, "", path.read_bytes()) == ["the admin's key in "]


def test_in_no_argument_of_a_process(secrets: dict[str, str]) -> None:
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines[path.parent.name] = path.read_bytes()
        except OSError:
            continue  # it has ended
    assert sum(b"shared.jobs.worker" in line for line in lines.values()) >= 4
    assert str(os.getpid()) in lines
    assert [each for pid, line in lines.items() for each in found(secrets, f"arguments of {pid}", line)] == []


def rows(database: Database) -> Iterator[tuple[str, str]]:
    with database.engine.connect() as connection:
        for table in inspect(connection).get_table_names():
            query = text(f'SELECT t::text FROM "{table}" t')
            yield from ((table, row) for row in connection.execute(query).scalars())


def test_in_no_column_of_the_database(secrets: dict[str, str], stack: Stack) -> None:
    database = Database(stack.env["DATABASE_URL"])
    tables = set()
    leaks = []
    for table, row in rows(database):
        tables.add(table)
        leaks += found(secrets, f"a row of {table}", row.encode())
    database.close()
    assert {"api_keys", "jobs", "job_events", "captions", "classifiers"} <= tables
    assert leaks == []


def test_in_nothing_that_is_in_redis(secrets: dict[str, str], stack: Stack) -> None:
    redis = Redis.from_url(stack.env["REDIS_URL"])
    keys = list(redis.scan_iter())
    redis.close()
    assert keys
    assert found(secrets, "the names of Redis's keys", b"\n".join(keys)) == []


def test_in_no_answer(secrets: dict[str, str], http: httpx.Client, shapes: Dataset, captions: CaptionJob) -> None:
    paths = [
        "/openapi.json",
        "/readyz",
        "/healthz",
        "/metrics",
        "/v1/keys",
        "/v1/models",
        "/v1/datasets",
        "/v1/classifiers",
    ]
    paths += ["/v1/caption_jobs", "/v1/fine_tuning/jobs", "/v1/evaluations", f"/v1/leaderboard?dataset_id={shapes.id}"]
    paths += [f"/v1/caption_jobs/{captions.id}/export?format={format}" for format in ("json", "csv", "jsonl", "txt")]
    for kind in ("caption_jobs", "fine_tuning/jobs"):
        jobs = http.get(f"/v1/{kind}").json()["data"]
        assert jobs
        paths += [f"/v1/{kind}/{job['id']}/events" for job in jobs]
    for path in paths:
        answer = http.get(path)
        assert answer.status_code == 200, f"{path}: {answer.text}"
        assert found(secrets, path, answer.content) == []
