"""What pollers of the leaderboard pay, and that they never see what is no longer so."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from services.evaluator.board import routes_leaderboard
from services.evaluator.board.leaderboard import Board
from shared.core import Core
from shared.db.models import LeaderboardVersion
from shared.leaderboard_version import bump
from tests.integration.factories import add_classifier, add_dataset
from tests.integration.support import Api

PATH = "/v1/leaderboard"


@pytest.fixture
def dataset_id(core: Core) -> str:
    id = add_dataset(core)
    add_classifier(core, id, {"top1": 0.5})
    return id


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each board that was read from the database."""
    found: list[str] = []
    read = Board.read

    def counted(self: Board, session: Session, *rest: Any) -> Any:
        found.append(threading.current_thread().name)
        return read(self, session, *rest)

    monkeypatch.setattr(Board, "read", counted)
    return found


@contextmanager
def statements(core: Core) -> Iterator[list[str]]:
    found: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        found.append(statement)

    event.listen(core.db.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(core.db.engine, "before_cursor_execute", note)


def get(api: Api, dataset_id: str, known: str | None = None, **params: Any) -> httpx.Response:
    headers = {} if known is None else {"If-None-Match": known}
    return api.anna.get(PATH, params={"dataset_id": dataset_id, **params}, headers=headers)


def test_nothing_new_is_told_by_one_small_query(api: Api, core: Core, dataset_id: str, readings: list[str]) -> None:
    first = get(api, dataset_id)
    tag = first.headers["ETag"]
    assert tag.startswith('"')
    with statements(core) as ran:
        again = get(api, dataset_id, tag)
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
    assert len([each for each in ran if "api_keys" not in each]) == 1
    assert "leaderboard_versions" in ran[-1]
    assert again.headers["Cache-Control"] == "private, no-cache"
    assert get(api, dataset_id).content == first.content  # a poller without the tag
    assert len(readings) == 1


def test_whatever_changes_the_board_changes_its_tag(api: Api, core: Core, dataset_id: str) -> None:
    tags = [get(api, dataset_id).headers["ETag"]]

    def changed() -> dict[str, Any]:
        answer = get(api, dataset_id, tags[-1])
        assert answer.status_code == 200
        assert answer.headers["ETag"] not in tags
        tags.append(answer.headers["ETag"])
        found: dict[str, Any] = answer.json()
        return found

    add_classifier(core, dataset_id, {"top1": 0.7}, seed=1)
    (row,) = changed()["rows"]
    assert row["n"] == 2
    api.anna.patch(f"/v1/classifiers/{row['classifier_ids'][0]}", json={"tags": ["good"], "pinned": True})
    assert changed()["rows"][0]["tags"] == ["good"]
    api.anna.patch(f"/v1/datasets/{dataset_id}", json={"name": "other"})
    assert changed()["dataset_name"] == "other"
    api.anna.patch(f"/v1/datasets/{dataset_id}", json={"display_names": {"cat": "tabby"}})
    assert changed()["rows"][0]["data_changed"]
    assert api.anna.delete(f"/v1/classifiers/{row['classifier_ids'][0]}").status_code == 204
    assert changed()["rows"][0]["n"] == 1
    assert api.anna.delete(f"/v1/datasets/{dataset_id}").status_code == 204
    assert get(api, dataset_id, tags[-1]).status_code == 404


def test_tags_differ_by_what_was_asked_and_by_whom(api: Api, dataset_id: str) -> None:
    asked: list[dict[str, Any]] = [{}, {"metric": "nll"}, {"shots": 4}, {"limit": 5}, {"format": "csv"}, {"tag": "x"}]
    tags = [get(api, dataset_id, **params).headers["ETag"] for params in asked]
    tags.append(api.admin.get(PATH, params={"dataset_id": dataset_id}).headers["ETag"])
    assert len(set(tags)) == len(tags)
    assert get(api, dataset_id, tags[1]).status_code == 200
    assert api.reader.get(PATH, params={"dataset_id": dataset_id}).headers["ETag"] == tags[0]  # the same owner
    assert get(api, dataset_id, metric="top1", split="test").headers["ETag"] == tags[0]  # the defaults, said


def test_another_owner_is_answered_from_no_cache(api: Api, core: Core, dataset_id: str) -> None:
    tag = get(api, dataset_id).headers["ETag"]
    answer = api.ben.get(PATH, params={"dataset_id": dataset_id}, headers={"If-None-Match": tag})
    assert answer.status_code == 404
    assert api.nobody.get(PATH, params={"dataset_id": dataset_id}, headers={"If-None-Match": "*"}).status_code == 401


def test_pollers_at_once_cost_one_reading(
    api: Api, core: Core, dataset_id: str, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Barrier(2)
    counted = Board.read

    def slow(self: Board, *rest: Any) -> Any:
        waiting.wait(10)
        waiting.wait(10)
        return counted(self, *rest)

    monkeypatch.setattr(Board, "read", slow)
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(get, api, dataset_id)
        waiting.wait(10)  # it reads now
        others = [pool.submit(get, api, dataset_id) for _ in range(5)]
        waiting.wait(10)
        bodies = {each.result().content for each in (first, *others)}
    assert len(bodies) == len(readings) == 1


def test_what_is_read_is_of_one_moment(api: Api, core: Core, dataset_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something is written while a board is read: the answer is the old board with the old tag."""
    before = get(api, dataset_id, metric="nll")
    read = Board.read

    def and_meanwhile(self: Board, *rest: Any) -> Any:
        monkeypatch.setattr(Board, "read", read)
        add_classifier(core, dataset_id, {"top1": 0.7}, seed=1)
        return read(self, *rest)

    monkeypatch.setattr(Board, "read", and_meanwhile)
    old = get(api, dataset_id)
    assert old.json()["rows"][0]["n"] == 1
    new = get(api, dataset_id, old.headers["ETag"])
    assert new.status_code == 200
    assert new.json()["rows"][0]["n"] == 2
    assert get(api, dataset_id, before.headers["ETag"], metric="nll").status_code == 200


def test_bits_are_read_once(api: Api, core: Core, dataset_id: str) -> None:
    """A new evaluation costs the reading of its own predictions, not of everybody's."""
    for suffix in ("a", "b"):
        for seed in range(3):
            add_classifier(core, dataset_id, {"top1": 0.6}, suffix=suffix, seed=seed, correct=[True, False] * 5)
    with statements(core) as ran:
        get(api, dataset_id)
    assert sum("evaluations.correct" in each for each in ran) == 1
    api.anna.patch(f"/v1/datasets/{dataset_id}", json={"name": "other"})
    with statements(core) as ran:
        assert get(api, dataset_id).json()["dataset_name"] == "other"
    assert not any("evaluations.correct" in each for each in ran)


def test_versions_only_rise(core: Core, dataset_id: str) -> None:
    def version() -> int:
        with core.transaction() as session:
            return session.get_one(LeaderboardVersion, dataset_id).version

    before = version()

    def raise_it(_: int) -> None:
        with core.transaction() as session:
            bump(session, dataset_id)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(raise_it, range(40)))
    assert version() == before + 40


def test_nothing_of_a_refusal_is_kept(api: Api, dataset_id: str) -> None:
    for _ in range(2):
        assert get(api, dataset_id, after="0" * 32).status_code == 422
    assert routes_leaderboard._rendered._making == {}
