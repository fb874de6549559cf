"""One running stack to be broken: the embedded one, with models so small that a job takes a second, and short times
between a fault and its repair. One world serves many schedules."""

import hashlib
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx
from pydantic import SecretStr
from redis import Redis
from sqlalchemy import Row, select

from services.embedded import keeper, supervisor
from services.embedded.stack import Stack
from shared.config import CoreSettings
from shared.core import Core
from shared.db.models import FINAL, Classifier, Job
from tests.e2e import pictures
from tests.faults.inject.edges import Edges
from tests.openai_server import Behaviour, OpenAIServer, after, echo
from tests.tiny_clip import write_tiny_clip

OUTSIDE = ("CAPTUNE_", "DATABASE_URL", "REDIS_URL", "STORAGE_URL")  # settings of whoever starts the harness
LEASE, MAX_FAILURES = 2.0, 5
LATENCY = 0.1  # seconds, of the model server: a caption job is at work for about one
SETTINGS = {
    "CAPTUNE_LEASE_SECONDS": str(LEASE),
    "CAPTUNE_RECONCILE_SECONDS": "0.2",
    "CAPTUNE_REQUEUE_AFTER_SECONDS": "0.7",
    "CAPTUNE_RETRY_SECONDS": "0.1",
    "CAPTUNE_MAX_FAILURES": str(MAX_FAILURES),
    "CAPTUNE_CHECKPOINT_SECONDS": "0",  # every step is saved
    "CAPTUNE_COLLECT_EVERY_SECONDS": "1",
    "CAPTUNE_CACHE_BYTES": str(64 * 2**20),
    "CAPTUNE_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
# Kinds with a second worker: it takes over what a frozen one holds, which wakes to find another at its job.
DOUBLED = ("caption", "fine_tune")
START_SECONDS = 120.0
# Runs whose weights are compared with those of an undisturbed one: 18 pictures, so 3 steps an epoch.
TUNED = {"batch_size": 8, "learning_rate": 1e-3}
RUNS: dict[str, dict[str, Any]] = {
    "mmft": {"method": {"type": "mmft", "hyperparameters": {**TUNED, "epochs": 10}}},
    "flyp": {"method": {"type": "flyp", "hyperparameters": {**TUNED, "epochs": 6}}, "checkpoints": "best_and_last"},
    "cross_entropy": {"method": {"type": "cross_entropy", "hyperparameters": {**TUNED, "epochs": 6}}},
    "linear_probe": {"method": {"type": "linear_probe"}},
    "zero_shot": {"method": {"type": "zero_shot"}},
}
CAPTIONED = {"mmft"}


class ModelServer:
    """Somebody else's model server at one address, whose behaviour can be switched, and which can be taken away."""

    def __init__(self) -> None:
        self.running = OpenAIServer(otherwise=after(LATENCY, echo))
        self.port = self.running.port
        self.running.__enter__()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def behave(self, behaviour: Behaviour | None = None) -> None:
        """From now on; None for answers as they should be."""
        self.running.otherwise = behaviour or after(LATENCY, echo)
        self.running.seen.clear()

    def stop(self) -> None:
        self.running.stop()

    def start(self) -> None:
        if self.running.stopping.is_set():
            self.running = OpenAIServer(port=self.port, otherwise=after(LATENCY, echo))
            self.running.__enter__()


class World:
    """Use as a context manager. folder: everything of it is below; kept, with its logs, for whoever wants to look.
    Raises what Stack does, and TimeoutError where what it needs to begin with is not made in time."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="captune-faults-"))
        self.schedules = 0
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        for name in [name for name in os.environ if name.startswith(OUTSIDE)]:
            del os.environ[name]
        # A process that dies again and again waits longer each time before it is started; here that is on purpose.
        supervisor.LONGEST_DELAY = keeper.LONGEST_DELAY = supervisor.FIRST_DELAY
        keeper.STABLE = 1.0
        try:
            self._start()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _start(self) -> None:
        self.models = ModelServer()
        self._undo.callback(self.models.stop)
        self.clip = str(write_tiny_clip(self.folder / "models" / "clip"))
        self.edges = Edges(self.folder / "edges")
        remote = {
            "type": "openai",
            "model": "tiny",
            "base_urls": [self.models.url],
            "concurrency": 8,
            "timeout_s": 2.0,
        }
        env = {
            **SETTINGS,
            **self.edges.environment(),
            "CAPTUNE_MODEL_ROOTS": str(self.folder / "models"),
            "CAPTUNE_MODEL_CACHE": str(self.folder / "cache"),
            "CAPTUNE_ENGINES": json.dumps({"attributes": {}, "remote": remote}),
        }
        self.state_dir = self.folder / "state"
        self.stack = Stack(self.state_dir, port=0, env=env)
        self._undo.callback(self.stack.stop)
        for kind in DOUBLED:
            command = [sys.executable, "-m", "shared.jobs.worker", kind]
            self.stack.supervisor.add(f"worker-{kind}-2", command, self.stack.env)
        self.store_dir = self.state_dir / "store"
        self.database_url, self.redis_url = self.stack.env["DATABASE_URL"], self.stack.env["REDIS_URL"]
        self.settings = CoreSettings(
            database_url=SecretStr(self.database_url),
            redis_url=SecretStr(self.redis_url),
            storage_url=self.stack.env["STORAGE_URL"],
        )
        self.core = Core.from_settings(self.settings, pool_size=3)
        self._undo.callback(self.core.close)
        self.redis: Redis = self.core.queue.redis
        self.http = self.client()
        self._undo.callback(self.http.close)
        self._prepare()

    def client(self, timeout: float = 6.0) -> httpx.Client:
        """With the admin key. For one thread."""
        return httpx.Client(
            base_url=self.stack.url,
            headers={"Authorization": f"Bearer {self.stack.api_key}"},
            timeout=httpx.Timeout(timeout, connect=2.0),
            trust_env=False,
        )

    def pids(self, name: str) -> list[int]:
        """The living processes of a name."""
        found = self.stack.pids().get(name)
        return [] if found is None else [found]

    def pid(self, name: str) -> int | None:
        return next(iter(self.pids(name)), None)

    def await_ready(self, seconds: float = 60.0) -> bool:
        """Whether every service answers in time, and every process runs."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if self.http.get("/readyz").is_success and self.stack.supervisor.pids().keys() >= self.names:
                    return True
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        return False

    # -- what every schedule finds there -------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """A data set, its captions, and the weights of every run in `RUNS` left alone."""
        files = pictures.by_split(6, 1, 2)
        archive = pictures.write_zip(self.folder / "base.zip", files)
        fields = {"name": "base", "domain": "simple shapes"}
        answer = self.http.post("/v1/datasets", data=fields, files={"file": ("base.zip", archive.read_bytes())})
        self.base = self._succeeded("/v1/datasets", answer)["id"]
        body = {"dataset_id": self.base, "words": 12}
        self.captions = self._succeeded("/v1/caption_jobs", self.http.post("/v1/caption_jobs", json=body))["id"]
        path = "/v1/fine_tuning/jobs"
        jobs = {name: self.http.post(path, json=self.run_body(name)) for name in RUNS}
        self.undisturbed: dict[str, dict[str, str]] = {}
        self.classifiers: list[str] = []
        for name, answer in jobs.items():
            job = self._succeeded(path, answer)
            self.classifiers.append(job["fine_tuned_model"])
            self.undisturbed[name] = self.digests(job["fine_tuned_model"])
            self._succeeded("/v1/evaluations", self.http.get(f"/v1/evaluations/{job['evaluation_id']}"))
        while self.live_jobs():  # the baselines that were made beside them
            time.sleep(0.1)
        self.names = set(self.stack.supervisor.pids())

    def live_jobs(self) -> list[Row[str, str, str]]:
        """(id, kind, status) of those that are not final."""
        with self.core.db.transaction() as session:
            return list(session.execute(select(Job.id, Job.kind, Job.status).where(Job.status.not_in(FINAL))).all())

    def run_body(self, name: str) -> dict[str, Any]:
        """The request of a run; the same, but for what a caller adds that names no setting."""
        captions = {"caption_job_id": self.captions} if name in CAPTIONED else {}
        return {"model": self.clip, "dataset_id": self.base, "seed": 5, **captions, **RUNS[name]}

    def _succeeded(self, path: str, answer: httpx.Response) -> dict[str, Any]:
        if not answer.is_success:
            raise RuntimeError(f"{path} answered {answer.status_code} without any fault: {answer.text}")
        job: dict[str, Any] = answer.json()
        deadline = time.monotonic() + START_SECONDS
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{job['id']} is {job['status']} after {START_SECONDS:.0f} s; logs: {self.state_dir}/logs"
                )
            time.sleep(0.05)
            job = self.http.get(f"{path}/{job['id']}").raise_for_status().json()
        if job["status"] != "succeeded":
            raise RuntimeError(f"{job['id']} {job['status']} without any fault: {job['error']}")
        return job

    def digests(self, classifier_id: str) -> dict[str, str]:
        """SHA-256 of each file of tensors of a classifier."""
        with self.core.db.transaction() as session:
            folder = self.store_dir / session.get_one(Classifier, classifier_id).storage_key
        files = sorted(folder.glob("*.safetensors"))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
