"""MMFT's protocol over the REST API: upload, caption, train and score, for each data set. Whatever the server has
already from an earlier run is found there and taken, so that it can be broken off and started again at any time."""

from collections.abc import Callable
from typing import Final, TypeVar

from captune.bench.data import Benchmark, Reading
from captune.bench.plan import CaptionStep, Plan, Settings, group_request, plan
from captune.bench.results import Result, Row, rows
from captune.bench.upload import packed
from captune.client import Client
from captune.errors import CaptuneAPIError
from captune.progress import ProgressBar
from shared.schemas.captions import CaptionJob
from shared.schemas.common import JobResource, Progress
from shared.schemas.datasets import Dataset
from shared.schemas.evaluations import Evaluation
from shared.schemas.fine_tuning import FineTuningJob, Group

J = TypeVar("J", bound=JobResource)

TAG: Final = "bench-mmft"
GONE: Final = frozenset({"failed", "cancelled"})


class Failed(Exception):
    """A job that the rest needs did not succeed."""


class Protocol:
    """`submit` every data set, then `collect` each: the runs of one go on while the next is captioned."""

    def __init__(self, client: Client, settings: Settings, say: Callable[[str], None]) -> None:
        self.client, self.settings, self.say = client, settings, say
        self.known = client.methods()
        self.plan: Plan = plan(settings, self.known)
        self._captions: dict[str, list[CaptionJob]] = {}  # by data set id

    def submit(self, name: str, benchmark: Benchmark, reading: Reading) -> Result:
        """Up to the submission of all runs. Where that fails, the result says why."""
        result = Result(dataset=name, title=benchmark.title, paper=benchmark.paper, notes=list(reading.notes))
        try:
            dataset = self._upload(name, benchmark, reading)
            result.dataset_id = dataset.id
            result.notes += differences(dataset, reading)
            jobs = [self._caption(step, dataset) for step in self.plan.captions]
            jobs = [self._wait(job, f"{name}: captions") for job in jobs]
            self._captions[dataset.id] = jobs
            result.captioner = next(
                (str((job.result or {}).get("captioner", {}).get("revision")) for job in jobs), None
            )
            result.group_id = self._submit_runs(name, dataset, [job.id for job in jobs]).id
        except (Failed, CaptuneAPIError) as error:
            result.error = str(error)
        return result

    def collect(self, result: Result, benchmark: Benchmark) -> Result:
        """Waits for the runs and their scores. Where that fails, the result says why, and the others still count."""
        if result.error is not None or result.group_id is None or result.dataset_id is None:
            return result
        try:
            result.rows = self._rows(result, result.group_id, result.dataset_id, benchmark)
        except CaptuneAPIError as error:
            result.error = str(error)
        return result

    def _rows(self, result: Result, group_id: str, dataset_id: str, benchmark: Benchmark) -> list[Row]:
        with ProgressBar(f"{result.dataset}: runs") as bar:

            def on_update(group: Group) -> None:
                ended = group.scored + sum(group.counts.get(status, 0) for status in GONE)
                bar(Progress(stage="training", done=ended, total=group.runs))

            self.client.wait_group(group_id, on_update)
        evaluations = {
            job.id: job for job in self.client.jobs("eval", dataset_id=dataset_id) if isinstance(job, Evaluation)
        }
        captions = {job.id for job in self._captions[dataset_id]}
        jobs = [
            job
            for job in self.client.jobs("ft", group_id=group_id)
            if isinstance(job, FineTuningJob) and self._counts(job, captions)
        ]
        return rows(jobs, evaluations, self.known, self.settings, benchmark)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _upload(self, name: str, benchmark: Benchmark, reading: Reading) -> Dataset:
        with ProgressBar(f"{name}: packing") as bar:
            total = len(reading.entries)

            def on_image(done: int) -> None:
                if done % 1000 == 0:
                    bar(Progress(stage="images", done=done, total=total))

            with packed(reading, on_image) as archive:
                for found in self.client.datasets():
                    same = found.archive_sha256 == archive.sha256 and found.domain == benchmark.domain
                    if same and found.status not in GONE:
                        self.say(f"{name}: {found.id} is there already")
                        break
                else:
                    found = self.client.push(archive.path, name=name, domain=benchmark.domain)
                    self.say(f"{name}: uploaded as {found.id}")
        return self._wait(found, f"{name}: ingest")

    def _caption(self, step: CaptionStep, dataset: Dataset) -> CaptionJob:
        """An earlier job that was asked for the same, else a new one."""
        wanted = step.request(self.settings, dataset.id, dataset.domain)
        for job in self.client.jobs("cap", dataset_id=dataset.id):
            if isinstance(job, CaptionJob) and job.request == wanted and job.status not in GONE:
                return job
        return self.client.caption(**wanted.model_dump())

    def _submit_runs(self, name: str, dataset: Dataset, caption_job_ids: list[str]) -> Group:
        """One group for all runs of a data set with one model, captioner, preset and protocol. The server adds only
        what the group has not yet, so asking again does no harm, and asks for more seeds or methods extend it."""
        s = self.settings
        title = f"{TAG}: {name}, {s.model}, captions by {s.engine}, {s.preset}, {s.validation}"[:200]
        group = next((g for g in self.client.groups(dataset_id=dataset.id) if g.name == title), None)
        for step in self.plan.runs:
            request = step.request(s, caption_job_ids, TAG)
            if group is None:
                group = self.client.sweep(**group_request(request, dataset.id, title).model_dump())
            else:
                group = self.client.extend_group(group.id, **request.model_dump())
        assert group is not None  # settings have a method, so the plan has a run
        return group

    def _wait(self, job: J, label: str) -> J:
        with ProgressBar(label) as bar:
            ended = self.client.wait(job, bar)
        if ended.status != "succeeded":
            reason = f": {ended.error.message}" if ended.error else ""
            raise Failed(f"{ended.id} is {ended.status}{reason}")
        return ended

    def _counts(self, job: FineTuningJob, captions: set[str]) -> bool:
        """Whether this run of the group is one of these settings: an earlier call may have asked for others. Zero-shot
        methods without captions have no shots."""
        s = self.settings
        method = next((method for method in self.known if method.name == job.method.type), None)
        if method is None or method.name not in s.methods or max(job.seed, job.shot_seed) >= s.seeds:
            return False
        if method.needs_captions:
            return job.caption_job_id in captions and job.shots in s.shots
        return method.kind == "zero_shot" or job.shots in s.shots


def differences(dataset: Dataset, reading: Reading) -> list[str]:
    """Where the server's classes and counts are not those that were sent."""
    counts: dict[str, dict[str, int]] = {str(split): found for split, found in reading.counts().items()}
    refused = int((dataset.report or {}).get("refused_total", 0))
    notes = [f"the server refused {refused} images ('captune datasets show {dataset.id}')"] if refused else []
    if not refused and dataset.counts != counts:
        notes.append(f"{dataset.id} does not hold what was sent; delete it and run this again")
    return notes
