"""SQL and JSON operators in whatever reaches a query: filters, searches, sorts, ids, cursors, bodies. Everything is a
bound value; what a sort may name is a list."""

import json

import pytest
from sqlalchemy import text

from shared.core import Core
from tests.attacks.belongings import belongings
from tests.integration.support import Api

INJECTIONS = [
    "' OR '1'='1",
    "'; DROP TABLE captions; --",
    "') UNION SELECT key_hash FROM api_keys --",
    "%' OR 1=1 --",
    "\\'; SELECT pg_sleep(5); --",
    "1; COPY jobs TO PROGRAM 'id'",
    "%(id)s %s {id} :id $1",
    "\u2019 OR 1=1",
    "{}' @> '{}",
    '{"$ne": null}',
    "$.** ? (@ > 0)",
    "?&|",
]
TSQUERY = [
    *("'", "''", '"', "!", "&", "|", "!!!!", "a & ", "a <-> b", "a <99999> b", ":*", "a:*", "((((", "))))", "\\"),
    *(
        "a\\'b",
        "-",
        "- -",
        "or or or",
        '"' * 499,
        "(" * 500,
        "!" * 500,
        "a " * 249,
        "\u0000",
        "\ufffe",
        "\U0001f986" * 100,
    ),
    *("the", "' | 'a' & !'b'"),
]


def counts(core: Core) -> dict[str, int]:
    with core.transaction() as session:
        tables = ("jobs", "captions", "datasets", "api_keys", "classifiers", "scores")
        return {name: session.scalar(text(f"SELECT count(*) FROM {name}")) or 0 for name in tables}


@pytest.mark.parametrize("injection", INJECTIONS)
def test_what_is_asked_for_is_a_value(api: Api, core: Core, injection: str) -> None:
    mine = belongings(core)
    belongings(core, "ben", caption="what only ben may read")
    before = counts(core)
    dataset = f"/v1/datasets/{mine.dataset}"
    for path, name in (
        (f"{dataset}/captions", "q"),
        (f"{dataset}/captions", "class_name"),
        (f"{dataset}/captions", "characteristic"),
        (f"{dataset}/captions", "image_id"),
        (f"{dataset}/captions", "caption_job_id"),
        (f"{dataset}/images", "class_name"),
        (f"{dataset}/images", "after"),
        ("/v1/classifiers", "tag"),
        ("/v1/classifiers", "dataset_id"),
        ("/v1/fine_tuning/jobs", "group_id"),
        ("/v1/fine_tuning/jobs", "after"),
        ("/v1/evaluations", "status"),
    ):
        answer = api.anna.get(path, params={name: injection})
        assert answer.status_code in (200, 404, 422), answer.text
        assert "only ben" not in answer.text
        assert answer.elapsed.total_seconds() < 4
    for name in (
        "metric",
        "order",
        "split",
        "head",
        "after",
        "tag",
        "model",
        "method",
        "captioner",
        "group_id",
        "protocol",
    ):
        answer = api.anna.get("/v1/leaderboard", params={"dataset_id": mine.dataset, name: injection})
        assert answer.status_code in (200, 404, 422), answer.text
    for body in ({"name": injection}, {"display_names": {injection: injection}}, {"display_names": {"cat": injection}}):
        assert api.anna.patch(dataset, json=body).status_code in (200, 409, 422)
    tags = api.anna.patch(f"/v1/classifiers/{mine.classifier}", json={"tags": [injection]})
    assert tags.status_code in (200, 422)
    if tags.status_code == 200:
        assert tags.json()["tags"] == [injection]
        assert [row["id"] for row in api.anna.get("/v1/classifiers", params={"tag": injection}).json()["data"]] == [
            mine.classifier
        ]
    assert counts(core) == before


@pytest.mark.parametrize("query", TSQUERY)
def test_a_search_is_never_an_error_of_the_query_language(api: Api, core: Core, query: str) -> None:
    mine = belongings(core)
    answer = api.anna.get(f"/v1/datasets/{mine.dataset}/captions", params={"q": query})
    assert answer.status_code in (200, 422), answer.text


@pytest.mark.parametrize(
    "value", [{"$gt": ""}, ["ds"], {"a": {"b": 1}}, 0, True, None, "\u0000", "\ud800", 1e308, -(2**70)]
)
def test_a_value_of_another_shape_is_refused(api: Api, core: Core, value: object) -> None:
    """What other databases would take for an operator."""
    mine = belongings(core)
    for path, body in (
        ("/v1/caption_jobs", {"dataset_id": value}),
        ("/v1/caption_jobs", {"dataset_id": mine.dataset, "seed": value}),
        ("/v1/fine_tuning/jobs", {"dataset_id": mine.dataset, "model": value}),
        ("/v1/fine_tuning/jobs", {"dataset_id": mine.dataset, "metadata": {"a": value}}),
        ("/v1/fine_tuning/groups", {"dataset_id": mine.dataset, "name": value, "shots": [value]}),
        ("/v1/evaluations", {"classifier_id": value}),
    ):
        answer = api.anna.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code in (202, 400, 404, 422), f"{path} {body}: {answer.status_code} {answer.text}"
        if answer.status_code == 202:
            assert value in (0, None), f"{path} took {value!r}"
