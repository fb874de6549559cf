"""One owner's things do not exist for another: whatever is asked, about whichever of them, the answer is that for an id
that does not exist. The routes and their parameters come from the OpenAPI document, so that no new one is forgotten."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from services.captioner.serving.batcher import Batcher
from shared.core import Core
from shared.db.models import ApiKey, Base
from tests.integration.factories import (
    add_classifier,
    add_dataset,
    archive,
    read_job,
)
from tests.integration.probes import KINDS, NOT_AN_OWNERS, OWNERLESS, PROBES, Request, Things, address, things_of
from tests.integration.support import Api, wait_for
from tests.unit.captioner.serving.echo import Echo

Operation = tuple[str, str]


@pytest.fixture
def bens(core: Core) -> Things:
    """Between two lots of Anna's and with one more after them: beyond any cursor there is something of both."""
    things_of(core, "anna")
    return things_of(core, "ben")


@pytest.fixture
def annas(core: Core, bens: Things, api: Api) -> Things:
    annas = things_of(core, "anna")
    add_dataset(core, "ben")
    add_classifier(core, bens.dataset, {"top1": 0.25}, owner="ben", group_id=bens.group)
    body = {"dataset_id": annas.dataset}
    made = api.anna.post("/v1/caption_jobs", json=body, headers={"Idempotency-Key": annas.idempotency_key})
    assert made.status_code == 202
    etag = api.anna.get("/v1/leaderboard", params={"dataset_id": annas.dataset}).headers["ETag"]
    return replace(annas, etag=etag.strip('"'))


@pytest.fixture
def http(api: Api, base_url: str, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, httpx.Client]]:
    """Over a socket: headers and bytes as they are sent. A caption model is served, so that previews are made."""
    batcher = Batcher(Echo(), max_wait_ms=1)
    batcher.start()
    monkeypatch.setattr(app.state, "batchers", {"attributes": batcher}, raising=False)
    wait_for(lambda: batcher.ready)
    keys = {name: getattr(api, name).headers["authorization"] for name in ("anna", "ben", "admin")}
    clients = {
        name: httpx.Client(base_url=base_url, headers={"Authorization": key}, timeout=30) for name, key in keys.items()
    }
    yield clients
    for each in clients.values():
        each.close()
    batcher.stop()


def send(client: httpx.Client, method: str, path: str, request: Request, of: Things) -> httpx.Response:
    options: dict[str, Any] = {"params": request.params, "headers": request.headers}
    for name in ("json", "data", "files"):
        if (given := getattr(request, name)) is not None:
            options[name] = given
    return client.request(method, address(path, request, of), **options)


def told(answer: httpx.Response, of: Things) -> tuple[int, dict[str, str], str]:
    """All of it, but for the ids that the caller has sent."""
    headers = {name: of.unnamed(value) for name, value in answer.headers.items()}
    for own in ("date", "x-request-id", "etag"):  # a leaderboard's tag is a hash of what was asked, ids and all
        headers.pop(own, None)
    return answer.status_code, headers, of.unnamed(answer.text)


def everything(core: Core) -> dict[str, list[str]]:
    """Every row, as text."""
    found = {}
    with core.transaction() as session:
        for name in Base.metadata.tables.keys() - {ApiKey.__tablename__}:
            found[name] = sorted(session.scalars(text(f"SELECT t::text FROM {name} t")))
    return found


def operations(app: FastAPI) -> dict[Operation, dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, found in app.openapi()["paths"].items()
        for method, operation in found.items()
        if path.startswith("/v1/")
    }


# -- that nothing is left out ------------------------------------------------------------------------------------------


def test_every_route_is_probed(app: FastAPI) -> None:
    assert operations(app).keys() | OWNERLESS.keys() == PROBES.keys() | OWNERLESS.keys()
    assert not PROBES.keys() & OWNERLESS.keys()


def test_every_parameter_that_may_name_something_is_probed(app: FastAPI, annas: Things, bens: Things) -> None:
    schemas = app.openapi()["components"]["schemas"]
    for operation, document in operations(app).items():
        if operation in OWNERLESS:
            continue
        requests = [probe(annas, bens) for probe in PROBES[operation]]
        sent = {name.lower() for each in requests for name in (*each.params, *each.headers)}
        free = {
            each["name"].lower()
            for each in document.get("parameters", ())
            if each["in"] != "path" and _is_text(each["schema"]) and each["name"] not in NOT_AN_OWNERS
        }
        assert free <= sent, f"{operation}: {sorted(free - sent)}"
        named = set().union(*(_names_in(each.json) | set(each.data or ()) for each in requests))
        wanted = {
            name
            for content in document.get("requestBody", {}).get("content", {}).values()
            for name in _properties(content["schema"], schemas)
            if name == "id" or name.endswith(("_id", "_ids"))
        }
        assert wanted <= named, f"{operation}: {sorted(wanted - named)}"


def _is_text(schema: dict[str, Any]) -> bool:
    choices = schema.get("anyOf", [schema])
    return any(each.get("type") == "string" and not {"enum", "const"} & each.keys() for each in choices)


def _properties(schema: dict[str, Any], schemas: dict[str, Any]) -> set[str]:
    """Names of all fields, however deep."""
    found: set[str] = set()
    left, seen = [schema], set()
    while left:
        each = left.pop()
        if isinstance(each, dict):
            found |= set(each.get("properties", ()))
            name = str(each.get("$ref", "")).rpartition("/")[2]
            if name and name not in seen:
                seen.add(name)
                left.append(schemas[name])
            left.extend(each.values())
        elif isinstance(each, list):
            left.extend(each)
    return found


