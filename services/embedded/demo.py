"""`captune demo`: the main job on the sample pictures, through the same HTTP API that users call. A second run finds
what the first one made and does nothing twice."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from captune import tables
from captune.client import Client
from captune.errors import CaptuneAPIError, ConnectionNotFound
from captune.printing import note, say
from captune.progress import ProgressBar
from services.embedded.stack import Stack, docs_url
from shared.errors import Unavailable
from shared.schemas.captions import CaptionJob, CaptionJobRequest
from shared.schemas.common import JobResource
from shared.schemas.datasets import Dataset
from shared.schemas.fine_tuning import FineTuningJob, FineTuningRequest

J = TypeVar("J", bound=JobResource)

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "clipart"
NAME, DOMAIN = "clipart", "clip art"
SHOTS, SEEDS = 8, (0, 1)
# Sized to five minutes on two cores; the paper trains for 50 epochs at 1e-5.
TRAINING = {"epochs": 5, "batch_size": 32, "learning_rate": 5e-5}
PRESET = "paper"
METHODS: dict[str, dict[str, Any]] = {"mmft": TRAINING, "flyp": TRAINING}


def run(state_dir: Path, port: int) -> int:
    began = time.monotonic()
    with _server(state_dir, port) as (client, folder):
        dataset = _dataset(client)
        captions = _captions(client, dataset)
        jobs = _training(client, dataset, captions)
        evaluated = _scores(client, dataset)
        say(f"\n{tables.leaderboard(client.leaderboard(dataset.id))}\n")
        say(f'captions:     {client.url}/v1/datasets/{dataset.id}/captions   (e.g. "{_example(client, dataset)}")')
        store = os.environ.get("STORAGE_URL", folder / "store")
        say(f"checkpoints:  {store}/classifiers   ({len(jobs)} fine-tuned, {evaluated} scored)")
        if docs := docs_url(client.url):
            say(f"API docs:     {docs}   (while the server runs: captune up --state-dir {folder})")
    say(f"done in {time.monotonic() - began:.0f} s")
    return 0


@contextmanager
def _server(state_dir: Path, port: int) -> Iterator[tuple[Client, Path]]:
    """The server that already runs on this state directory, else one of our own for the demo's time."""
    try:
        client = Client(state_dir=state_dir)
        client.methods()
    except (ConnectionNotFound, httpx.TransportError, CaptuneAPIError):
        with Stack(state_dir, port=port, say=lambda text: _say(f"{text} …")) as stack:
            with Client(stack.url, stack.api_key) as client:
                yield client, stack.state_dir
            _say("stopping what was started …")
        return
    _say(f"using the server that runs at {client.url}")
    with client:
        yield client, state_dir


def _say(text: str) -> None:
    note(f"  {text}")


def _finished(client: Client, job: J, label: str) -> J:
    if job.status == "succeeded":
        return job
    with ProgressBar(f"  {label}") as bar:
        job = client.wait(job, bar)
        if job.status != "succeeded":
            reason = job.error.message if job.error else job.status
            raise Unavailable(f"{label} did not succeed: {reason}")
        bar.line(f"  {label}: done in {bar.seconds:.0f} s")
    return job


def _dataset(client: Client) -> Dataset:
    if found := client.find_dataset(SAMPLE, name=NAME):
        _say(f"data set: {found.id} is there already, not uploaded again")
        return found
    return _finished(client, client.push(SAMPLE, name=NAME, domain=DOMAIN), "data set")


def _captions(client: Client, dataset: Dataset) -> CaptionJob:
    request = CaptionJobRequest(dataset_id=dataset.id, domain=DOMAIN)
    for job in client.jobs("cap", dataset_id=dataset.id, status="succeeded"):
        if isinstance(job, CaptionJob) and job.request == request:
            _say(f"captions: {job.id} is there already, nothing captioned again")
            return job
    job = _finished(client, client.caption(**request.model_dump()), "captions")
    assert job.result is not None
    _say(f"captions: {job.result['written']} written, {job.result['reused']} reused")
    return job


def _training(client: Client, dataset: Dataset, captions: CaptionJob) -> list[FineTuningJob]:
    known = {method.name: method for method in client.methods()}
    have = [job for job in client.jobs("ft", dataset_id=dataset.id) if isinstance(job, FineTuningJob)]
    submitted = []
    for method, hyperparameters in METHODS.items():
        for seed in SEEDS:
            request = FineTuningRequest.model_validate(
                {
                    "dataset_id": dataset.id,
                    "caption_job_id": captions.id if known[method].needs_captions else None,
                    "method": {"type": method, "preset": PRESET, "hyperparameters": hyperparameters},
                    "shots": SHOTS,
                    "seed": seed,
                }
            )
            job = next((job for job in have if _same(job, request)), None)
            if job is None:
                job = client.train(**request.model_dump())
            else:
                _say(f"{method} seed {seed}: {job.id} is there already, not trained again")
            submitted.append((job, f"{method} seed {seed}"))
    return [_finished(client, job, label) for job, label in submitted]


def _same(job: FineTuningJob, request: FineTuningRequest) -> bool:
    """The job was made by this request; what the request left open was filled in with defaults."""
    asked = request.method.hyperparameters.items()
    fields = ("model", "caption_job_id", "shots", "shot_seed", "seed", "validation")
    return (
        job.status not in ("failed", "cancelled")
        and (job.method.type, job.method.preset) == (request.method.type, request.method.preset)
        and asked <= job.method.hyperparameters.items()
        and all(getattr(job, name) == getattr(request, name) for name in fields)
    )


def _scores(client: Client, dataset: Dataset) -> int:
    """Wait until every run of the data set is trained and scored, the zero-shot ones included; how many are scored."""
    for job in list(client.jobs("ft", dataset_id=dataset.id)):
        client.wait(job)
    with ProgressBar("  scores") as bar:
        done = [client.wait(job, bar) for job in list(client.jobs("eval", dataset_id=dataset.id))]
    return sum(job.status == "succeeded" for job in done)


def _example(client: Client, dataset: Dataset) -> str:
    return next(iter(client.captions(dataset.id))).text
