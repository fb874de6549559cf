"""Bad input gets a clear answer (what, where, what to do), leaves nothing half-written, and everything else goes on."""

import io
import json
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from captune import CaptuneAPIError, Client
from services.embedded.stack import Stack
from shared.schemas.captions import CaptionJob
from shared.schemas.datasets import Dataset
from tests.e2e import pictures
from tests.e2e.waiting import finished, succeeded, until

pytestmark = pytest.mark.timeout(120)
GOOD = pictures.by_class(2)


def push(client: Client, path: Path, **fields: Any) -> Dataset:
    return finished(client, client.push(path, name=path.stem, domain="simple shapes", **fields), 30)


# -- data sets that cannot be used at all: the job fails and says why --------------------------------------------------


def only(class_name: str) -> dict[str, bytes]:
    return {path: data for path, data in pictures.by_class(4).items() if path.startswith(class_name)}


def csv(*lines: str, files: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    flat = {path.replace("/", "-"): data for path, data in (files or GOOD).items()}
    return {"metadata.csv": "\n".join(lines).encode()} | flat


USELESS: dict[str, tuple[dict[str, bytes], str, str]] = {  # files, code, what the message names
    "no images": ({"readme/notes.txt": b"nothing here"}, "no_images", "usable image"),
    "empty archive": ({}, "no_images", "class/file"),
    "one class": (only("red_disc"), "one_class", "red_disc"),
    "a class in test only": (
        pictures.by_split(2, 0, 1) | {"test/extra/1.png": pictures.png()},
        "class_without_training_images",
        "extra",
    ),
    "classes differ in case only": (
        GOOD | {"Red-Disc/9.png": pictures.png(number=9)},
        "class_names_collide",
        "Red-Disc",
    ),
    "broken CSV": (csv("file_name,label", '"red_disc-000.png,red'), "broken_metadata", "metadata.csv, line"),
    "unknown column": (csv("file_name,label,colour", "a,b,c"), "unknown_column", "colour"),
    "no label column": (csv("file_name,caption", "a,b"), "missing_label_column", "label"),
    "ragged rows": (csv("file_name,label", "a,b,c"), "broken_metadata", "metadata.csv, line 2"),
    "bomb": ({"red/1.png": bytes(60_000_000), "red/2.png": bytes(60_000_000)}, "archive_bomb", "times its size"),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_useless_data_set_fails_with_its_reason(name: str, client: Client, tmp_path: Path) -> None:
    files, code, named = USELESS[name]
    dataset = push(client, pictures.write_zip(tmp_path / "bad.zip", files))
    assert dataset.status == "failed"
    assert dataset.error is not None
    assert dataset.error.code == code
    assert named in dataset.error.message
    assert dataset.counts is None
    with pytest.raises(CaptuneAPIError) as refused:
        client.caption(dataset_id=dataset.id)
    assert (refused.value.status, refused.value.code) == (409, "dataset_not_ready")
    client.delete_dataset(dataset.id)


def damaged_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in GOOD.items():
            archive.writestr(name, data)
    return out.getvalue()[:-200]


NO_ARCHIVE = {  # refused before a job is made
    "empty": (b"", "empty_file"),
    "a picture": (pictures.png(), "unsupported_archive"),
    "RAR": (b"Rar!\x1a\x07\x01\0" + bytes(100), "unsupported_archive"),
    "text": (b"hello " * 200, "unsupported_archive"),
}


@pytest.mark.parametrize("name", NO_ARCHIVE)
def test_what_is_no_archive_is_refused_at_once(name: str, client: Client, http: httpx.Client) -> None:
    content, code = NO_ARCHIVE[name]
    before = sum(1 for _ in client.datasets())
    answer = http.post("/v1/datasets", data={"name": "x", "domain": "x"}, files={"file": ("x.zip", content)})
    problem(answer, 422, code)
    assert sum(1 for _ in client.datasets()) == before


def test_a_truncated_archive_fails_and_says_so(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "cut.zip"
    path.write_bytes(damaged_zip())
    dataset = push(client, path)
    assert dataset.error is not None
    assert dataset.error.code == "truncated_archive"
    assert "again" in dataset.error.message


# -- data sets with bad files: those are refused one by one, the rest goes on ------------------------------------------


def huge_png() -> bytes:
    """A few bytes that claim 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    frames = [pictures.picture("red_disc", n) for n in range(3)]
    return pictures.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


BAD_FILES = {  # path: (content, code in the report)
    "red_disc/zero.png": (b"", "empty_file"),
    "red_disc/text.png": (b"this is no picture at all, only its name says so", "unsupported_format"),
    "red_disc/cut.png": (pictures.png(number=50)[:-60], "truncated_image"),
    "red_disc/huge.png": (huge_png(), "image_too_large"),
    "red_disc/moving.gif": (animated(), "animated_image"),
    "red_disc/nested.zip": (damaged_zip(), "unsupported_format"),
    "../escape.png": (pictures.png(number=51), "unsafe_path"),
    "/absolute.png": (pictures.png(number=52), "unsafe_path"),
    "stray.png": (pictures.png(number=53), "stray_file"),
}
LITTER = ("__MACOSX/red_disc/._000.png", "red_disc/.DS_Store", "red_disc/Thumbs.db")


def converted() -> dict[str, bytes]:
    """Pictures in forms that are accepted and turned into upright RGB."""
    wide = Image.new("RGB", (48, 24), (200, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    deep = Image.new("I;16", (24, 24), 40_000)
    return {
        "red_disc/cmyk.jpg": pictures.encoded(wide.convert("CMYK"), "JPEG"),
        "red_disc/deep.png": pictures.encoded(deep),
        "red_disc/clear.png": pictures.encoded(Image.new("RGBA", (24, 24), (200, 40, 40, 90))),
        "red_disc/turned.jpg": pictures.encoded(wide, "JPEG", exif=exif),
    }


NAMES = {  # the same file name in two classes is in GOOD already
    "red_disc/with a space.png": pictures.png(number=60),
    "red_disc/Über größe 猫.png": pictures.png(number=61),
    "red_disc/100%.png": pictures.png(number=62),
    "red_disc/000.PNG": pictures.png(number=63),
    "two words/a.png": pictures.png("green_box", 64),
    "two words/b.png": pictures.png("green_box", 65),
}


@pytest.fixture(scope="module")
def mixed(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Good pictures among everything that can be wrong with a file; one class stays empty."""
    files = GOOD | {path: content for path, (content, _) in BAD_FILES.items()} | converted() | NAMES
    files |= dict.fromkeys(LITTER, b"litter") | {"empty class/": b""}
    archive = pictures.write_zip(tmp_path_factory.mktemp("mixed") / "mixed.zip", files)
    return succeeded(client, client.push(archive, name="mixed", domain="simple shapes"))


def test_bad_files_are_refused_one_by_one_with_a_reason(mixed: Dataset) -> None:
    assert mixed.report is not None
    refusals = {refusal["path"]: refusal for refusal in mixed.report["refusals"]}
    assert {path: refusal["code"] for path, refusal in refusals.items()} == {
        path: code for path, (_, code) in BAD_FILES.items()
    }
    assert all(refusal["message"].endswith(".") for refusal in refusals.values())
    assert mixed.report["refused_total"] == len(BAD_FILES)
    assert mixed.report["skipped"] == len(LITTER)


def test_odd_but_good_files_are_accepted(client: Client, mixed: Dataset) -> None:
    found = {image.path: image for image in client.images(mixed.id)}
    assert sorted(found) == sorted([*GOOD, *converted(), *NAMES])
    turned = found["red_disc/turned.jpg"]
    assert (turned.width, turned.height) == (24, 48)
    assert mixed.classes is not None
    assert "two words" in {c.name for c in mixed.classes}


def test_an_empty_class_is_left_out_and_told(mixed: Dataset) -> None:
    assert mixed.report is not None
    assert "empty class" not in {c.name for c in mixed.classes or ()}
    notices = {notice["code"]: notice["message"] for notice in mixed.report["notices"]}
    assert "empty class" in notices["empty_class"]


def test_odd_but_good_files_are_captioned(client: Client, mixed: Dataset) -> None:
    train = sum(1 for _ in client.images(mixed.id, split="train"))
    job = succeeded(client, client.caption(dataset_id=mixed.id, characteristics=["color"], words=10))
    assert job.result is not None
    assert (job.result["captions"], job.result["failed"]) == (train, 0)


def test_links_in_an_archive_are_refused(client: Client, tmp_path: Path) -> None:
    path = pictures.write_tar(tmp_path / "links.tar", GOOD, "w")
    with tarfile.open(path, "a") as archive:
        for name, kind in (("red_disc/soft.png", tarfile.SYMTYPE), ("red_disc/hard.png", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    dataset = push(client, path)
    assert dataset.status == "succeeded"
    assert dataset.report is not None
    assert {refusal["path"] for refusal in dataset.report["refusals"]} == {"red_disc/soft.png", "red_disc/hard.png"}


def test_rows_without_a_label_are_refused_one_by_one(client: Client, tmp_path: Path) -> None:
    names = [path.replace("/", "-") for path in GOOD]
    rows = [f"{name},{name.split('-')[0]}" for name in names[1:]]
    archive = pictures.write_zip(tmp_path / "table.zip", csv("file_name,label", f"{names[0]},", *rows))
    dataset = push(client, archive)
    assert dataset.status == "succeeded"
    assert dataset.report is not None
    (refusal,) = dataset.report["refusals"]
    assert (refusal["path"], refusal["code"]) == (names[0], "label_missing")
    assert "metadata.csv, line 2" in refusal["message"]


# -- an upload that breaks off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sized", [True, False], ids=["content-length", "chunked"])
def test_an_upload_cut_off_in_the_middle_leaves_nothing(
    sized: bool, stack: Stack, client: Client, http: httpx.Client
) -> None:
    before = [dataset.id for dataset in client.datasets()]
    uploads = stack.state_dir / "store" / "uploads"
    stored = sorted(uploads.iterdir())
    refused = given_up(stack)
    request = httpx.Request(
        "POST",
        f"{stack.url}/v1/datasets",
        headers={"Authorization": f"Bearer {stack.api_key}"},
        data={"name": "cut", "domain": "simple shapes"},
        files={"file": ("cut.zip", damaged_zip() + bytes(3_000_000))},
    )
    body = request.read()
    half = body[: len(body) // 2]
    length = f"Content-Length: {len(body)}" if sized else "Transfer-Encoding: chunked"
    kept = ("host", "authorization", "content-type")
    lines = ["POST /v1/datasets HTTP/1.1", length, *(f"{k}: {v}" for k, v in request.headers.items() if k in kept)]
    with socket.create_connection((request.url.host, request.url.port), timeout=10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        connection.sendall(half if sized else f"{len(half):x}\r\n".encode() + half + b"\r\n")
    assert http.get("/healthz").status_code == 200
    until("the server has given the request up", lambda: given_up(stack) == refused + 1, 10)
    assert [dataset.id for dataset in client.datasets()] == before
    assert sorted(uploads.iterdir()) == stored


def given_up(stack: Stack) -> int:
    """Requests that the API ended with 400, by its log."""
    return (stack.state_dir / "logs" / "api.log").read_text().count('"status": 400')


# -- requests that make no sense ---------------------------------------------------------------------------------------


def problem(answer: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """The answer is an RFC 9457 problem that says what was wrong and, where that is a field, which one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["status"], body["code"]) == (status, code)
    assert len(body["detail"]) > 15
    if param is not None:
        assert body.get("param") == param


@dataclass
class Bad:
    path: str
    body: dict[str, Any]
    status: int
    code: str
    param: str | None = None
    named: str = ""


FLYP = {"type": "flyp", "hyperparameters": {}}
REQUESTS = {
    "caption: unknown data set": Bad("caption_jobs", {"dataset_id": "ds_none"}, 404, "not_found", "dataset_id"),
    "caption: no data set": Bad("caption_jobs", {}, 422, "invalid_request", "dataset_id"),
    "caption: unknown field": Bad(
        "caption_jobs", {"dataset_id": "SHAPES", "wrods": 5}, 422, "invalid_request", "wrods"
    ),
    "caption: words out of range": Bad(
        "caption_jobs", {"dataset_id": "SHAPES", "words": 1}, 422, "invalid_request", "words"
    ),
    "caption: unknown split": Bad(
        "caption_jobs", {"dataset_id": "SHAPES", "split": "all"}, 422, "invalid_request", "split"
    ),
    "train: unknown method": Bad(
        "fine_tuning/jobs", {"dataset_id": "SHAPES", "method": {"type": "magic"}}, 422, "unknown_method", named="mmft"
    ),
    "train: hyperparameter out of range": Bad(
        "fine_tuning/jobs",
        {"dataset_id": "SHAPES", "method": FLYP | {"hyperparameters": {"epochs": 0}}},
        422,
        "invalid_hyperparameter",
        "method.hyperparameters.epochs",
    ),
    "train: unknown hyperparameter": Bad(
        "fine_tuning/jobs",
        {"dataset_id": "SHAPES", "method": FLYP | {"hyperparameters": {"lr": 1}}},
        422,
        "invalid_hyperparameter",
        "method.hyperparameters.lr",
        "learning_rate",
    ),
    "train: captions missing": Bad(
        "fine_tuning/jobs",
        {"dataset_id": "SHAPES", "method": {"type": "mmft"}},
        422,
        "captions_missing",
        "caption_job_id",
    ),
    "train: captions unused": Bad(
        "fine_tuning/jobs",
        {"dataset_id": "SHAPES", "method": FLYP, "caption_job_id": "CAPTIONS"},
        422,
        "captions_unused",
        "caption_job_id",
    ),
    "train: unknown caption job": Bad(
        "fine_tuning/jobs",
        {"dataset_id": "SHAPES", "method": {"type": "mmft"}, "caption_job_id": "cap_none"},
        404,
        "not_found",
    ),
    "train: no shots for few-shot validation": Bad(
        "fine_tuning/jobs",
        {"dataset_id": "SHAPES", "method": FLYP, "validation": "few_shot"},
        422,
        "shots_missing",
        "shots",
    ),
    "train: shots out of range": Bad(
        "fine_tuning/jobs", {"dataset_id": "SHAPES", "method": FLYP, "shots": 0}, 422, "invalid_request", "shots"
    ),
    "evaluate: unknown classifier": Bad(
        "evaluations", {"classifier_id": "clf_none"}, 404, "not_found", "classifier_id"
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_senseless_request_is_refused(name: str, http: httpx.Client, shapes: Dataset, captions: CaptionJob) -> None:
    bad = REQUESTS[name]
    text = json.dumps(bad.body).replace("SHAPES", shapes.id).replace("CAPTIONS", captions.id)
    answer = http.post(f"/v1/{bad.path}", content=text, headers={"Content-Type": "application/json"})
    problem(answer, bad.status, bad.code, bad.param)
    assert bad.named in answer.json()["detail"]


def test_bad_json_is_refused(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    problem(http.post("/v1/caption_jobs", content=b'{"dataset_id": ', headers=headers), 422, "invalid_request")
    problem(http.post("/v1/caption_jobs", content=b"\xff\xfe\x00", headers=headers), 400, "unreadable_body")


@pytest.mark.parametrize(
    "path",
    ["datasets/ds_none", "caption_jobs/cap_none", "fine_tuning/jobs/ft_none", "evaluations/eval_none",
     "classifiers/clf_none", "images/img_none/content", "nothing/here"],
)  # fmt: skip
def test_unknown_ids_are_not_found(path: str, http: httpx.Client) -> None:
    problem(http.get(f"/v1/{path}"), 404, "not_found")


def test_an_unknown_metric_is_refused_and_the_known_ones_named(http: httpx.Client, shapes: Dataset) -> None:
    answer = http.get("/v1/leaderboard", params={"dataset_id": shapes.id, "metric": "best"})
    problem(answer, 422, "unknown_metric", "metric")
    assert "macro_f1" in answer.json()["detail"]


def test_every_scope_may_do_its_own_and_no_more(stack: Stack, client: Client, shapes: Dataset) -> None:
    reader = client.create_key(owner="local", name="reader", scopes=["read"])
    stranger = client.create_key(owner="somebody", name="stranger", scopes=["read", "write"])
    nobody = httpx.Client(base_url=stack.url)
    problem(nobody.get("/v1/datasets"), 401, "unauthorized")
    problem(nobody.get("/v1/datasets", headers={"Authorization": "Bearer ck_wrong"}), 401, "unauthorized")
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {reader.key}"}) as reading:
        assert reading.get(f"/v1/datasets/{shapes.id}").status_code == 200
        problem(reading.post("/v1/caption_jobs", json={"dataset_id": shapes.id}), 403, "missing_scope")
        problem(reading.get("/v1/keys"), 403, "missing_scope")
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {stranger.key}"}) as other:
        assert other.get("/v1/datasets").json()["data"] == []
        problem(other.get(f"/v1/datasets/{shapes.id}"), 404, "not_found")
        problem(other.post("/v1/caption_jobs", json={"dataset_id": shapes.id}), 404, "not_found")
        problem(other.delete(f"/v1/datasets/{shapes.id}"), 404, "not_found")
        client.revoke_key(stranger.id)
        problem(other.get("/v1/datasets"), 401, "unauthorized")
    nobody.close()


# -- what only shows when the job runs ---------------------------------------------------------------------------------


def test_an_unknown_engine_is_refused_with_the_known_ones(client: Client, shapes: Dataset) -> None:
    with pytest.raises(CaptuneAPIError, match="attributes, remote, tiny") as refused:
        client.caption(dataset_id=shapes.id, engine="gpt-9")
    assert (refused.value.status, refused.value.code, refused.value.param) == (422, "unknown_engine", "engine")


@pytest.mark.parametrize(
    ("model", "code"),
    [("no-such-model", "unknown_model"), ("ViT-B-32/no-such-weights", "unknown_model"), ("/etc", "model_not_allowed")],
)
def test_a_model_that_cannot_be_loaded_fails_the_job(model: str, code: str, client: Client, shapes: Dataset) -> None:
    job = finished(client, client.train(model=model, dataset_id=shapes.id, method={"type": "zero_shot"}))
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == (code, "model")
    assert model.partition("/")[0] in job.error.message


def test_more_shots_than_a_class_has_runs_with_fewer_and_says_so(
    client: Client, http: httpx.Client, models: Path, shapes: Dataset
) -> None:
    method = {"type": "flyp", "hyperparameters": {"epochs": 1, "batch_size": 8}}
    job = client.train(model=str(models / "clip"), dataset_id=shapes.id, method=method, shots=100)
    job = succeeded(client, job)
    assert job.result is not None
    assert job.result["fewer_shots"] == {"blue_bar": 8, "green_box": 8, "red_disc": 8}
    events = http.get(f"/v1/fine_tuning/jobs/{job.id}/events").json()["data"]
    (warning,) = [event for event in events if event["type"] == "warning.fewer_shots"]
    assert warning["level"] == "warning"
    assert "red_disc (8)" in warning["message"]


def test_captions_of_another_split_are_refused(client: Client, models: Path, shapes: Dataset) -> None:
    job = succeeded(client, client.caption(dataset_id=shapes.id, split="val", characteristics=["color"]))
    with pytest.raises(CaptuneAPIError) as refused:
        client.train(model=str(models / "clip"), dataset_id=shapes.id, caption_job_id=job.id)
    assert (refused.value.status, refused.value.code) == (422, "captions_of_another_split")


def test_images_without_captions_are_told(client: Client, http: httpx.Client, models: Path, shapes: Dataset) -> None:
    few = succeeded(client, client.caption(dataset_id=shapes.id, shots=2, characteristics=["color"]))
    method = {"type": "mmft", "hyperparameters": {"epochs": 1, "batch_size": 8}}
    request = {"model": str(models / "clip"), "dataset_id": shapes.id, "method": method, "shots": 4}
    job = succeeded(client, client.train(**request, caption_job_id=few.id))
    events = http.get(f"/v1/fine_tuning/jobs/{job.id}/events").json()["data"]
    (warning,) = [event for event in events if event["type"] == "warning.images_without_caption"]
    assert "6 of 12" in warning["message"]


def test_a_data_set_in_use_is_not_deleted(client: Client, models: Path, tmp_path: Path) -> None:
    dataset = succeeded(
        client, client.push(pictures.write_zip(tmp_path / "used.zip", GOOD), name="used", domain="simple shapes")
    )
    method = {"type": "flyp", "hyperparameters": {"epochs": 200, "batch_size": 2}}
    job = client.train(model=str(models / "clip"), dataset_id=dataset.id, method=method, validation="none")
    with pytest.raises(CaptuneAPIError) as refused:
        client.delete_dataset(dataset.id)
    assert (refused.value.status, refused.value.code) == (409, "in_use")
    assert job.id in str(refused.value)
    client.cancel(job.id)
    until("no job uses it any more", lambda: deleted(client, dataset.id), 30)  # the baselines are made and scored
    with pytest.raises(CaptuneAPIError) as gone:
        client.job(dataset.id)
    assert gone.value.status == 404


def deleted(client: Client, dataset_id: str) -> bool:
    try:
        client.delete_dataset(dataset_id)
    except CaptuneAPIError as error:
        if error.code != "in_use":
            raise
        return False
    return True
