"""A few schedules of the harness, chosen to meet different groups of faults; `make faults` runs a thousand."""

from collections.abc import Iterator

import pytest

from tests.faults.inject import FAULTS
from tests.faults.processes import Growth, Sample
from tests.faults.run import Runner
from tests.faults.schedule import schedule
from tests.faults.world import World

SLICE = {
    1: ["kill_worker_caption", "redis_flushall", "model_server_500"],
    2: ["postgres_restarted", "edge:captions_written:kill", "freeze_worker_fine_tune", "storage_full_once"],
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with World(tmp_path_factory.mktemp("faults")) as world:
        yield Runner(world)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", SLICE)
def test_nothing_acknowledged_is_lost(runner: Runner, seed: int) -> None:
    outcome = runner.run(schedule(seed, SLICE[seed]))
    assert outcome.findings == []
    assert outcome.jobs >= 5
    assert outcome.faults == [fault.name for fault in schedule(seed, SLICE[seed]).faults]


def test_a_seed_means_the_same_schedule_and_seeds_in_a_row_meet_every_fault() -> None:
    assert schedule(7) == schedule(7)
    assert {fault.name for seed in range(len(FAULTS)) for fault in schedule(seed).faults} == set(FAULTS)


def test_a_process_that_grows_is_found() -> None:
    growth, steady = Growth(), Sample(rss=300 * 2**20, descriptors=40)
    assert [growth.add("api", 1, steady) for _ in range(10)] == [None] * 10
    assert "MiB" in str(growth.add("api", 1, Sample(rss=500 * 2**20, descriptors=40)))
    assert "descriptors" in str(growth.add("api", 1, Sample(rss=300 * 2**20, descriptors=60)))
    assert growth.add("api", 2, Sample(rss=900 * 2**20, descriptors=90)) is None, "another process, seen once"
