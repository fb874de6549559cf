"""Schemathesis over the whole OpenAPI document of the one-process application, on real PostgreSQL and Valkey:

    python -m tests.attacks.schemathesis_api --examples 200 --minutes 10 --seed 7

Four phases (examples, coverage, fuzzing, stateful), positive and negative data, with an admin's key and then without
any. The checks are its own and those of schemathesis_checks.py. Exit status 1: something was found, and is printed with
the request that repeats it."""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import SecretStr
from sqlalchemy import select

from services.captioner.app import lifespan
from services.embedded.api import ROUTERS
from services.embedded.servers import start_postgres, start_valkey
from shared.config import CoreSettings
from shared.core import Core
from shared.db.migrate import migrate
from shared.db.models import ApiKey
from shared.web.api import create_api
from shared.web.auth import ensure_key, hash_key
from tests.attacks.belongings import belongings

HERE = Path(__file__).resolve().parent
KEY = "ck_schemathesis"
EVERY_CHECK = "all"
UNLIMITED: dict[str, Any] = {"rate_limit": "off", "failed_auth_limit": "off"}  # it asks as fast as it can
# Its own rules for statuses are no promise of ours: a wrong value may be 404 or 409, and a right one, too, as things
# that it names need not exist. What was refused and what taken is for the tests of the routes.
# Whether what was made can be found is a check of ours: theirs also follows a caption job's id from a fine-tuning job's
# answer to a route of fine-tuning jobs.
LEFT_OUT = "positive_data_acceptance,object_level_authorization,ensure_resource_availability"


@contextmanager
def served(core: Core) -> Iterator[str]:
    """The application behind a real socket, its caption engine ready, with something of every kind in it."""
    app = create_api("Captune", core, ROUTERS, [lifespan])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not (server.started and all(batcher.ready for batcher in app.state.batchers.values())):
        assert time.monotonic() < deadline, "the application did not start"
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def run(url: str, key_id: str, *arguments: str, key: str | None = KEY) -> subprocess.CompletedProcess[str]:
    """Schemathesis as a process of its own: it takes the interpreter for itself."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run"]
    command += [f"{url}/openapi.json", "--url", url, "--checks", EVERY_CHECK, "--exclude-checks", LEFT_OUT, *arguments]
    if key is not None:
        command += ["--header", f"Authorization: Bearer {key}"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "CAPTUNE_SCHEMATHESIS_KEY_ID": key_id}
    with tempfile.TemporaryDirectory() as folder:  # it leaves a cache where it runs
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def core_of(folder: Path, database_url: str, redis_url: str) -> Core:
    settings = CoreSettings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        storage_url=f"file://{folder / 'store'}",
        service_token=None,
        bootstrap_key=None,
        max_upload_bytes=2**20,
        max_json_bytes=2**20,
        **UNLIMITED,
    )
    core = Core.from_settings(settings, pool_size=20)
    migrate(core.db)
    return core


def furnish(core: Core) -> str:
    """The run's key, and something of every kind to find. Returns the key's id, so that the run spares it."""
    belongings(core, "schemathesis")
    with core.transaction() as session:
        ensure_key(session, KEY, owner="schemathesis", name="schemathesis")
        return session.scalars(select(ApiKey.id).where(ApiKey.key_hash == hash_key(KEY))).one()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="test cases per operation and phase")
    parser.add_argument("--minutes", type=float, default=10, help="fuzzing and stateful phases go on until then")
    parser.add_argument("--seed", type=int, default=None)
    asked = parser.parse_args(arguments)
    found = 0
    with tempfile.TemporaryDirectory(prefix="captune-schemathesis-") as name, ExitStack() as stop:
        state = Path(name)
        postgres = start_postgres(state)
        stop.callback(postgres.stop)
        valkey = start_valkey(state)
        stop.callback(valkey.stop)
        core = core_of(state, postgres.url, valkey.url)
        stop.callback(core.close)
        key_id = furnish(core)
        url = stop.enter_context(served(core))
        seed = [] if asked.seed is None else ["--seed", str(asked.seed)]
        seconds = max(1, int(60 * asked.minutes))
        for key, share in ((KEY, 0.9), (None, 0.1)):
            print(f"== {'with an admin key' if key else 'without a key'}", flush=True)
            time_left = str(max(1, int(share * seconds)))
            bounds = ["--max-examples", str(asked.examples), "--max-time", time_left, *seed]
            done = run(url, key_id, *bounds, key=key)
            print(done.stdout, done.stderr, sep="\n", flush=True)
            found += done.returncode
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
