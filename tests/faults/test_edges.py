"""The edges are where their names say, fire once, and say so."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shared.db.models import Job
from tests.faults.bench import ROOT, Bench, during, soon
from tests.faults.inject import FAULTS, storage
from tests.faults.inject.edges import Edges
from tests.faults.inside import fault_points
from tests.faults.inside.fault_points import EDGES, Edge, patch

RUN = {"shared.jobs.worker", "shared.jobs.reconciler", "shared.store.collector", "shared.web.serve"}  # by `python -m`
RNG = random.Random(0)
PUT = "core.store.put_bytes('a', b'b')"


@pytest.mark.parametrize("edge", [edge for edge in EDGES.values() if edge.target != "signal"], ids=lambda e: e.name)
def test_the_edge_still_exists(edge: Edge) -> None:
    """Where a function was renamed or moved, the edge must move with it."""
    found: Any = importlib.import_module(edge.module)
    for name in edge.target.partition(":")[2].split("."):
        found = fault_points.find(found, name)
    assert callable(found)
    assert edge.module not in RUN, "nobody imports it, so nobody would pass the edge"


def test_a_lost_edge_is_told_by_the_process() -> None:
    module = ModuleType("gone")
    with pytest.raises(AttributeError, match="no_longer"):
        patch(module, [Edge("x", "before", "gone:no_longer", ())])


def test_only_the_process_that_was_named_fires_once(world: Bench) -> None:
    armed = world.edges.arm("store_rename", "worker-ingest", "raise:EROFS", after=1)
    assert world.api.do(PUT) == "None"
    assert world.api.do(PUT) == "None"
    assert world.worker.do(PUT) == "None", "it goes by once before"
    assert armed in world.edges.unfired()
    assert world.worker.do(PUT).startswith("Unavailable")
    assert world.worker.do(PUT) == "None"
    assert armed not in world.edges.unfired()
    fired = [each for each in world.edges.fired() if each.id == armed.id]
    assert [(each.edge, each.process) for each in fired] == [("store_rename", "worker-ingest")]
    assert fired[0].pid == world.worker.pid
    assert abs(fired[0].at - time.time()) < 10


def test_a_lasting_one_fires_for_everybody_until_it_is_disarmed(world: Bench) -> None:
    before = len(world.edges.fired())
    with during(FAULTS["storage_full"], world, RNG):
        for process in (world.api, world.worker) * 2:
            assert process.do(PUT).startswith("StorageFull")
    assert world.worker.do(PUT) == "None"
    log = world.edges.fired()[before:]
    assert [each.process for each in log] == ["api", "worker-ingest"], "told once by each"
    with during(FAULTS["storage_read_only"], world, RNG):
        assert world.api.do(PUT).startswith("Unavailable")
    with during(FAULTS["storage_unreadable"], world, RNG):
        assert world.api.do("core.store.read_bytes('a')") == "OSError 5"
    with during(FAULTS["storage_slow"], world, RNG):
        began = time.monotonic()
        assert world.api.do(PUT) == "None"
        assert time.monotonic() - began > 0.7
    assert list(world.store_dir.rglob("*.part")) == [], "what failed left nothing"


def test_it_dies_between_the_file_and_its_name(world: Bench) -> None:
    folder = world.store_dir / "torn"
    world.edges.arm("store_rename")
    assert world.worker.end_of("core.store.put_bytes('torn/whole', b'12345678')") == signal.SIGKILL
    (left,) = folder.iterdir()
    assert (left.suffix, left.read_bytes()) == (".part", b"12345678")
    world.edges.arm("store_sync", action="torn")
    assert world.worker.end_of("core.store.put_bytes('torn/half', b'12345678')") == signal.SIGKILL
    assert sorted(file.read_bytes() for file in folder.iterdir()) == [b"1234", b"12345678"]
    world.edges.arm("store_renamed")
    assert world.worker.end_of("core.store.put_bytes('torn/named', b'12345678')") == signal.SIGKILL
    assert (folder / "named").read_bytes() == b"12345678"


def test_a_folder_is_torn_too(world: Bench, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12345678")
    put = f"core.store.put_folder('classifiers/{{}}/1', __import__('pathlib').Path('{tmp_path}'))"
    world.edges.arm("store_sync", action="torn")
    assert world.worker.end_of(put.format("torn")) == signal.SIGKILL
    with during(FAULTS["storage_read_only"], world, RNG):
        assert world.worker.do(put.format("refused")).startswith("Unavailable")
    world.edges.arm("checkpoint_stored")
    assert world.worker.end_of(put.format("whole")) == signal.SIGKILL
    left = {file.relative_to(world.store_dir): file.read_bytes() for file in world.store_dir.rglob("weights")}
    assert sorted(left.values()) == [b"1234", b"12345678"]
    assert left[Path("classifiers/whole/1/weights")] == b"12345678"
    assert not (world.store_dir / "classifiers" / "torn" / "1").exists()


def test_it_dies_between_the_commit_and_the_wake_up(world: Bench) -> None:
    create = "exec('with core.transaction() as session: "
    create += 'ledger.create(session, id=\\"{}\\", kind=\\"ingest\\", owner=\\"anna\\", request={{}})\')'
    edges = (("commit_enqueue", "ds_a", 0), ("enqueue_answer", "ds_b", 1), ("committed", "ds_c", 0))
    for edge, job_id, queued in edges:
        world.core.queue.redis.flushall()
        world.edges.arm(edge)
        assert world.worker.end_of(create.format(job_id)) == signal.SIGKILL
        with world.core.db.transaction() as session:
            assert session.get_one(Job, job_id).status == "queued"
        assert world.core.queue.depth("ingest") == queued


def test_a_process_freezes_at_an_edge_and_wakes_by_itself(world: Bench) -> None:
    world.edges.arm("store_sync", action="freeze:0.5")
    began = time.monotonic()
    assert world.worker.do(PUT) == "None"
    assert time.monotonic() - began > 0.4
    world.edges.arm("store_sync", action="term")
    assert world.worker.end_of(PUT) == signal.SIGTERM


def test_disarming(world: Bench) -> None:
    first = world.edges.arm("store_sync", action="raise:EIO")
    second = world.edges.arm("store_sync", action="raise:ENOSPC")
    world.edges.disarm(first)  # another has taken its place
    assert world.worker.do(PUT).startswith("StorageFull")
    third = world.edges.arm("store_sync", action="raise:EIO")
    world.edges.disarm_all()
    world.edges.disarm(second)
    world.edges.disarm(third)
    assert world.worker.do(PUT) == "None"
    with pytest.raises(ValueError, match="no edge 'nowhere'"):
        world.edges.arm("nowhere")


def test_the_collector_runs_hangs_and_dies(world: Bench) -> None:
    for number in range(12):  # each run comes to its third at most
        world.core.store.put_bytes(f"uploads/ds_{number}", b"nobody names me")
        os.utime(world.store_dir / "uploads" / f"ds_{number}", (1, 1))
    world.core.store.put_bytes("uploads/ds_young", b"")
    os.utime(world.store_dir / "uploads" / "ds_young", (1 << 33, 1 << 33))
    for number, fault in enumerate(("collector_hangs", "collector_dies"), 1):
        with during(FAULTS[fault], world, RNG):
            soon(lambda n=number: sum(each.process == storage.BESIDE for each in world.edges.fired()) == n)
            time.sleep(0.1)
            left = list((world.store_dir / "uploads").iterdir())
        assert len(left) > 3, "it had not removed them all when it happened"
    with during(FAULTS["collector_runs"], world, RNG):
        soon(lambda: [file.name for file in (world.store_dir / "uploads").iterdir()] == ["ds_young"])


def test_the_machines_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    """Behind the launcher's isolated interpreter too, and in what a process starts itself."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.own_ran = True\n")
    edges = Edges(tmp_path / "edges")
    env = {**os.environ, **edges.environment()}
    env["PYTHONPATH"] += os.pathsep + str(tmp_path)
    code = "import json, signal, sys; print(json.dumps([sys.own_ran, bool(signal.getsignal(signal.SIGUSR2))]))"
    shim = [sys.executable, "-I", "-S", str(ROOT / "services/embedded/launch.py"), str(os.getpid()), "9", "-"]
    done = subprocess.run([*shim, sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, True]


def test_unarmed_edges_cost_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault_points.DIRECTORY, str(tmp_path))
    best = min(_seconds() for _ in range(5))
    assert best < 200e-6, f"{best * 1e6:.0f} µs"  # about 8; 200 leaves room for a busy machine


def _seconds() -> float:
    began = time.perf_counter()
    for _ in range(200):
        fault_points.passing("step")
    return (time.perf_counter() - began) / 200
