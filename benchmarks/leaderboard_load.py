"""The leaderboard under load: 200 pollers on a data set with 10,000 evaluations, and another 10,000 elsewhere.

    python benchmarks/leaderboard_load.py [--seconds 30]

A real PostgreSQL, the evaluator's API in its own process, every poller one request each 2 s (not in step), as a
dashboard does it. Four cases: with and without If-None-Match, while nothing happens and while one new evaluation a
second is committed; and once more with the pollers spread over four views of the board. Latencies are those of whole
requests as a client sees them, on one machine for all of it; api_cpu_ms is what a request costs the API. Besides, in
this process, one at a time: the SQL query alone (PostgreSQL's own time, by EXPLAIN ANALYZE, and as the API waits for
it), and a page made with nothing cached. A table, then one JSON line. The target is a p99 below 25 ms."""

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from evaluated.data import OWNER, SEEDS, add_dataset, add_evaluations, connection_of, one_evaluation
from running.beside import beside
from running.processes import cpu_seconds
from sqlalchemy import text
from sqlalchemy.orm import Session

from captune.tables import table
from services.embedded.servers import start_postgres, start_valkey
from services.evaluator.board import leaderboard_query
from services.evaluator.board.leaderboard import Board, header
from services.evaluator.board.leaderboard_query import Asked, board_rows
from shared.config import CoreSettings
from shared.core import Core
from shared.db.migrate import migrate
from shared.leaderboard_version import bump
from shared.web.auth import Principal, create_key

POLLERS, PERIOD, TARGET_MS = 200, 2.0, 25.0  # PERIOD in seconds
SETTINGS, OTHERS = 2000, 20
VIEWS: list[dict[str, str]] = [{}, {"metric": "nll"}, {"shots": "16"}, {"format": "csv"}]
WHO = Principal(OWNER, frozenset({"read"}))


async def poll(url: str, key: str, params: dict[str, str], conditional: bool, until: float) -> list[float]:
    """Milliseconds of each request of one poller, on a connection of its own: 200 users are 200 clients, and a pool
    that they share would measure itself. The first request, which connects, does not count."""
    found: list[float] = []
    tag = ""
    await asyncio.sleep(random.random() * PERIOD)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False, verify=False) as client:
        while time.monotonic() < until:
            began = time.perf_counter()
            held = {"If-None-Match": tag} if conditional and tag else {}
            answer = await client.get("/v1/leaderboard", params=params, headers=held)
            found.append(1000 * (time.perf_counter() - began))
            assert answer.status_code in (200, 304), answer.text
            tag = answer.headers["ETag"]
            await asyncio.sleep(max(0.0, PERIOD - (time.perf_counter() - began)))
    return found[1:]


async def pollers(url: str, key: str, dataset_id: str, views: int, conditional: bool, seconds: float) -> list[float]:
    until = time.monotonic() + seconds
    asked = [{"dataset_id": dataset_id, **VIEWS[number % views]} for number in range(POLLERS)]
    gc.freeze()  # a collection here would be taken for the API's
    found = await asyncio.gather(*(poll(url, key, params, conditional, until) for params in asked))
    return [each for times in found for each in times]


def write(settings: CoreSettings, dataset_id: str, seed: int) -> None:
    """One evaluation a second, each a new seed of another setting, until it is ended."""
    core = Core.from_settings(settings, pool_size=1)
    for number in range(SETTINGS):
        with connection_of(core) as connection:
            one_evaluation(connection, dataset_id, number, seed)
        with core.transaction() as session:
            bump(session, dataset_id)
        time.sleep(1.0)


