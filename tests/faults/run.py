"""One schedule in one world: the load, the faults, the time to settle, the verdict."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from shared.classifier.folder import load_classifier
from shared.clip.loading import LoadedClip, load_clip
from shared.db.models import Job
from shared.errors import Conflict
from shared.store.collector import Retention, collect
from tests.faults import oracle
from tests.faults.inject import FAULTS, heal
from tests.faults.journal import Journal
from tests.faults.load import PATHS, Clock, Load, User
from tests.faults.processes import Growth, unwanted
from tests.faults.schedule import Planned, Schedule
from tests.faults.world import MAX_FAILURES, World

SETTLE_SECONDS = 120.0  # after the last fault; two are usual, and ten where a worker has to import torch again

COLLECTOR_SECONDS = 10.0


@dataclass
class Outcome:
    seed: int
    faults: list[str]
    fired: list[str]  # edges that a process came by
    jobs: int
    interrupted: int  # jobs that took more than one attempt
    given_up: int  # jobs that failed after MAX_FAILURES attempts in a row
    seconds: float
    settled: float  # seconds from the end of load and faults to the last final state
    findings: list[str] = field(default_factory=list)
    collected: bool = False  # the collector ran, and no orphan was left
    actions: dict[str, int] = field(default_factory=dict)  # what users did to jobs and data sets meanwhile
    growth: dict[str, list[float]] = field(default_factory=dict)  # of the world's processes so far: MiB, descriptors

    @property
    def passed(self) -> bool:
        return not self.findings

    def line(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": "passed" if self.passed else "failed", "at": round(time.time())}


class Runner:
    """Runs schedules in a world, one after another."""

    def __init__(self, world: World) -> None:
        self.world, self.growth = world, Growth()
        self._clip: LoadedClip | None = None

    def run(self, planned: Schedule) -> Outcome:
        world, began = self.world, time.monotonic()
        world.schedules += 1
        journal = Journal(world.folder / f"journal-{planned.seed}.jsonl")
        fired_before = len(world.edges.fired())
        with world.core.db.transaction() as session:
            before = set(session.scalars(select(Job.id)))
        load = Load(world, journal, planned.seed, planned.seconds, SETTLE_SECONDS)
        faults = [
            threading.Thread(target=self._inject, args=(fault, number, planned.seed, load.clock, journal), daemon=True)
            for number, fault in enumerate(planned.faults)
        ]
        for thread in faults:
            thread.start()
        for thread in faults:
            thread.join(SETTLE_SECONDS)
        findings = [f"harness: {thread.name} has not come to its end" for thread in faults if thread.is_alive()]
        time.sleep(max(0.0, load.clock.over - time.monotonic()))
        heal(world)
        ended = time.monotonic()
        if not world.await_ready(SETTLE_SECONDS):
            findings.append(
                f"not ready within {SETTLE_SECONDS:.0f} s of the last fault: {world.stack.supervisor.pids()}"
            )
        load.clock.give_up = time.monotonic() + SETTLE_SECONDS
        self._settle(journal, before, load)
        if not load.join():
            findings.append("harness: an actor has not come to its end")
        settled = time.monotonic() - ended
        evidence = oracle.Evidence(
            core=world.core,
            journal=journal,
            before=before,
            undisturbed=world.undisturbed,
            groups={FAULTS[fault.name].group for fault in planned.faults},
            max_failures=MAX_FAILURES,
            load=partial(load_classifier, load_base=self._load_base),
        )
        findings += oracle.verdict(evidence)
        collected = self._collect(evidence, findings)
        findings += [f"processes: {each}" for each in (*unwanted(world), *self.growth.check(world))]
        findings += [f"harness: {e['what']}: {e}" for e in journal.of("driver_error", "injector_error")]
        journal.add("verdict", findings=findings)
        journal.close()
        return Outcome(
            seed=planned.seed,
            faults=[fault.name for fault in planned.faults],
            fired=[each.edge for each in world.edges.fired()[fired_before:]],
            jobs=len(evidence.jobs),
            interrupted=sum(job.attempt > 1 for job in evidence.jobs.values()),
            given_up=sum(job.failures >= MAX_FAILURES for job in evidence.jobs.values()),
            seconds=round(time.monotonic() - began, 1),
            settled=round(settled, 1),
            findings=findings,
            collected=collected,
            actions=dict(Counter(str(e.get("action", e["what"])) for e in journal.of("action", "deleting", "stream"))),
            growth=self.growth.grown(),
        )

    def _inject(self, planned: Planned, number: int, seed: int, clock: Clock, journal: Journal) -> None:
        rng = random.Random(f"{seed}/{number}/{planned.name}")
        time.sleep(max(0.0, clock.began + planned.at - time.monotonic()))
        end: Callable[[], None] | None = None
        try:
            journal.add("fault", name=planned.name, lasts=planned.lasts)
            end = FAULTS[planned.name].begin(self.world, rng)
            time.sleep(planned.lasts)
        except Exception as error:
            journal.add("injector_error", name=planned.name, error=f"{type(error).__name__}: {error}")
        finally:
            if end is not None:
                end()
            journal.add("fault_ended", name=planned.name)

    def _settle(self, journal: Journal, before: set[str], load: Load) -> None:
        """Until all requests are answered and all jobs final, or too long; a paused one is resumed, as by its user."""
        user = User(self.world, journal, random.Random(0), Clock(SETTLE_SECONDS, 0.0))
        while user.clock.going():
            try:
                left = [row for row in self.world.live_jobs() if row.id not in before]
            except SQLAlchemyError:
                time.sleep(0.1)
                continue
            if not left and not load.going():
                break
            for job in left:
                if job.status == "paused":
                    user.persist("POST", f"{PATHS[job.kind]}/{job.id}/resume")
            time.sleep(0.05)
        # What was enqueued twice is on its list until a worker has looked at it.
        while user.clock.going() and any(self.world.core.queue.depth(kind) for kind in PATHS if kind != "group"):
            time.sleep(0.05)
        user.http.close()

    def _collect(self, evidence: oracle.Evidence, findings: list[str]) -> bool:
        """Whether the store holds nothing but what is referenced once the collector has run."""
        deadline = time.monotonic() + COLLECTOR_SECONDS
        while True:
            try:
                collect(self.world.core, Retention(unreferenced=0))
                break
            except Conflict as error:  # the stack's own is at work: it was started again
                if time.monotonic() > deadline:
                    findings.append(f"harness: {error}")
                    return False
                time.sleep(0.2)
        found = oracle.verdict(evidence, (oracle.store_has_what_is_referenced, oracle.store_has_no_orphans))
        findings += found
        return not found

    def _load_base(self, name: str) -> LoadedClip:
        if self._clip is None:
            self._clip = load_clip(name, self.world.folder / "cache", (self.world.folder / "models",))
        return self._clip


def keep_of(world: World) -> str:
    return f"journals {world.folder}, logs {Path(world.state_dir) / 'logs'}"