def _names_in(body: Any) -> set[str]:
    if isinstance(body, dict):
        return set(body).union(*(_names_in(value) for value in body.values()))
    return set().union(*(_names_in(each) for each in body)) if isinstance(body, list) else set()


# -- that nothing is told ----------------------------------------------------------------------------------------------


def test_another_owners_things_do_not_exist(
    http: dict[str, httpx.Client], core: Core, annas: Things, bens: Things
) -> None:
    ghosts = annas.ghosts()
    before = everything(core)
    answers = {}
    for (method, path), probes in PROBES.items():
        for number, probe in enumerate(probes):
            real, ghost = probe(annas, bens), probe(ghosts, bens)
            answer = send(http["ben"], method, path, real, annas)
            where = f"{method} {path} {real}"
            assert told(answer, annas) == told(send(http["ben"], method, path, ghost, ghosts), ghosts), where
            assert method == "GET" or 400 <= answer.status_code < 500, f"{where}: {answer.text}"
            if "{id}" in path and not real.id and not path.startswith("/v1/keys"):
                assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), where
            answers[method, path, number] = answer
            mentioned = annas.unnamed(json.dumps([real.params, real.headers, real.json, real.data, str(answer.url)]))
            for name, value in asdict(annas).items():
                assert value not in answer.text or f"<{name}>" in mentioned, f"{where} tells of {value}"
    assert everything(core) == before

    # And there was something to be seen: an admin's answers are others. What deletes comes last.
    for (method, path), probes in sorted(
        PROBES.items(), key=lambda item: (item[0][0] == "DELETE", item[0][0] != "GET")
    ):
        for number, probe in enumerate(probes):
            request = probe(annas, bens)
            if request.of_ones_own:
                continue
            seen = send(http["admin"], method, path, request, annas)
            was = answers[method, path, number]
            assert (seen.status_code, seen.text) != (was.status_code, was.text), f"{method} {path} {request}"


def test_the_owner_and_an_admin_see_them(http: dict[str, httpx.Client], annas: Things, bens: Things) -> None:
    for (method, path), probes in PROBES.items():
        if method == "GET" and "{id}" in path:
            for who in ("anna", "admin"):
                answer = send(http[who], method, path, probes[0](annas, bens), annas)
                assert answer.status_code == 200, f"{who}: {method} {path}: {answer.text}"


def test_lists_show_ones_own_and_an_admin_all(http: dict[str, httpx.Client], annas: Things, bens: Things) -> None:
    lists = [path for method, path in PROBES if method == "GET" and "{id}" not in path and "leaderboard" not in path]
    assert len(lists) == 7
    for path in lists:
        if path == "/v1/keys":
            continue
        mine, theirs, everyones = (
            {item["id"] for item in http[who].get(path).json()["data"]} for who in ("anna", "ben", "admin")
        )
        kind = next(kind for prefix, kind in KINDS.items() if f"{path}/".startswith(prefix))
        assert getattr(annas, kind) in mine, path
        assert getattr(bens, kind) in theirs, path
        assert not mine & theirs, path
        assert everyones == mine | theirs, path


def test_anothers_idempotency_key_is_as_good_as_new(http: dict[str, httpx.Client], annas: Things, bens: Things) -> None:
    used = {"Idempotency-Key": annas.idempotency_key}
    answer = http["ben"].post("/v1/caption_jobs", json={"dataset_id": bens.dataset}, headers=used)
    assert answer.status_code == 202, answer.text
    again = http["ben"].post("/v1/caption_jobs", json={"dataset_id": bens.dataset}, headers=used)
    assert again.json()["id"] == answer.json()["id"]
    mine = http["anna"].post("/v1/caption_jobs", json={"dataset_id": annas.dataset}, headers=used)
    assert mine.status_code == 202
    assert mine.json()["id"] != answer.json()["id"]


def test_the_same_name_and_the_same_bytes_may_be_uploaded_by_both(http: dict[str, httpx.Client], core: Core) -> None:
    """No name, hash or path is unique across owners, so a conflict tells nothing."""
    packed, form = archive(), {"name": "pets", "domain": "pets"}
    answers = [
        http[who].post("/v1/datasets", data=form, files={"file": ("a.zip", packed)}) for who in ("anna", "ben", "ben")
    ]
    assert [answer.status_code for answer in answers] == [202] * 3
    assert len({answer.json()["id"] for answer in answers}) == 3


# -- what an admin does for others -------------------------------------------------------------------------------------


def test_what_an_admin_starts_belongs_to_the_owner_of_the_data(api: Api, core: Core, annas: Things) -> None:
    made = [
        api.admin.post("/v1/caption_jobs", json={"dataset_id": annas.dataset}),
        api.admin.post("/v1/evaluations", json={"classifier_id": annas.classifier, "split": "train"}),
        api.admin.post("/v1/fine_tuning/jobs", json={"dataset_id": annas.dataset, "method": {"type": "flyp"}}),
    ]
    for answer in made:
        assert answer.status_code == 202, answer.text
        assert read_job(core, answer.json()["id"]).owner == "anna"


def test_an_admin_mixes_no_owners_things(api: Api, annas: Things, bens: Things) -> None:
    """The evaluation would show one owner the pictures' paths and the classes of the other's data."""
    for body in (
        {"classifier_id": bens.classifier, "dataset_id": annas.dataset},
        {"classifier_id": bens.classifier, "held_aside_dataset_id": annas.dataset},
        {"model": "starter", "dataset_id": bens.dataset, "held_aside_dataset_id": annas.dataset},
    ):
        answer = api.admin.post("/v1/evaluations", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "owners_differ"), answer.text
