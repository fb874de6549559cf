"""The named edges: where in the product's code a fault can be made to happen, and what happens there.

Loaded by sitecustomize.py into every process of a stack under test (standard library only), and by the tests to check
that each edge still exists. The product knows nothing of it."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

DIRECTORY = "CAPTUNE_FAULTS_DIR"  # the variable that names the folder of the armed edges
PROCESS = "CAPTUNE_WORKER"  # the supervisor's name of this process, inherited by what it starts


@dataclass(frozen=True)
class Edge:
    """`when` the function at `target` ("module:name.name") is called or has returned. The module must be one that is
    imported: what `python -m` runs is not. `processes`: who passes it."""

    name: str
    when: Literal["before", "after"]
    target: str
    processes: tuple[str, ...]

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]


_WORKERS = ("worker-ingest", "worker-caption", "worker-fine_tune", "worker-evaluate")
_QUEUEING = ("api", "worker-fine_tune", "reconciler")
_STORING = ("api", "worker-ingest", "worker-fine_tune", "worker-evaluate")

EDGES = {
    edge.name: edge
    for edge in (
        # A job: committed, queued, taken, claimed, done.
        Edge("committed", "after", "sqlalchemy.engine.default:DefaultDialect.do_commit", ("api", *_WORKERS)),
        Edge("commit_enqueue", "before", "shared.queue:JobQueue.enqueue", _QUEUEING),
        Edge("enqueue_answer", "after", "shared.queue:JobQueue.enqueue", _QUEUEING),
        Edge("dequeue_claim", "before", "shared.jobs.ledger:claim", _WORKERS),
        Edge("claim_first_step", "before", "shared.jobs.claim:Claim.__enter__", _WORKERS),
        Edge("step", "before", "shared.jobs.claim:Claim.check", _WORKERS),
        Edge("renew", "before", "shared.jobs.ledger:renew", _WORKERS),
        Edge("result_final", "after", "shared.jobs.ledger:finish", _WORKERS),
        Edge("final_committed", "before", "shared.jobs.claim:Claim.__exit__", _WORKERS),
        Edge("done_acknowledged", "before", "rq.worker.base:BaseWorker.handle_execution_ended", _WORKERS),
        Edge("lapse_commit", "after", "shared.jobs.ledger:lapse", ("reconciler",)),
        # The store: temporary file written, synced, renamed; what a commit made obsolete.
        Edge(
            "store_read",
            "before",
            "shared.store.disk:DiskStore.read_bytes",
            ("api", "worker-caption", "worker-evaluate"),
        ),
        Edge("store_open", "before", "shared.store.disk:open", ("api", "worker-ingest", "worker-evaluate")),
        Edge("store_sync", "before", "shared.store.disk:os.fsync", ("api", "worker-fine_tune", "worker-evaluate")),
        Edge("store_sync_all", "before", "shared.store.disk:sync_all", ("worker-ingest",)),
        Edge("store_rename", "before", "shared.store.disk:os.replace", _STORING),
        Edge("store_renamed", "after", "shared.store.disk:os.replace", _STORING),
        Edge(
            "store_delete",
            "before",
            "shared.store.disk:DiskStore.delete",
            ("api", "worker-fine_tune", "worker-evaluate"),
        ),
        Edge("checkpoint_stored", "after", "shared.store.disk:DiskStore.put_folder", ("worker-fine_tune",)),
        # What the four kinds of job write.
        Edge("blob_row", "after", "shared.store.disk:DiskStore.put_blobs", ("worker-ingest",)),
        Edge("captions_written", "after", "services.captioner.captioning.writing:write", ("worker-caption",)),
        Edge("scored_written", "before", "services.evaluator.scoring.recording:Scored.write", ("worker-evaluate",)),
        # Anywhere: when the process is sent SIGUSR2.
        Edge("poke", "before", "signal", ("api", *_WORKERS, "reconciler", "collector")),
    )
}

_passes: dict[str, int] = {}  # by the arming's id: how often this process went by


def passing(name: str, arguments: tuple[Any, ...] = ()) -> None:
    """This process is at the edge. Costs two failing `open` calls (5 µs) where it is not armed."""
    directory = os.environ.get(DIRECTORY)
    if not directory:
        return
    for suffix in (f"@{os.environ.get(PROCESS, '')}", ""):
        path = f"{directory}/{name}{suffix}.armed"
        try:
            with open(path, encoding="utf-8") as file:
                armed = json.load(file)
        except (FileNotFoundError, ValueError):
            continue
        went_by = _passes.get(armed["id"], 0)
        _passes[armed["id"]] = went_by + 1
        if went_by < armed["after"]:
            continue
        if not armed["lasting"]:
            try:
                os.rename(path, f"{directory}/{armed['id']}.fired")  # whoever renames it fires it: once
            except FileNotFoundError:
                continue
        if not armed["lasting"] or went_by == armed["after"]:
            _log(directory, name, armed)
        act(armed["action"], arguments)
        return


def _log(directory: str, name: str, armed: dict[str, Any]) -> None:
    words = {"id": armed["id"], "edge": name, "process": os.environ.get(PROCESS, ""), "pid": os.getpid()}
    line = json.dumps(words | {"action": armed["action"], "at": time.time()}) + "\n"
    descriptor = os.open(f"{directory}/fired.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def act(action: str, arguments: tuple[Any, ...] = ()) -> None:
    """kill | term | raise:ENOSPC | sleep:SECONDS (this thread) | freeze:SECONDS (the process) | torn | clock:SECONDS"""
    kind, _, value = action.partition(":")
    match kind:
        case "kill":
            _die()
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "raise":
            number = getattr(errno, value)
            raise OSError(number, os.strerror(number))
        case "sleep":
            time.sleep(float(value))
        case "freeze":
            # Someone else must wake it; a child of a session of its own outlives nothing but this wait.
            wake = f"sleep {float(value)}; kill -CONT {os.getpid()}"
            subprocess.run(["sh", "-c", f"({wake}) &"], start_new_session=True)  # not ours, so no zombie of ours
            os.kill(os.getpid(), signal.SIGSTOP)
        case "torn":
            (descriptor,) = arguments  # of os.fsync: half of the file never reached the disk
            os.truncate(f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_size // 2)  # also where open to read
            _die()
        case "clock":
            _shift_clock(float(value))
        case _:
            raise ValueError(f"unknown action {action!r}")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # never returns


_traveller: Any = None


def _shift_clock(seconds: float) -> None:
    """The wall clock of this process, `seconds` off the true one from now on. Monotonic clocks go on: no kernel turns
    them back."""
    import time_machine

    global _traveller
    if _traveller is not None:
        _traveller.stop()
        _traveller = None
    if seconds:
        _traveller = time_machine.travel(time.time() + seconds, tick=True)
        _traveller.start()


class _Names:
    """A module as another one sees it, with some functions replaced."""

    def __init__(self, module: ModuleType) -> None:
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def find(owner: Any, name: str) -> Any:
    """As code of the module sees it: a builtin is everybody's."""
    return getattr(owner, name) if name != "open" else getattr(owner, name, open)