@contextmanager
def api(settings: CoreSettings, log: Path) -> Iterator[tuple[str, int]]:
    """The evaluator's API as it is run, on a port of its own: its URL and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "DATABASE_URL": settings.database_url.get_secret_value(),
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "STORAGE_URL": settings.storage_url,
    }
    command = [sys.executable, "-m", "shared.web.serve", "services.evaluator.app:create_app", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/healthz", trust_env=False)
                break
            except httpx.TransportError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def quantiles(times: list[float]) -> tuple[float, ...]:
    """p50, p95, p99"""
    return tuple(round(float(each), 2) for each in np.quantile(times, (0.5, 0.95, 0.99)))


def timed(core: Core, step: Callable[[Session], Any], repeats: int = 200) -> list[float]:
    """Milliseconds of a transaction's body."""
    found = []
    for _ in range(repeats):
        with core.transaction() as session:
            began = time.perf_counter()
            step(session)
            found.append(1000 * (time.perf_counter() - began))
    return found


def alone(core: Core, dataset_id: str) -> dict[str, list[float]]:
    """The query, and a page of it with nothing cached, without any other load."""
    asked = Asked(dataset_id)
    with core.transaction() as session:
        head = header(session, WHO, dataset_id)
    explained = leaderboard_query._QUERY
    times: list[float] = []

    def explain(session: Session) -> None:
        leaderboard_query._QUERY = "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) " + explained
        rows = board_rows_raw(session)
        times.append(rows[0]["Planning Time"] + rows[0]["Execution Time"])

    def board_rows_raw(session: Session) -> Any:
        return board_rows(session, WHO, asked, head.fingerprint, True)[0]["QUERY PLAN"]

    try:
        timed(core, explain)
    finally:
        leaderboard_query._QUERY = explained
    return {
        "query, in PostgreSQL": times,
        "query, as the API waits": timed(core, lambda s: board_rows(s, WHO, asked, head.fingerprint, True)),
        "page, nothing cached": timed(core, lambda s: Board().read(s, WHO, asked, head).model_dump_json()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each case (default: 30)")
    seconds = parser.parse_args().seconds
    logging.getLogger("httpx").setLevel(logging.WARNING)
    rows: list[tuple[Any, ...]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres, valkey = start_postgres(folder), start_valkey(folder)
        stack.callback(postgres.stop)
        stack.callback(valkey.stop)
        settings = CoreSettings(database_url=postgres.url, redis_url=valkey.url, storage_url=f"file://{folder}/store")
        core = Core.from_settings(settings)
        stack.callback(core.close)
        migrate(core.db)
        with connection_of(core) as connection:
            dataset_id = add_dataset(connection, "large")
            add_evaluations(connection, dataset_id, SETTINGS)
            for number in range(OTHERS):
                add_evaluations(connection, add_dataset(connection, f"other {number}"), SETTINGS // OTHERS, number + 1)
        with core.db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as plain:
            plain.execute(text("VACUUM ANALYZE"))  # what autovacuum does within a minute
        with core.transaction() as session:
            _, key = create_key(session, owner=OWNER, name="bench", scopes=("read",))
        for name, times in alone(core, dataset_id).items():
            rows.append((name, "-", "-", len(times), None, None, *quantiles(times)))
        url, pid = stack.enter_context(api(settings, folder / "api.log"))
        seed = SEEDS
        for views, conditional, busy in [(1, c, b) for b in (False, True) for c in (True, False)] + [(4, True, True)]:
            seed += 1
            with beside(write, settings, dataset_id, seed) if busy else ExitStack():
                used = cpu_seconds(pid)
                times = asyncio.run(pollers(url, key, dataset_id, views, conditional, seconds))
            name = f"{POLLERS} pollers" + (f", {views} views" if views > 1 else "")
            each = round(1000 * (cpu_seconds(pid) - used) / (len(times) + POLLERS), 2)
            case = ("If-None-Match" if conditional else "whole", "1/s" if busy else "none")
            rows.append((name, *case, len(times), round(len(times) / (seconds - PERIOD)), each, *quantiles(times)))
    names = ["case", "asks", "writes", "requests", "per_second", "api_cpu_ms", "p50_ms", "p95_ms", "p99_ms"]
    print(table(names, rows))
    print(json.dumps({"leaderboard_load": [dict(zip(names, row, strict=True)) for row in rows], "target": TARGET_MS}))


if __name__ == "__main__":
    main()
