"""What must survive a fault: every acknowledged job reaches exactly one final state, no caption is lost or doubled,
and an interrupted training ends with the weights of one that was left alone."""

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from captune import Client
from services.embedded.stack import Stack
from shared.schemas.captions import CaptionJob
from shared.schemas.datasets import Dataset
from shared.schemas.fine_tuning import FineTuningJob
from tests.e2e.waiting import finished, succeeded, until

pytestmark = pytest.mark.timeout(180)
Kill = Callable[[str, signal.Signals], None]


@pytest.fixture
def kill(stack: Stack) -> Kill:
    """Signals a process of the stack by its name."""

    def send(name: str, number: signal.Signals) -> None:
        os.kill(until(f"{name} runs", lambda: stack.supervisor.pids().get(name)), number)

    return send


def events(http: httpx.Client, job: CaptionJob | FineTuningJob) -> list[dict[str, Any]]:
    path = "caption_jobs" if isinstance(job, CaptionJob) else "fine_tuning/jobs"
    found: list[dict[str, Any]] = http.get(f"/v1/{path}/{job.id}/events", params={"limit": 1000}).json()["data"]
    assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
    return found


def types(http: httpx.Client, job: CaptionJob | FineTuningJob) -> list[str]:
    return [event["type"] for event in events(http, job)]


# -- captioning --------------------------------------------------------------------------------------------------------


def start_captioning(client: Client, many: Dataset, seed: int) -> CaptionJob:
    """A job of 1980 captions, some of them written. The seed keeps it from reusing another job's captions."""
    job = client.caption(dataset_id=many.id, words=12, seed=seed)
    captions = (client.captions(many.id, caption_job_id=job.id) for _ in iter(int, 1))
    until("the first captions are written", lambda: next(next(captions), None), 60)
    assert client.job(job.id).status == "running", "it ended before anything could be done to it"
    return job


def written(client: Client, job: CaptionJob) -> int:
    return sum(1 for _ in client.captions(job.request.dataset_id, caption_job_id=job.id))


def assert_complete(client: Client, job: CaptionJob) -> list[int]:
    """Every image has its three captions once. Returns the attempts that wrote them."""
    found = list(client.captions(job.dataset_id, caption_job_id=job.id))
    images = [image.id for image in client.images(job.dataset_id, split="train")]
    asked = sorted((image, c) for image in images for c in ("shape", "texture", "visual"))
    assert len(asked) == 1980
    assert sorted((caption.image_id, caption.characteristic) for caption in found) == asked
    assert {caption.provenance["job_id"] for caption in found} == {job.id}
    assert job.result is not None
    assert (job.result["captions"], job.result["written"], job.result["failed"]) == (1980, 1980, 0)
    return sorted({caption.provenance["attempt"] for caption in found})


def test_a_killed_caption_worker_loses_and_doubles_nothing(
    client: Client, http: httpx.Client, many: Dataset, kill: Kill
) -> None:
    job = start_captioning(client, many, seed=101)
    kill("worker-caption", signal.SIGKILL)
    job = succeeded(client, job)
    assert job.attempt == 2
    assert assert_complete(client, job) == [1, 2], "what the dead worker had committed was kept"
    assert types(http, job) == ["job.created", "job.started", "job.requeued", "job.started", "job.succeeded"]


def test_a_killed_api_process_comes_back_and_the_caption_job_goes_on(
    stack: Stack, client: Client, many: Dataset, kill: Kill
) -> None:
    job = start_captioning(client, many, seed=102)
    before = stack.supervisor.pids()["api"]
    kill("api", signal.SIGKILL)
    until("the API answers again", lambda: answers(client), 90)
    assert stack.supervisor.pids()["api"] != before
    job = succeeded(client, job)
    assert_complete(client, job)
    assert job.attempt == 1, "the worker waited for the captioner"


def answers(client: Client) -> bool:
    try:
        client.methods()
    except httpx.TransportError:
        return False
    return True


def test_a_paused_caption_job_keeps_what_it_has_and_goes_on(client: Client, http: httpx.Client, many: Dataset) -> None:
    job = start_captioning(client, many, seed=103)
    client.pause(job.id)
    until("the job pauses", lambda: client.job(job.id).status == "paused")
    have = written(client, job)
    assert 0 < have < 1980
    client.resume(job.id)
    job = succeeded(client, job)
    assert_complete(client, job)
    assert [t for t in types(http, job) if t.startswith("job.pause")] == ["job.pause_requested", "job.paused"]


def test_a_cancelled_caption_job_ends_at_its_next_step(client: Client, many: Dataset) -> None:
    job = start_captioning(client, many, seed=104)
    client.cancel(job.id)
    job = finished(client, job, 20)
    assert job.status == "cancelled"
    assert written(client, job) < 1980
    assert job.result is None


# -- training ----------------------------------------------------------------------------------------------------------

STEPS_PER_EPOCH = 3  # 24 pictures
LONG = {"epochs": 30, "batch_size": 8, "learning_rate": 1e-3}  # 90 steps, each saved


