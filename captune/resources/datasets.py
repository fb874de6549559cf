"""Data sets: uploaded, found again, renamed, removed."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captune.packing import archive
from captune.transport import LONG, Transport
from shared.schemas.datasets import Dataset, DatasetEdit, Image


class Datasets(Transport):
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
        self._send("DELETE", f"/v1/datasets/{dataset_id}", timeout=LONG)
