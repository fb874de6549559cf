"""The Python client: typed, synchronous, over httpx.

client = Client()                                   # finds a local `captune up`
dataset = client.wait(client.push("photos/", name="pets", domain="pets"))
captions = client.wait(client.caption(dataset_id=dataset.id))
job = client.wait(client.train(dataset_id=dataset.id, caption_job_id=captions.id, shots=16))
print(client.leaderboard(dataset.id))
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from captune import connection
from captune.errors import CaptuneAPIError
from captune.packing import archive
from shared.schemas.captions import Caption, CaptionJob, CaptionJobRequest
from shared.schemas.common import FINAL_STATUSES, JobEvent, JobResource, Progress
from shared.schemas.datasets import Dataset, Image
from shared.schemas.evaluations import Evaluation, EvaluationRequest, Leaderboard
from shared.schemas.fine_tuning import Classifier, FineTuningCheckpoint, FineTuningJob, FineTuningRequest, Method
from shared.schemas.keys import Key, KeyRequest, NewKey

J = TypeVar("J", bound=JobResource)
R = TypeVar("R", Dataset, Image, Caption, CaptionJob, FineTuningJob, FineTuningCheckpoint, Evaluation, Classifier, Key)

_JOBS: dict[str, tuple[str, type[JobResource]]] = {  # id prefix -> where it lives, what it is
    "ds": ("/v1/datasets", Dataset),
    "cap": ("/v1/caption_jobs", CaptionJob),
    "ft": ("/v1/fine_tuning/jobs", FineTuningJob),
    "eval": ("/v1/evaluations", Evaluation),
}
RECONNECTS = 30  # a stream that breaks is taken up again where it was, a second apart


class Client:
    """Raises CaptuneAPIError where the server refuses, httpx.TransportError where it cannot be reached."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        state_dir: Path | None = None,
        timeout: float = 60.0,
    ) -> None:
        found = connection.find(url, api_key, state_dir)
        self.url = found.url.rstrip("/")
        headers = {"Authorization": f"Bearer {found.api_key}"}
        local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")  # a proxy has no business there
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=not local)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # -- data sets -------------------------------------------------------------------------------------------------

    def push(self, source: str | Path, *, name: str, domain: str, **fields: Any) -> Dataset:
        """Upload a folder or an archive. `fields`: split_seed, val_fraction, test_fraction."""
        with archive(Path(source)) as file:
            answer = self._send(
                "POST",
                "/v1/datasets",
                data={"name": name, "domain": domain, **fields},
                files={"file": ("images", file, "application/octet-stream")},
                timeout=httpx.Timeout(60.0, read=600.0, write=600.0),
            )
        return Dataset.model_validate(answer.json())

    def find_dataset(self, source: str | Path, *, name: str) -> Dataset | None:
        """The usable data set of this name that was made from these very bytes, if there is one."""
        with archive(Path(source)) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        for dataset in self.datasets():
            if dataset.archive_sha256 == digest and dataset.name == name and dataset.status == "succeeded":
                return dataset
        return None

    def datasets(self) -> Iterator[Dataset]:
        return self._list("/v1/datasets", Dataset)

    def images(self, dataset_id: str, **filters: str) -> Iterator[Image]:
        return self._list(f"/v1/datasets/{dataset_id}/images", Image, **filters)

    def delete_dataset(self, dataset_id: str) -> None:
        self._send("DELETE", f"/v1/datasets/{dataset_id}")

    # -- captions --------------------------------------------------------------------------------------------------

    def caption(self, **request: Any) -> CaptionJob:
        """Fields: shared.schemas.captions.CaptionJobRequest."""
        body = CaptionJobRequest(**request)
        return CaptionJob.model_validate(self._post("/v1/caption_jobs", body.model_dump()))

    def captions(self, dataset_id: str, **filters: str) -> Iterator[Caption]:
        return self._list(f"/v1/datasets/{dataset_id}/captions", Caption, **filters)

    # -- fine-tuning -----------------------------------------------------------------------------------------------

    def train(self, **request: Any) -> FineTuningJob:
        """Fields: shared.schemas.fine_tuning.FineTuningRequest."""
        body = FineTuningRequest(**request)
        return FineTuningJob.model_validate(self._post("/v1/fine_tuning/jobs", body.model_dump()))

    def methods(self) -> list[Method]:
        return [Method.model_validate(m) for m in self._send("GET", "/v1/fine_tuning/methods").json()["data"]]

    def checkpoints(self, job_id: str) -> Iterator[FineTuningCheckpoint]:
        return self._list(f"/v1/fine_tuning/jobs/{job_id}/checkpoints", FineTuningCheckpoint)

    def classifiers(self, **filters: str) -> Iterator[Classifier]:
        return self._list("/v1/classifiers", Classifier, **filters)

    def delete_classifier(self, classifier_id: str) -> None:
        self._send("DELETE", f"/v1/classifiers/{classifier_id}")

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, classifier_id: str, split: str = "test") -> Evaluation:
        body = EvaluationRequest.model_validate({"classifier_id": classifier_id, "split": split})
        return Evaluation.model_validate(self._post("/v1/evaluations", body.model_dump()))

    def leaderboard(self, dataset_id: str, **filters: Any) -> Leaderboard:
        """`filters`: metric, split, shots (a number or "full")."""
        params = {"dataset_id": dataset_id, **{k: v for k, v in filters.items() if v is not None}}
        return Leaderboard.model_validate(self._send("GET", "/v1/leaderboard", params=params).json())

    # -- jobs of any kind ------------------------------------------------------------------------------------------

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
                    if response.status_code in (502, 503, 504):  # a gateway whose server is being restarted
                        raise httpx.RemoteProtocolError(f"the server answered {response.status_code}")
                    if not response.is_success:
                        response.read()
                        raise CaptuneAPIError.from_response(response)
                    for kind, number, data in _sse(response.iter_lines()):
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

    # -- keys ------------------------------------------------------------------------------------------------------

    def create_key(self, **request: Any) -> NewKey:
        """Fields: shared.schemas.keys.KeyRequest."""
        return NewKey.model_validate(self._post("/v1/keys", KeyRequest(**request).model_dump()))

    def keys(self) -> Iterator[Key]:
        return self._list("/v1/keys", Key)

    def revoke_key(self, key_id: str) -> None:
        self._send("DELETE", f"/v1/keys/{key_id}")

    # -- HTTP ------------------------------------------------------------------------------------------------------

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = self._http.request(method, path, **options)
        if not response.is_success:
            raise CaptuneAPIError.from_response(response)
        return response

    def _post(self, path: str, body: dict[str, Any] | None) -> Any:
        return self._send("POST", path, json=body).json()

    def _list(self, path: str, model: type[R] | type[JobResource], **filters: str) -> Iterator[Any]:
        params: dict[str, Any] = {"limit": 200, **filters}
        while True:
            answer = self._send("GET", path, params=params).json()
            for entry in answer["data"]:
                yield model.model_validate(entry)
            if not answer["has_more"]:
                return
            params["after"] = answer["last_id"]


def _job(job_id: str) -> tuple[str, type[JobResource]]:
    prefix = job_id.partition("_")[0]
    if prefix not in _JOBS:
        raise ValueError(f"'{job_id}' is no job id; they start with {', '.join(p + '_' for p in _JOBS)}")
    path, model = _JOBS[prefix]
    return f"{path}/{job_id}", model


def _sse(lines: Iterator[str]) -> Iterator[tuple[str, str | None, Any]]:
    """Server-sent events: (event, id, data as JSON)."""
    kind, number, data = "message", None, ""
    for line in lines:
        if not line:
            if data:
                yield kind, number, json.loads(data)
            kind, number, data = "message", None, ""
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            kind = value
        elif field == "id":
            number = value
        elif field == "data":
            data += value
