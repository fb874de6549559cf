"""Caption jobs and their captions: asked for, searched, edited, brought in and out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captune.transport import LONG, Transport, given
from shared.schemas.captions import (
    Caption,
    CaptionEdit,
    CaptionJob,
    CaptionJobRequest,
    CaptionPreview,
    CaptionPreviewRequest,
    CaptionReport,
)


class Captions(Transport):
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
        return self._list(f"/v1/datasets/{dataset_id}/captions", Caption, **given(filters))

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
