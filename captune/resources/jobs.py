"""Jobs of every kind: looked at, acted on, watched until they end."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx

from captune.errors import CaptuneAPIError
from captune.transport import RECONNECTS, Transport, server_sent_events
from shared.schemas.captions import CaptionJob
from shared.schemas.common import FINAL_STATUSES, JobEvent, JobResource, Progress
from shared.schemas.datasets import Dataset
from shared.schemas.evaluations import Evaluation
from shared.schemas.fine_tuning import FineTuningJob

J = TypeVar("J", bound=JobResource)
_JOBS: dict[str, tuple[str, type[JobResource]]] = {  # id prefix -> where it lives, what it is
    "ds": ("/v1/datasets", Dataset),
    "cap": ("/v1/caption_jobs", CaptionJob),
    "ft": ("/v1/fine_tuning/jobs", FineTuningJob),
    "eval": ("/v1/evaluations", Evaluation),
}


class Jobs(Transport):
    def job(self, job_id: str) -> JobResource:
        path, model = _job(job_id)
        return model.model_validate(self._send("GET", path).json())

    def jobs(self, kind: str, **filters: str) -> Iterator[JobResource]:
        """`kind`: the id prefix, ds | cap | ft | eval."""
        path, model = _JOBS[kind]
        return self._list(path, model, **filters)

    def cancel(self, job_id: str) -> JobResource:
        return self._act(job_id, "cancel")

    def pause(self, job_id: str) -> JobResource:
        return self._act(job_id, "pause")

    def resume(self, job_id: str) -> JobResource:
        return self._act(job_id, "resume")

    def _act(self, job_id: str, action: str) -> JobResource:
        path, model = _job(job_id)
        return model.model_validate(self._post(f"{path}/{action}", None))

    def watch(self, job_id: str) -> Iterator[JobEvent | Progress | JobResource]:
        """Events and progress as they happen, the finished job last. A broken stream is taken up where it broke."""
        path, model = _job(job_id)
        last, failures = "0", 0
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
            try:
                with self._http.stream(
                    "GET", f"{path}/events", headers=headers, timeout=httpx.Timeout(60.0, read=60.0)
                ) as response:
                    if response.status_code in (429, 502, 503, 504):  # full, or being restarted
                        raise httpx.RemoteProtocolError(f"the server answered {response.status_code}")
                    if not response.is_success:
                        response.read()
                        raise CaptuneAPIError.from_response(response)
                    for kind, number, data in server_sent_events(response.iter_lines()):
                        failures, last = 0, number or last
                        if kind == "event":
                            yield JobEvent.model_validate(data)
                        elif kind == "progress":
                            yield Progress.model_validate(data)
                        elif kind == "done":
                            yield model.model_validate(data)
                            return
            except httpx.TransportError:
                failures += 1
                if failures > RECONNECTS:
                    raise
            time.sleep(1.0)

    def wait(self, job: J, on_update: Callable[[JobEvent | Progress], None] | None = None) -> J:
        """Block until the job is final and return it; `status` tells how it ended."""
        if job.status in FINAL_STATUSES:
            return job
        for update in self.watch(job.id):
            if isinstance(update, type(job)):
                return update
            if on_update is not None and isinstance(update, (JobEvent, Progress)):
                on_update(update)
        raise AssertionError("the stream ends with the finished job")


def _job(job_id: str) -> tuple[str, type[JobResource]]:
    prefix = job_id.partition("_")[0]
    if prefix not in _JOBS:
        raise ValueError(f"'{job_id}' is no job id; they start with {', '.join(p + '_' for p in _JOBS)}")
    path, model = _JOBS[prefix]
    return f"{path}/{job_id}", model
