"""A reading request sees one moment of the database: what its first statement found is there for the next, though it is
deleted meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from shared.core import Core
from shared.db.models import Dataset, Job
from shared.db.session import Database
from tests.integration.factories import add_dataset
from tests.integration.probes import PROBES, address, things_of
from tests.integration.support import Api

READING = sorted(path for method, path in PROBES if method == "GET")


@contextmanager
def after_each_statement(core: Core, act: Any) -> Iterator[None]:
    def executed(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        act(connection, statement)

    event.listen(core.db.engine, "after_cursor_execute", executed)
    try:
        yield
    finally:
        event.remove(core.db.engine, "after_cursor_execute", executed)


@pytest.mark.parametrize("path", ["/v1/datasets/{id}", "/v1/datasets"])
def test_what_is_deleted_while_it_is_read_is_shown(core: Core, api: Api, path: str) -> None:
    dataset = add_dataset(core, "anna", images=1)
    other = Database(core.settings.database_url.get_secret_value(), 1)
    deleted = []

    def delete(_: Any, statement: str) -> None:
        if "FROM jobs" in statement and not deleted:
            deleted.append(statement)
            with other.transaction() as session:
                session.delete(session.get_one(Dataset, dataset))
                session.flush()
                session.delete(session.get_one(Job, dataset))

    with after_each_statement(core, delete):
        answer = api.anna.get(path.format(id=dataset))
    other.close()
    assert deleted
    assert answer.status_code == 200, answer.text
    assert dataset in answer.text
    assert api.anna.get(f"/v1/datasets/{dataset}").status_code == 404


@pytest.mark.parametrize("path", READING)
def test_every_reading_route_reads_one_moment(core: Core, api: Api, path: str) -> None:
    things = things_of(core, "anna")
    levels = set()

    def note(connection: Any, statement: str) -> None:
        if "FROM" in statement:
            levels.add(connection.get_execution_options().get("isolation_level"))

    with after_each_statement(core, note):
        for probe in PROBES["GET", path]:
            request = probe(things, things)
            answer = api.admin.get(address(path, request, things), params=request.params, headers=request.headers)
            assert answer.status_code < 500
    # A statement outside a transaction is a moment by itself: the caller's key, the leaderboard's ETag.
    assert levels <= {"REPEATABLE READ", "AUTOCOMMIT"}
