"""Idempotency-Key as a way in: another body, another route, another owner, at the same moment."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from shared.core import Core
from tests.attacks.belongings import belongings
from tests.integration.support import Api

KEY = {"Idempotency-Key": "k-1"}


def evaluation(classifier: str, split: str = "test") -> dict[str, str]:
    return {"classifier_id": classifier, "split": split}


def test_with_another_body_or_route_it_is_refused(api: Api, core: Core) -> None:
    mine = belongings(core)
    first = api.anna.post("/v1/evaluations", json=evaluation(mine.classifier, "train"), headers=KEY)
    assert first.status_code == 202
    for answer in (
        api.anna.post("/v1/evaluations", json=evaluation(mine.classifier, "val"), headers=KEY),
        api.anna.post(
            "/v1/fine_tuning/jobs", json={"dataset_id": mine.dataset, "method": {"type": "zero_shot"}}, headers=KEY
        ),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused"), answer.text
        assert first.json()["id"] not in answer.text
    again = api.anna.post("/v1/evaluations", json=evaluation(mine.classifier, "train"), headers=KEY)
    assert again.json()["id"] == first.json()["id"]


def test_in_flight_it_is_a_conflict_and_makes_one(api: Api, core: Core) -> None:
    mine = belongings(core)
    with core.transaction() as holding:  # whoever is first holds this lock until the commit
        lock = int.from_bytes(hashlib.sha256(b"anna\0k-1").digest()[:8], signed=True)
        holding.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
        answer = api.anna.post("/v1/evaluations", json=evaluation(mine.classifier, "train"), headers=KEY)
        assert (answer.status_code, answer.json()["code"]) == (409, "in_flight")
        assert answer.headers["Retry-After"].isdigit()
    barrier = threading.Barrier(8)

    def post(_: int) -> tuple[int, str]:
        barrier.wait()
        answer = api.anna.post("/v1/evaluations", json=evaluation(mine.classifier, "train"), headers=KEY)
        return answer.status_code, answer.json().get("id", "")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(8)))
    assert {status for status, _ in answers} <= {202, 409}
    assert len({id for _, id in answers if id}) == 1


def test_another_owners_key_is_another_key(api: Api, core: Core) -> None:
    """Neither what it made nor that it was used can be learnt."""
    mine, theirs = belongings(core), belongings(core, "ben")
    annas = api.anna.post("/v1/evaluations", json=evaluation(mine.classifier, "train"), headers=KEY).json()["id"]
    bens = api.ben.post("/v1/evaluations", json=evaluation(theirs.classifier, "train"), headers=KEY)
    assert bens.status_code == 202
    assert bens.json()["id"] != annas
    guessed = api.ben.post(
        "/v1/evaluations", json=evaluation(mine.classifier, "train"), headers={"Idempotency-Key": "k-2"}
    )
    assert guessed.status_code == 404
    assert annas not in guessed.text


@pytest.mark.parametrize("key", ["a" * 201, "\x00", "a\x00b"])
def test_a_key_that_cannot_be_one_is_refused(api: Api, core: Core, key: str) -> None:
    mine = belongings(core)
    answer = api.anna.post(
        "/v1/evaluations", json=evaluation(mine.classifier, "train"), headers={"Idempotency-Key": key}
    )
    assert answer.status_code == 422, answer.text


def test_keys_whose_owner_and_text_run_together_are_two(api: Api, core: Core, client_for: object) -> None:
    """Owner "a" with key "b\\0c" must not be owner "a\\0b" with key "c": neither holds a NUL."""
    for owner in ("an\x00na", "a b", "", "a/b"):
        assert api.admin.post("/v1/keys", json={"owner": owner, "scopes": ["read"]}).status_code == 422


def test_what_an_admins_key_made_is_not_shown_to_a_lesser_key_of_the_same_owner(
    api: Api, core: Core, client_for: Callable[..., TestClient]
) -> None:
    theirs = belongings(core, "ben")
    body = evaluation(theirs.classifier, "train")
    boss = client_for("anna", "admin")
    made = boss.post("/v1/evaluations", json=body, headers=KEY)
    assert made.status_code == 202
    answer = api.anna.post("/v1/evaluations", json=body, headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")
    assert made.json()["id"] not in answer.text
    assert boss.post("/v1/evaluations", json=body, headers=KEY).json()["id"] == made.json()["id"]
