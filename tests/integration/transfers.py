"""Data sets whose images have names, and captions sent to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.core import Core
from shared.db.models import Image
from shared.ids import new_id
from shared.jobs.worker import Runner
from tests.integration.factories import add_dataset, png
from tests.integration.support import Api

PATHS = ("train/cat/1.png", "train/cat/2.png", "val/dog/1.png", "test/dog/3.jpg")


def with_images(core: Core, paths: Sequence[str], owner: str = "anna") -> str:
    """`split/class/file` for each image."""
    id = add_dataset(core, owner)
    with core.transaction() as session:
        for i, path in enumerate(paths):
            split, class_name, _ = path.split("/")
            session.add(
                Image(
                    **{"id": new_id("img"), "owner": owner, "dataset_id": id, "path": path, "split": split},
                    **{"class_name": class_name, "sha256": core.store.put_blob(png(i)), "media_type": "image/png"},
                    **{"width": 16, "height": 16, "bytes": 1},
                )
            )
    return id


def send(api: Api, dataset_id: str, content: bytes | str, name: str = "captions.json", **fields: str) -> Any:
    data = content.encode() if isinstance(content, str) else content
    headers = {"Idempotency-Key": fields.pop("key")} if "key" in fields else {}
    return api.anna.post(
        "/v1/caption_jobs/import",
        data={"dataset_id": dataset_id, **fields},
        files={"file": (name, data)},
        headers=headers,
    )


def brought(
    api: Api, core: Core, dataset_id: str, content: bytes | str, name: str = "captions.json", **fields: str
) -> Any:
    """The job, run to its end."""
    answer = send(api, dataset_id, content, name, **fields)
    assert answer.status_code == 202, answer.text
    Runner(core, "caption", "test").run(answer.json()["id"])
    return api.anna.get(f"/v1/caption_jobs/{answer.json()['id']}").json()


def captions_of(api: Api, job: Any) -> list[Any]:
    params = {"caption_job_id": job["id"], "limit": "1000"}
    return list(api.anna.get(f"/v1/datasets/{job['dataset_id']}/captions", params=params).json()["data"])


def texts(captions: list[Any]) -> list[tuple[str, str, str]]:
    return sorted((c["path"], c["text"], c["characteristic"]) for c in captions)


def uploads(core: Core) -> list[Path]:
    return list(Path(core.store.root, "uploads").glob("cap_*"))
