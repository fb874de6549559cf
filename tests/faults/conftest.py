"""One bench for all the tests of the faults themselves."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.bench import Bench


@pytest.fixture(scope="session")
def started_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.close()


@pytest.fixture
def world(started_bench: Bench) -> Bench:
    """With no job, nothing queued, and no edge armed."""
    started_bench.named = {"api": started_bench.api.pid, "worker-ingest": started_bench.worker.pid}
    started_bench.reset()
    return started_bench
