"""A server that dies is started again at its address; one that can't be is given up, with the reason."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from redis import ConnectionError as Gone
from redis import Redis
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from services.embedded import keeper
from services.embedded.keeper import Keeper
from services.embedded.processes import running_in
from services.embedded.servers import Server, start_postgres, start_valkey
from shared.db.session import Database
from shared.errors import Unavailable
from tests.integration.support import wait_for

PROGRAMS = {"postgres", "valkey-server"}


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ct-") as folder:
        yield Path(folder) / "state"


@pytest.fixture
def valkey(state_dir: Path) -> Iterator[Keeper]:
    kept = Keeper(start_valkey(state_dir))
    yield kept
    kept.stop()
    assert not running_in(kept.server.directory, PROGRAMS)


def end(server: Server, number: signal.Signals) -> None:
    """Ends the process it is now, and waits until there is another, or none is tried for."""
    before = server.pid
    os.kill(before, number)
    wait_for(lambda: server.pid != before)


def answers(server: Server) -> bool:
    with closing(Redis.from_url(server.url)) as client:
        try:
            return bool(client.ping())
        except Gone:
            return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_valkey_comes_back_at_once_with_what_it_had(valkey: Keeper, number: signal.Signals) -> None:
    url = valkey.server.url
    with closing(Redis.from_url(url)) as client:
        client.set("word", "kept")
        client.bgrewriteaof()  # written and synced, whenever the second's sync comes
        wait_for(lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0)
        began = time.monotonic()
        end(valkey.server, number)
        wait_for(lambda: answers(valkey.server))
        assert time.monotonic() - began < 5
        assert valkey.server.url == url
        assert client.get("word") == b"kept", "the same client, connected anew"
    assert valkey.given_up is None


def test_postgres_recovers_and_pools_reconnect(state_dir: Path) -> None:
    kept = Keeper(start_postgres(state_dir))
    database = Database(kept.server.url)
    try:
        with database.transaction() as session:
            session.execute(text("CREATE TABLE kept AS SELECT 1 AS one"))
        for number in (signal.SIGKILL, signal.SIGINT):  # a crash, and an orderly end that nobody asked of us
            with database.engine.connect() as busy:
                assert busy.scalar(text("SELECT one FROM kept")) == 1
                end(kept.server, number)
                wait_for(lambda: serves(database))
                with pytest.raises(OperationalError):
                    busy.execute(text("SELECT 1"))
    finally:
        database.close()
        kept.stop()
    assert not running_in(kept.server.directory, PROGRAMS)
    assert not (state_dir / "postgres" / "postmaster.pid").exists(), "it was stopped in order"


def serves(database: Database) -> bool:
    try:
        with database.transaction() as session:
            return session.scalar(text("SELECT one FROM kept")) == 1
    except OperationalError:
        return False


def test_it_is_given_up_with_the_end_of_the_log(
    valkey: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeper, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(keeper, "MOST_FAILURES", 3)
    (manifest,) = (valkey.server.directory / "appendonlydir").glob("*.manifest")
    manifest.write_text("this is not a manifest\n")
    os.kill(valkey.server.pid, signal.SIGKILL)
    wait_for(lambda: valkey.given_up is not None)
    assert valkey.given_up is not None
    assert "valkey exited with code 1 and did not stay up when it was started again 3 times" in valkey.given_up.message
    assert "manifest" in valkey.given_up.message, "the log says why"
    told = [record.getMessage() for record in caplog.records if "starting it again" in record.getMessage()]
    assert "was killed by SIGKILL; starting it again in 0.0 s" in told[0]
    assert [message.partition(" again in ")[2].split()[0] for message in told] == ["0.0", "0.0", "0.0"]


def test_old_failures_are_forgotten(valkey: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "MOST_FAILURES", 1)
    monkeypatch.setattr(keeper, "STABLE", 0.0)
    for _ in range(3):
        end(valkey.server, signal.SIGKILL)
        wait_for(lambda: answers(valkey.server))
    assert valkey.given_up is None


def test_stopping_does_not_wait_for_the_next_start(
    valkey: Keeper, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "FIRST_DELAY", 60.0)
    end(valkey.server, signal.SIGKILL)  # this time it is started at once
    wait_for(lambda: answers(valkey.server))
    os.kill(valkey.server.pid, signal.SIGKILL)
    wait_for(lambda: valkey.server.poll() is not None)
    began = time.monotonic()
    valkey.stop()
    valkey.stop()
    assert time.monotonic() - began < 3
    with pytest.raises(Unavailable, match="has been stopped"):
        valkey.server.start()
    start_valkey(state_dir).stop()  # the directory was given back
