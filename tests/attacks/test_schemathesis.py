"""A short run of schemathesis, the same each time, over every operation; a long one: `make schemathesis`."""

import httpx
import pytest

from shared.core import Core
from tests.attacks.schemathesis_api import KEY, UNLIMITED, furnish, run, served


@pytest.mark.timeout(180)
def test_every_operation_keeps_its_promises(core: Core) -> None:
    key_id = furnish(core)
    unlimited = Core(core.settings.model_copy(update=UNLIMITED), core.db, core.queue, core.store)
    with served(unlimited) as url:
        for key, examples in ((KEY, 3), (None, 1)):
            done = run(url, key_id, "--max-examples", str(examples), "--generation-deterministic", key=key)
            assert done.returncode == 0, "\n".join(line[:300] for line in done.stdout.splitlines()) + done.stderr
            assert f"{len(operations(url))} selected" in done.stdout, "every operation was tried"


def operations(url: str) -> list[tuple[str, str]]:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    return [(method, path) for path, operations in paths.items() for method in operations]
