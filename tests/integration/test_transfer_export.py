"""A job's captions as a file, and the file as captions again."""

import io
import json
import zipfile
from typing import Any

import pytest
from sqlalchemy import func, update

from services.captioner.transfer import export
from shared.core import Core
from shared.db.models import Caption, CaptionJobItem, Dataset
from shared.errors import NotFound
from tests.integration.factories import add_dataset, add_job, share_caption
from tests.integration.support import Api
from tests.integration.transfers import brought, captions_of, texts, with_images

AWKWARD = {
    "train/cat/1.png": ['quoted "words", commas', {"caption": "über, 猫 and\ttabs", "characteristic": "shape"}],
    "train/cat/2.png": ["=1+1", "two\nlines", "two\r\nmore"],
    "val/dog/1.png": "the other one",
    "test/dog/3.jpg": "a jpeg",
    "test/dog/3.png": "its namesake",
}


@pytest.fixture
def awkward(api: Api, core: Core, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An imported job on a data set where two images differ in their extension only; pages of two images."""
    monkeypatch.setattr(export, "PAGE", 2)
    paths = ["train/cat/0.png", *AWKWARD, "train/dog/without.png"]
    job = brought(api, core, with_images(core, paths), json.dumps(AWKWARD))
    assert (job["status"], job["result"]["captions"]) == ("succeeded", 8)
    return job


@pytest.mark.parametrize(
    ("format", "media_type", "suffix"),
    [
        ("json", "application/json", "json"),
        ("jsonl", "application/x-ndjson", "jsonl"),
        ("csv", "text/csv; charset=utf-8", "csv"),
        ("txt", "application/zip", "zip"),
    ],
)
def test_an_export_is_imported_as_the_same_captions(
    api: Api, core: Core, awkward: Any, format: str, media_type: str, suffix: str
) -> None:
    answer = api.anna.get(f"/v1/caption_jobs/{awkward['id']}/export", params={"format": format})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    name = f"pets-captions-{awkward['id']}.{suffix}"
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{name}"'
    before = captions_of(api, awkward)
    with core.transaction() as session:
        session.execute(update(Caption).values(dataset_id="elsewhere", key=func.concat("old", Caption.key)))
    again = brought(api, core, awkward["dataset_id"], answer.content, name)
    assert again["status"] == "succeeded", again["error"]
    assert again["result"]["failed"] == 0, again["result"]["failures"]
    assert again["result"]["written"] == 8
    after = texts(captions_of(api, again))
    if format == "txt":
        flat = [(c["path"], c["text"].replace("\r\n", "  ").replace("\n", " "), "imported") for c in before]
        assert after == sorted(flat)
    else:
        assert after == texts(before)


def test_json_is_keyed_by_path_and_sidecars_are_called_like_their_images(api: Api, awkward: Any) -> None:
    answer = api.anna.get(f"/v1/caption_jobs/{awkward['id']}/export")
    body = answer.json()
    assert list(body) == sorted(AWKWARD)
    assert body["train/cat/1.png"][1] == {
        **{"caption": "über, 猫 and\ttabs", "characteristic": "shape"},
        **{"flags": body["train/cat/1.png"][1]["flags"], "excluded": False},
    }
    data = api.anna.get(f"/v1/caption_jobs/{awkward['id']}/export", params={"format": "txt"}).content
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        assert packed.namelist() == [
            *("test/dog/3.jpg.txt", "test/dog/3.png.txt"),  # `3.txt` could be either's
            *("train/cat/1.txt", "train/cat/2.txt", "val/dog/1.txt"),
        ]
        assert packed.read("train/cat/2.txt").decode().splitlines() == ["=1+1", "two lines", "two  more"]


def test_usable_leaves_out_what_training_does(api: Api, core: Core, awkward: Any) -> None:
    by_text = {c["text"]: c["id"] for c in captions_of(api, awkward)}
    with core.transaction() as session:
        session.execute(update(Caption).values(flags=["over_budget", "label_missing"]))
        for text, values in (("=1+1", {"excluded": True}), ("a jpeg", {"flags": ["label_missing", "refusal"]})):
            session.execute(update(Caption).where(Caption.id == by_text[text]).values(**values))

    def exported(include: str) -> set[str]:
        params = {"format": "jsonl", "include": include}
        lines = api.anna.get(f"/v1/caption_jobs/{awkward['id']}/export", params=params).text.splitlines()
        return {json.loads(line)["caption"] for line in lines}

    assert exported("all") == by_text.keys()
    assert exported("usable") == by_text.keys() - {"=1+1", "a jpeg"}

    other = add_job(core, request=awkward["request"], dataset_id=awkward["dataset_id"], status="succeeded")
    share_caption(core, by_text["its namesake"], other, ["duplicate"])
    assert exported("usable") == by_text.keys() - {"=1+1", "a jpeg"}, "what another job says is not this one's"
    with core.transaction() as session:
        mine = update(CaptionJobItem).where(CaptionJobItem.job_id == awkward["id"])
        session.execute(mine.where(CaptionJobItem.caption_id == by_text["the other one"]).values(flags=["duplicate"]))
    assert exported("usable") == by_text.keys() - {"=1+1", "a jpeg", "the other one"}
    body = api.anna.get(f"/v1/caption_jobs/{awkward['id']}/export").json()
    assert body["val/dog/1.png"][0]["flags"] == ["over_budget", "label_missing", "duplicate"]
    assert body["test/dog/3.png"][0]["flags"] == ["over_budget", "label_missing"]


def test_a_job_without_captions_is_exported_as_nothing(api: Api, core: Core) -> None:
    dataset_id = add_dataset(core)
    job_id = add_job(core, request={"dataset_id": dataset_id}, dataset_id=dataset_id, status="failed")
    assert api.anna.get(f"/v1/caption_jobs/{job_id}/export").json() == {}


def test_an_odd_name_of_a_data_set_makes_no_odd_file_name(api: Api, core: Core) -> None:
    dataset_id = add_dataset(core)
    job_id = add_job(core, request={"dataset_id": dataset_id}, dataset_id=dataset_id, status="failed")
    for name, begins in (('"; x=../\r\n猫 pets', "x-pets-captions-cap_"), ("猫", "captions-cap_")):
        with core.transaction() as session:
            session.get_one(Dataset, dataset_id).name = name
        header = api.anna.get(f"/v1/caption_jobs/{job_id}/export").headers["Content-Disposition"]
        assert header.startswith(f'attachment; filename="{begins}')


def test_an_export_whose_job_is_deleted_does_not_pass_for_a_whole_one(api: Api, core: Core, awkward: Any) -> None:
    pages = export.exported(core, awkward["id"], awkward["dataset_id"], "all")
    next(pages)
    assert api.anna.delete(f"/v1/datasets/{awkward['dataset_id']}").status_code == 204
    with pytest.raises(NotFound, match="was deleted while"):
        list(pages)