def patch(module: ModuleType, edges: list[Edge]) -> None:
    """Wraps the functions of `module` that have edges. Raises AttributeError where one is gone."""
    for edge in edges:
        *path, name = edge.target.partition(":")[2].split(".")
        owner: Any = module
        for part in path:
            found = getattr(owner, part)
            if isinstance(found, ModuleType):  # what it imported: seen by this module alone
                found = _Names(found)
                setattr(owner, part, found)
            owner = found
        setattr(owner, name, _wrapped(find(owner, name), edge))


def _wrapped(function: Callable[..., Any], edge: Edge) -> Callable[..., Any]:
    @functools.wraps(function)
    def before(*args: Any, **kwargs: Any) -> Any:
        passing(edge.name, args)
        return function(*args, **kwargs)

    @functools.wraps(function)
    def after(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        passing(edge.name, args)
        return result

    return before if edge.when == "before" else after


class Finder:
    """Patches a module when it has been imported, so that importing it is all that anybody has to do."""

    def __init__(self) -> None:
        self.edges: dict[str, list[Edge]] = {}
        for edge in EDGES.values():
            if edge.target != "signal":
                self.edges.setdefault(edge.module, []).append(edge)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        edges = self.edges.get(name)
        if edges is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                patch(module, edges)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    sys.meta_path.insert(0, Finder())
    signal.signal(signal.SIGUSR2, lambda *_: passing("poke"))