@pytest.fixture(scope="module")
def long_run(client: Client, models: Path, shapes: Dataset, captions: CaptionJob) -> Callable[[str], FineTuningJob]:
    """Submits the same run again and again; it has `LONG` steps."""

    def submit(suffix: str) -> FineTuningJob:
        return client.train(
            model=str(models / "clip"),
            dataset_id=shapes.id,
            caption_job_id=captions.id,
            method={"type": "mmft", "hyperparameters": LONG},
            seed=5,
            suffix=suffix,
        )

    return submit


@pytest.fixture(scope="module")
def undisturbed(client: Client, stack: Stack, long_run: Callable[[str], FineTuningJob]) -> dict[str, str]:
    """What the run makes when nothing happens to it."""
    return weights(client, stack, succeeded(client, long_run("undisturbed"), 90))


def weights(client: Client, stack: Stack, job: FineTuningJob) -> dict[str, str]:
    """Digests of the tensors in the store."""
    made = next(c for c in client.classifiers(dataset_id=job.dataset_id) if c.id == job.fine_tuned_model)
    folder = stack.state_dir / "store" / made.storage_key
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def at_step(client: Client, job: FineTuningJob, step: int) -> None:
    """Wait until the run is past `step`, and make sure that it is not at its end."""

    def reached() -> bool:
        now = client.job(job.id)
        assert now.status in ("queued", "running")
        return now.progress is not None and now.progress.stage == "training" and now.progress.done >= step

    until(f"{job.id} reaches step {step}", reached, 90)


def resumed_from(http: httpx.Client, job: FineTuningJob) -> int:
    """The step at which the second attempt went on. What was done before it was not done again: the first epoch that
    ends after it is the one it lies in."""
    told = events(http, job)
    (resumed,) = [event for event in told if event["type"] == "training.resumed"]
    after = next(event for event in told if event["type"] == "training.epoch" and event["seq"] > resumed["seq"])
    step = int(resumed["data"]["step"])
    assert after["data"]["epoch"] == -(-step // STEPS_PER_EPOCH)
    return step


def test_a_killed_training_goes_on_to_the_same_weights(
    stack: Stack,
    client: Client,
    http: httpx.Client,
    kill: Kill,
    long_run: Callable[[str], FineTuningJob],
    undisturbed: dict[str, str],
) -> None:
    job = long_run("killed")
    at_step(client, job, 20)
    kill("worker-fine_tune", signal.SIGKILL)
    job = succeeded(client, job, 90)
    assert job.attempt == 2
    assert 19 <= resumed_from(http, job) < 90, "a step may be reported and not yet saved"
    assert weights(client, stack, job) == undisturbed
    assert sorted(undisturbed) == ["head.safetensors", "open_clip_model.safetensors"]
    assert [c.kind for c in client.checkpoints(job.id)] == ["best"], "the saved states are gone"


def test_sigterm_hands_the_training_to_the_next_worker(
    stack: Stack,
    client: Client,
    http: httpx.Client,
    kill: Kill,
    long_run: Callable[[str], FineTuningJob],
    undisturbed: dict[str, str],
) -> None:
    job = long_run("terminated")
    at_step(client, job, 10)
    kill("worker-fine_tune", signal.SIGTERM)
    job = succeeded(client, job, 90)
    requeued = [event for event in events(http, job) if event["type"] == "job.requeued"]
    assert [event["level"] for event in requeued] == ["info"], "handed back by the worker itself, no lease lapsed"
    assert job.attempt == 2
    assert resumed_from(http, job) >= 10
    assert weights(client, stack, job) == undisturbed


def test_a_paused_training_goes_on_to_the_same_weights(
    stack: Stack,
    client: Client,
    http: httpx.Client,
    long_run: Callable[[str], FineTuningJob],
    undisturbed: dict[str, str],
) -> None:
    job = long_run("paused")
    at_step(client, job, 10)
    client.pause(job.id)
    until("the job pauses", lambda: client.job(job.id).status == "paused")
    assert [c.kind for c in client.checkpoints(job.id)] == ["resume"]
    client.resume(job.id)
    job = succeeded(client, job, 90)
    assert resumed_from(http, job) >= 10
    assert weights(client, stack, job) == undisturbed


def test_a_cancelled_training_makes_no_classifier(client: Client, long_run: Callable[[str], FineTuningJob]) -> None:
    job = long_run("cancelled")
    at_step(client, job, 5)
    client.cancel(job.id)
    job = finished(client, job, 20)
    assert job.status == "cancelled"
    assert job.fine_tuned_model is None
    assert job.id not in {classifier.job_id for classifier in client.classifiers(dataset_id=job.dataset_id)}


def test_jobs_queued_when_redis_forgets_everything_still_run(
    stack: Stack, client: Client, models: Path, shapes: Dataset, long_run: Callable[[str], FineTuningJob]
) -> None:
    running = long_run("running")
    at_step(client, running, 5)
    queued = [
        client.train(model=str(models / "clip"), dataset_id=shapes.id, method={"type": "zero_shot"}) for _ in range(2)
    ]
    with Redis.from_url(stack.env["REDIS_URL"]) as redis:
        assert redis.llen("rq:queue:fine_tune") == 2
        redis.flushall()
    for job in (*queued, running):
        succeeded(client, job, 90)
    for job in queued:
        assert client.job(job.id).attempt == 1
