"""What every answer keeps to when something goes wrong: its id, its shape, and silence about the inside."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from shared.classifier.card import CARD
from shared.clip.local_dir import CONFIG, WEIGHTS
from shared.core import Core
from shared.web.api import CoreDep, create_api
from tests.attacks.belongings import belongings
from tests.attacks.test_model_files import packed, post, vouched
from tests.integration.conftest import ROUTERS
from tests.integration.evaluations import Lab, write_folder
from tests.integration.factories import add_dataset
from tests.integration.support import Api, client

SECRET = "hunter2-of-the-database"
INSIDE = ("traceback", "psycopg", "sqlalchemy", "site-packages", "/srv", "select ", "insert into", SECRET, "postgresql://",
          "redis://", "file://", "errno", ".py", "/tmp/", "/etc/", "/usr/", "/home/", "/root/")  # fmt: skip


def assert_silent(answer: Any, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["X-Request-Id"].startswith("req_")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    for sign in INSIDE:
        assert sign not in answer.text.lower(), f"tells of {sign!r}: {answer.text}"


def broken_by(core: Core, raises: Callable[[Core], None]) -> TestClient:
    router = APIRouter()

    @router.get("/v1/broken")
    def broken(core: CoreDep) -> None:
        raises(core)

    return client(create_api("broken", core, [router]), None)


def sql(statement: str) -> Callable[[Core], None]:
    def run(core: Core) -> None:
        with core.transaction() as session:
            session.execute(text(statement))

    return run


def raised(error: Exception) -> Callable[[Core], None]:
    def run(_: Core) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (raised(RuntimeError(f"cannot read /srv/secret.py with {SECRET}")), 500),
        (raised(IntegrityError("INSERT INTO api_keys", {"key": SECRET}, Exception(SECRET))), 500),
        (raised(MemoryError()), 500),
        (raised(RecursionError("in site-packages")), 500),
        (sql("SELECT * FROM no_such_table"), 500),
        (sql("SELECT 1/0"), 422),
        (sql("INSERT INTO api_keys (id) VALUES ('x')"), 500),
    ],
    ids=["runtime", "integrity", "memory", "recursion", "no table", "division", "not null"],
)
def test_an_error_says_nothing_of_the_inside(core: Core, fault: Callable[[Core], None], status: int) -> None:
    assert_silent(broken_by(core, fault).get("/v1/broken"), status)


def test_an_error_is_logged_with_the_id_that_the_answer_has(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "shared.web.answers"):
        answer = broken_by(core, raised(RuntimeError("the reason"))).get("/v1/broken")
    assert answer.headers["X-Request-Id"]
    (record,) = [record for record in caplog.records if record.name == "shared.web.answers"]
    assert record.exc_info is not None
    assert "the reason" in str(record.exc_info[1])


def test_a_statements_values_are_in_no_log(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    def duplicate(core: Core) -> None:
        with core.transaction() as session:
            row = {"id": "key_1", "owner": "a", "name": SECRET, "key_hash": SECRET, "scopes": ["read"]}
            statement = """INSERT INTO api_keys (id, owner, name, key_hash, scopes, prefix)
                VALUES (:id, :owner, :name, :key_hash, :scopes, '')"""
            for _ in range(2):
                session.execute(text(statement), row)

    with caplog.at_level(logging.DEBUG):
        assert_silent(broken_by(core, duplicate).get("/v1/broken"), 500)
    formatter = logging.Formatter()
    logged = "\n".join(formatter.format(record) for record in caplog.records)
    assert "[parameters:" not in logged
    assert "key_hash" in logged, "the statement itself is"


def test_a_database_that_refuses_the_password_is_not_quoted(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    url = f"postgresql+psycopg://captune:{SECRET}@127.0.0.1:1/captune"
    settings = core.settings.model_copy(update={"database_url": type(core.settings.database_url)(url)})
    away = Core.from_settings(settings, pool_size=1)
    try:
        caller = client(create_api("away", away, ROUTERS), "ck_any")
        with caplog.at_level(logging.DEBUG):
            assert_silent(caller.get("/v1/datasets"), 503)
            ready = caller.get("/readyz")
    finally:
        away.close()
    formatter = logging.Formatter()
    assert SECRET not in ready.text
    assert SECRET not in "\n".join(formatter.format(record) for record in caplog.records)


def test_settings_show_no_secret(core: Core) -> None:
    for shown in (repr(core.settings), str(core.settings), repr(core), core.settings.model_dump_json()):
        assert "the service token" not in shown
        assert core.settings.database_url.get_secret_value() not in shown
        assert core.settings.redis_url.get_secret_value() not in shown


def test_a_store_that_lost_a_file_does_not_say_where_it_was(api: Api, core: Core) -> None:
    mine = belongings(core)
    missing = api.anna.get(f"/v1/classifiers/{mine.classifier}/download")
    assert_silent(missing, missing.status_code)
    assert core.store.root not in missing.text


@pytest.mark.parametrize("model", ["/etc", "../../etc", "~/x", "broken", "broken/", "./nothing"])
def test_a_model_that_cannot_be_used_is_named_without_its_place(lab: Lab, model_root: Path, model: str) -> None:
    (model_root / "broken").mkdir(exist_ok=True)
    (model_root / "broken" / "open_clip_config.json").write_text("{}")
    (model_root / "broken" / "open_clip_model.safetensors").write_text("")
    sent = {"dataset_id": add_dataset(lab.core, images=1), "clip_model": model}
    answer = lab.client("anna", "read", "write").post("/v1/caption_jobs", json=sent)
    assert_silent(answer, 422)
    assert answer.json()["code"] in ("model_not_allowed", "bad_model")
    assert str(model_root) not in answer.text


def test_a_classifier_that_cannot_be_used_is_named_without_its_place(lab: Lab, tmp_path: Path) -> None:
    """Of the files in it, and of what the libraries say of them."""
    anna, dataset = lab.client("anna", "read", "write"), add_dataset(lab.core)
    root = str(lab.core.settings.model_roots[0])
    for spoil in (
        lambda folder: (folder / CARD).unlink(),
        lambda folder: (folder / WEIGHTS).write_bytes(b"no weights"),
        lambda folder: edit(folder / CONFIG, "model_cfg", "vision_cfg", layers="many"),
        lambda folder: edit(folder / CONFIG, "model_cfg", "vision_cfg", layers=1),
        lambda folder: edit(folder / CONFIG, "model_cfg", "vision_cfg", image_size=[32, 64]),
        lambda folder: tokenizer_that_is_none(folder),
        lambda folder: edit(folder / CARD, weights="base", base_model="/etc"),
        lambda folder: edit(folder / CARD, weights="base", base_model="../../../x"),
    ):
        folder = tmp_path / "files"
        folder.mkdir()
        write_folder(folder, lab.clip, "own")
        spoil(folder)
        if (folder / CARD).is_file():
            vouched(folder)
        answer = post(anna, packed(folder), dataset)
        assert_silent(answer, 422)
        assert root not in answer.text
        shutil.rmtree(folder)


def edit(file: Path, *inside: str, **changes: Any) -> None:
    content = part = json.loads(file.read_text())
    for key in inside:
        part = part[key]
    part |= changes
    file.write_text(json.dumps(content))


def tokenizer_that_is_none(folder: Path) -> None:
    edit(folder / CONFIG, "model_cfg", "text_cfg", hf_tokenizer_name="x")
    (folder / "tokenizer.json").write_text("{}")


def test_405_names_every_method_of_the_address_and_no_other(api: Api, app: FastAPI) -> None:
    for path, operations in app.openapi()["paths"].items():
        expected = {method.upper() for method in operations}
        for method in {"GET", "PUT", "POST", "PATCH", "DELETE", "TRACE", "OPTIONS"} - expected:
            address = path.replace("{id}", "x").replace("{model}", "x")
            answer = api.anna.request(method, address)
            if answer.status_code != 405:  # "import" could be an id
                assert address in ("/v1/caption_jobs/import", "/v1/classifiers/import", "/v1/caption_jobs/preview"), (
                    address
                )
                continue
            assert set(answer.headers["Allow"].split(", ")) == expected, f"{method} {address}"


def test_the_document_holds_no_secret_and_tells_every_error(app: FastAPI, core: Core) -> None:
    document = app.openapi()
    shown = str(document)
    for secret in ("the service token", core.settings.database_url.get_secret_value(), core.store.root):
        assert secret not in shown
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "500" not in operation["responses"], "no error of the server's own is a part of the contract"
            if path.startswith("/v1/"):
                assert {"401", "403", "429", "503"} <= operation["responses"].keys(), path
