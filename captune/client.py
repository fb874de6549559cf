"""The Python client: typed, synchronous, over httpx.

client = Client()                                   # finds a local `captune up`
dataset = client.wait(client.push("photos/", name="pets", domain="pets"))
captions = client.wait(client.caption(dataset_id=dataset.id))
job = client.wait(client.train(dataset_id=dataset.id, caption_job_id=captions.id, shots=16))
print(client.leaderboard(dataset.id))
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx

from captune.errors import CaptuneAPIError
from captune.packing import archive, batched, new_folder, unpack
from captune.transport import LONG, Transport, server_sent_events
from shared.schemas.captions import (
    Caption,
    CaptionEdit,
    CaptionJob,
    CaptionJobRequest,
    CaptionPreview,
    CaptionPreviewRequest,
    CaptionReport,
)
from shared.schemas.common import FINAL_STATUSES, JobEvent, JobResource, Progress
from shared.schemas.datasets import Dataset, DatasetEdit, Image
from shared.schemas.evaluations import (
    Comparison,
    Evaluation,
    EvaluationRequest,
    Leaderboard,
    Prediction,
    Predictions,
)
from shared.schemas.fine_tuning import (
    Classifier,
    ClassifierEdit,
    FineTuningCheckpoint,
    FineTuningJob,
    FineTuningRequest,
    Group,
    GroupRequest,
    GroupRuns,
    Method,
    SoupRequest,
)
from shared.schemas.keys import Key, KeyRequest, NewKey

J = TypeVar("J", bound=JobResource)
_JOBS: dict[str, tuple[str, type[JobResource]]] = {  # id prefix -> where it lives, what it is
    "ds": ("/v1/datasets", Dataset),
    "cap": ("/v1/caption_jobs", CaptionJob),
    "ft": ("/v1/fine_tuning/jobs", FineTuningJob),
    "eval": ("/v1/evaluations", Evaluation),
}
_GROUPS = "/v1/fine_tuning/groups"
RECONNECTS = 30  # a stream that breaks is taken up again where it was, a second apart


class Client(Transport):
    """Raises CaptuneAPIError where the server refuses, httpx.TransportError where it cannot be reached."""

    # -- data sets -------------------------------------------------------------------------------------------------

    def push(self, source: str | Path, *, name: str, domain: str, **fields: Any) -> Dataset:
        """Upload a folder or an archive. `fields`: split_seed, val_fraction, test_fraction."""
        with archive(Path(source)) as file:
            answer = self._send(
                "POST",
                "/v1/datasets",
                data={"name": name, "domain": domain, **fields},
                files={"file": ("images", file, "application/octet-stream")},
                timeout=LONG,
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

    def update_dataset(
        self, dataset_id: str, *, name: str | None = None, display_names: dict[str, str] | None = None
    ) -> Dataset:
        """`display_names`: what prompts and prefixes call a class, by its name; the others keep theirs."""
        body = DatasetEdit(name=name, display_names=display_names)
        answer = self._send("PATCH", f"/v1/datasets/{dataset_id}", json=body.model_dump(exclude_none=True))
        return Dataset.model_validate(answer.json())

    def delete_dataset(self, dataset_id: str) -> None:
        self._send("DELETE", f"/v1/datasets/{dataset_id}")

    # -- captions --------------------------------------------------------------------------------------------------

    def caption(self, **request: Any) -> CaptionJob:
        """Fields: shared.schemas.captions.CaptionJobRequest. With `redo`, those left out are the earlier job's."""
        body = CaptionJobRequest(**request).model_dump(exclude_unset=True)
        return CaptionJob.model_validate(self._post("/v1/caption_jobs", body))

    def preview_captions(self, **request: Any) -> CaptionPreview:
        """A dry run. Fields: those of `caption`, image_id and live (caption that image now; nothing is stored)."""
        body = CaptionPreviewRequest(**request).model_dump(exclude_unset=True)
        answer = self._send("POST", "/v1/caption_jobs/preview", json=body, timeout=LONG)
        return CaptionPreview.model_validate(answer.json())

    def captions(self, dataset_id: str, **filters: Any) -> Iterator[Caption]:
        """`filters`: caption_job_id, image_id, class_name, characteristic, flag, flagged, excluded, edited, q; those
        that are None do not count."""
        given = {name: value for name, value in filters.items() if value is not None}
        return self._list(f"/v1/datasets/{dataset_id}/captions", Caption, **given)

    def get_caption(self, caption_id: str) -> Caption:
        return Caption.model_validate(self._send("GET", f"/v1/captions/{caption_id}").json())

    def edit_caption(
        self, caption_id: str, *, text: str | None = None, excluded: bool | None = None, version: int | None = None
    ) -> Caption:
        """With `version` (of the caption as it was read) the edit is refused, status 412, where somebody changed it
        since; without, it stands whatever was there."""
        body = CaptionEdit(text=text, excluded=excluded).model_dump(exclude_none=True)
        headers = {"If-Match": "*" if version is None else f'"{version}"'}
        return Caption.model_validate(
            self._send("PATCH", f"/v1/captions/{caption_id}", json=body, headers=headers).json()
        )

    def caption_report(self, job_id: str) -> CaptionReport:
        answer = self._send("GET", f"/v1/caption_jobs/{job_id}/report", timeout=LONG)
        return CaptionReport.model_validate(answer.json())

    def import_captions(self, dataset_id: str, path: str | Path, **fields: str) -> CaptionJob:
        """Captions made elsewhere, as a caption job: JSON, JSONL, CSV, or a zip or tar of .txt sidecars. `fields`:
        format, clip_model, language ("en" or "any")."""
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; pack its .txt files as a zip or tar")
        with path.open("rb") as file:
            answer = self._send(
                "POST",
                "/v1/caption_jobs/import",
                data={"dataset_id": dataset_id, **fields},
                files={"file": (path.name, file, "application/octet-stream")},
                timeout=LONG,
            )
        return CaptionJob.model_validate(answer.json())

    def export_captions(self, job_id: str, path: str | Path, *, format: str = "json", include: str = "all") -> Path:
        """Write a job's captions to `path`, which appears once it is whole. `format`: json, jsonl, csv, or txt (a zip
        of sidecars); `include`: all or usable."""
        params = {"format": format, "include": include}
        return self._download(f"/v1/caption_jobs/{job_id}/export", Path(path), params)

    # -- fine-tuning -----------------------------------------------------------------------------------------------

    def train(self, **request: Any) -> FineTuningJob:
        """Fields: shared.schemas.fine_tuning.FineTuningRequest."""
        body = FineTuningRequest(**request)
        return FineTuningJob.model_validate(self._post("/v1/fine_tuning/jobs", body.model_dump()))

    def group(self, group_id: str) -> Group:
        return Group.model_validate(self._send("GET", f"{_GROUPS}/{group_id}").json())

    def groups(self, **filters: str) -> Iterator[Group]:
        return self._list(_GROUPS, Group, **filters)

    def sweep(self, **request: Any) -> Group:
        """A run for every combination of lists. Fields: shared.schemas.fine_tuning.GroupRequest."""
        return Group.model_validate(self._post(_GROUPS, GroupRequest(**request).model_dump()))

    def extend_group(self, group_id: str, **request: Any) -> Group:
        """Adds the combinations that the group has not yet. Fields: shared.schemas.fine_tuning.GroupRuns."""
        return Group.model_validate(self._post(f"{_GROUPS}/{group_id}/runs", GroupRuns(**request).model_dump()))

    def cancel_group(self, group_id: str) -> Group:
        return Group.model_validate(self._post(f"{_GROUPS}/{group_id}/cancel", None))

    def soup(self, group_id: str, **request: Any) -> FineTuningJob:
        """Averages a group's fine-tunes, greedily. Fields: shared.schemas.fine_tuning.SoupRequest."""
        return FineTuningJob.model_validate(
            self._post(f"{_GROUPS}/{group_id}/soup", SoupRequest(**request).model_dump())
        )

    def wait_group(self, group_id: str, on_update: Callable[[Group], None] | None = None) -> Group:
        """Block until every run of the group, and its evaluation, is final."""
        failures = 0
        while True:
            try:
                group = self.group(group_id)
                failures = 0
            except httpx.TransportError:
                failures += 1
                if failures > RECONNECTS:
                    raise
            else:
                if on_update is not None:
                    on_update(group)
                if group.status == "finished":
                    return group
            time.sleep(1.0)

    def methods(self) -> list[Method]:
        return [Method.model_validate(m) for m in self._send("GET", "/v1/fine_tuning/methods").json()["data"]]

    def checkpoints(self, job_id: str) -> Iterator[FineTuningCheckpoint]:
        return self._list(f"/v1/fine_tuning/jobs/{job_id}/checkpoints", FineTuningCheckpoint)

    def classifiers(self, **filters: str) -> Iterator[Classifier]:
        return self._list("/v1/classifiers", Classifier, **filters)

    def update_classifier(
        self, classifier_id: str, *, tags: list[str] | None = None, pinned: bool | None = None
    ) -> Classifier:
        body = ClassifierEdit(tags=tags, pinned=pinned).model_dump(exclude_none=True)
        return Classifier.model_validate(self._send("PATCH", f"/v1/classifiers/{classifier_id}", json=body).json())

    def delete_classifier(self, classifier_id: str) -> None:
        self._send("DELETE", f"/v1/classifiers/{classifier_id}")

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, classifier_id: str | None = None, **request: Any) -> Evaluation:
        """Further fields: shared.schemas.evaluations.EvaluationRequest."""
        body = EvaluationRequest(classifier_id=classifier_id, **request)
        return Evaluation.model_validate(self._post("/v1/evaluations", body.model_dump()))

    def rescore(self, evaluation_id: str) -> Evaluation:
        """Every metric anew, from the predictions kept."""
        return Evaluation.model_validate(self._send("POST", f"/v1/evaluations/{evaluation_id}/rescore").json())

    def save_predictions(self, evaluation_id: str, path: str | Path) -> Path:
        """Write the logits of every image to `path`, as Parquet."""
        return self._download(f"/v1/evaluations/{evaluation_id}/predictions", Path(path))

    def predict(self, classifier_id: str, files: Iterable[str | Path], *, top_k: int = 5) -> Iterator[Prediction]:
        """The classes of each image file, in the order given; sent in small requests, one after the other."""
        for paths in batched(map(Path, files)):
            with ExitStack() as opened:
                parts = [("images", (path.name, opened.enter_context(path.open("rb")))) for path in paths]
                url = f"/v1/classifiers/{classifier_id}/predict"
                answer = self._send("POST", url, params={"top_k": top_k}, files=parts, timeout=LONG)
            found = Predictions.model_validate(answer.json()).data
            yield from (each.model_copy(update={"file": str(path)}) for path, each in zip(paths, found, strict=True))

    def download_classifier(self, classifier_id: str, path: str | Path) -> Path:
        """Write a classifier that plain open_clip loads: as a zip where `path` ends in .zip, else as a new folder."""
        path = Path(path)
        url = f"/v1/classifiers/{classifier_id}/download"
        if path.suffix.lower() == ".zip":
            return self._download(url, path)
        with new_folder(path) as folder:
            unpack(self._download(url, folder / "classifier.zip"))
        return path

    def import_classifier(self, source: str | Path, *, dataset_id: str, name: str = "imported") -> Classifier:
        """Bring in a classifier that was downloaded elsewhere: a folder, zip or tar. `name` tells its row apart."""
        with archive(Path(source)) as file:
            answer = self._send(
                "POST",
                "/v1/classifiers/import",
                data={"dataset_id": dataset_id, "name": name},
                files={"file": ("classifier", file, "application/octet-stream")},
                timeout=LONG,
            )
        return Classifier.model_validate(answer.json())

    def leaderboard(self, dataset_id: str, **filters: Any) -> Leaderboard:
        """`filters`: metric, split, head, shots (a number or "full"), model, method, captioner, protocol, tag,
        group_id, order (best, asc, desc); those that are None do not count. Every row, unless `limit` or `after` (a
        row's id) asks for one page."""
        params = {"dataset_id": dataset_id, **_given(filters)}
        one_page = "limit" in params or "after" in params
        board = self._leaderboard(params if one_page else params | {"limit": 1000})
        page = board
        while page.has_more and not one_page:
            page = self._leaderboard(params | {"limit": 1000, "after": page.last_id})
            board.rows += page.rows
            board.has_more, board.last_id = page.has_more, page.last_id
        return board

    def _leaderboard(self, params: dict[str, Any]) -> Leaderboard:
        return Leaderboard.model_validate(self._send("GET", "/v1/leaderboard", params=params).json())

    def leaderboard_text(self, dataset_id: str, format: str, **filters: Any) -> str:
        """At most 1,000 rows as csv, markdown or latex. `filters`: those of `leaderboard`."""
        params = {"dataset_id": dataset_id, "format": format, "limit": 1000, **_given(filters)}
        return self._send("GET", "/v1/leaderboard", params=params).text

    def watch_leaderboard(self, dataset_id: str, *, every: float = 2.0, **filters: Any) -> Iterator[Leaderboard]:
        """One page, now and whenever it has changed; asks every so many seconds, which costs next to nothing while
        nothing has. `filters`: those of `leaderboard`, limit, after."""
        params = {"dataset_id": dataset_id, **_given(filters)}
        headers: dict[str, str] = {}
        while True:
            response = self._http.get("/v1/leaderboard", params=params, headers=headers)
            if response.status_code != 304:
                if not response.is_success:
                    raise CaptuneAPIError.from_response(response)
                headers = {"If-None-Match": response.headers["ETag"]}
                yield Leaderboard.model_validate(response.json())
            time.sleep(every)

    def compare(self, dataset_id: str, a: str, b: str, *, split: str = "test", head: str = "own") -> Comparison:
        """Two rows of the leaderboard, by their ids: the difference in accuracy on the same images."""
        params = {"dataset_id": dataset_id, "a": a, "b": b, "split": split, "head": head}
        return Comparison.model_validate(self._send("GET", "/v1/leaderboard/compare", params=params).json())

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

    # -- keys ------------------------------------------------------------------------------------------------------

    def create_key(self, **request: Any) -> NewKey:
        """Fields: shared.schemas.keys.KeyRequest."""
        return NewKey.model_validate(self._post("/v1/keys", KeyRequest(**request).model_dump()))

    def keys(self) -> Iterator[Key]:
        return self._list("/v1/keys", Key)

    def revoke_key(self, key_id: str) -> None:
        self._send("DELETE", f"/v1/keys/{key_id}")


def _given(filters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in filters.items() if value is not None}


def _job(job_id: str) -> tuple[str, type[JobResource]]:
    prefix = job_id.partition("_")[0]
    if prefix not in _JOBS:
        raise ValueError(f"'{job_id}' is no job id; they start with {', '.join(p + '_' for p in _JOBS)}")
    path, model = _JOBS[prefix]
    return f"{path}/{job_id}", model
