"""Classifiers over the API: predictions, downloads, imports."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image as Picture
from safetensors.torch import load_file, save_file

from captune import Client
from shared.classifier.card import sha256_file
from shared.classifier.folder import load_classifier
from shared.clip.loading import preprocess_uint8
from shared.datasets.images import decode
from shared.db.models import Classifier
from tests.integration.evaluations import Lab, write_folder
from tests.integration.factories import FINGERPRINT, add_dataset, png

Files = list[tuple[str, tuple[str, bytes, str]]]


@pytest.fixture
def dataset_id(lab: Lab) -> str:
    id = add_dataset(lab.core)
    lab.add_pictures(id, "test", 9)
    lab.add_pictures(id, "val", 4, first=9)
    return id


@pytest.fixture
def anna(lab: Lab) -> TestClient:
    return lab.client("anna", "read", "write")


def pictures(count: int) -> Files:
    return [("images", (f"{i}.png", png(20 * i), "image/png")) for i in range(count)]


def expected(lab: Lab, id: str, files: Files) -> torch.Tensor:
    classifier = lab.loaded(storage_key(lab, id))
    pixels = torch.stack([preprocess_uint8(decode(data), classifier.clip) for _, (_, data, _) in files])
    return classifier.logits(pixels).double().softmax(1)


def storage_key(lab: Lab, id: str) -> str:
    with lab.core.transaction() as session:
        return session.get_one(Classifier, id).storage_key


# -- predictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["base", "projection", "own"])
def test_classes_with_their_probabilities(lab: Lab, anna: TestClient, dataset_id: str, weights: str) -> None:
    id, files = lab.add_classifier(dataset_id, weights=weights), pictures(5)
    answer = anna.post(f"/v1/classifiers/{id}/predict", files=files)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["object"], body["classifier_id"]) == ("predictions", id)
    for i, (each, row) in enumerate(zip(body["data"], expected(lab, id, files), strict=True)):
        assert each["file"] == f"{i}.png"
        found = {c["class_name"]: c["probability"] for c in each["classes"]}
        assert found == pytest.approx(dict(zip(("cat", "dog"), row.tolist(), strict=True)), abs=1e-4)
        assert [c["probability"] for c in each["classes"]] == sorted(found.values(), reverse=True)
        assert each["class_name"] == each["classes"][0]["class_name"] == each["classes"][0]["display_name"]
        assert each["probability"] == each["classes"][0]["probability"]


def test_only_so_many_classes_are_told(lab: Lab, anna: TestClient, dataset_id: str) -> None:
    id = lab.add_classifier(dataset_id)
    (one,) = anna.post(f"/v1/classifiers/{id}/predict?top_k=1", files=pictures(1)).json()["data"]
    assert len(one["classes"]) == 1
    assert anna.post(f"/v1/classifiers/{id}/predict?top_k=0", files=pictures(1)).status_code == 422


def test_who_may_ask(lab: Lab, dataset_id: str) -> None:
    url = f"/v1/classifiers/{lab.add_classifier(dataset_id)}/predict"
    assert lab.client("anna", "read").post(url, files=pictures(1)).status_code == 200
    assert lab.client("root", "admin").post(url, files=pictures(1)).status_code == 200
    answer = lab.client("ben", "read", "write").post(url, files=pictures(1))
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    nobody = lab.client("anna")
    assert nobody.post(url, files=pictures(1)).status_code == 403
    assert lab.client("anna", "read").post("/v1/classifiers/clf_no/predict", files=pictures(1)).status_code == 404


def test_what_is_no_form_of_pictures_is_refused(
    lab: Lab, anna: TestClient, dataset_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"/v1/classifiers/{lab.add_classifier(dataset_id)}/predict"
    monkeypatch.setattr(anna.app.state, "evaluator_settings", None, raising=False)
    del anna.app.state.evaluator_settings
    monkeypatch.setenv("CAPTUNE_PREDICT_FILES", "3")
    monkeypatch.setenv("CAPTUNE_PREDICT_BYTES", "5000")
    text = ("images", ("notes.txt", b"not a picture", "text/plain"))
    cut = ("images", ("cut.png", png()[:40], "image/png"))
    big = io.BytesIO()
    Picture.effect_noise((100, 100), 90).save(big, "PNG")
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"files": [*pictures(1), text]}, 422, "unsupported_format"),
        ({"files": [cut]}, 422, "unreadable_image"),
        ({"files": [("images", ("empty.png", b"", "image/png"))]}, 422, "empty_file"),
        ({"files": [("pictures", ("a.png", png(), "image/png"))]}, 422, "no_images"),
        ({"json": {}}, 422, "no_images"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 422, "unreadable_form"),
        ({"files": pictures(1), "data": {"dataset": "x"}}, 422, "unreadable_form"),
        ({"files": pictures(4)}, 413, "too_many_images"),
        ({"files": pictures(9)}, 422, "unreadable_form"),
        ({"files": [("images", ("big.png", big.getvalue(), "image/png"))]}, 413, "too_many_images"),
    ]
    for request, status, code in cases:
        answer = anna.post(url, **request)
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
        assert answer.json()["param"] == "images"
    named = anna.post(url, files=[*pictures(1), text]).json()["detail"]
    assert named.startswith("the image 'notes.txt': ")
    assert anna.post(url, files=pictures(3)).status_code == 200  # and it goes on


def test_a_classifier_that_was_deleted_or_spoilt(lab: Lab, anna: TestClient, dataset_id: str) -> None:
    id = lab.add_classifier(dataset_id)
    with lab.core.store.local_folder(storage_key(lab, id)) as folder:
        head = (folder / "head.safetensors").read_bytes()
        (folder / "head.safetensors").write_bytes(head[:-1])
    answer = anna.post(f"/v1/classifiers/{id}/predict", files=pictures(1))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_classifier")
    with lab.core.store.local_folder(storage_key(lab, id)) as folder:
        (folder / "head.safetensors").write_bytes(head)
    assert anna.post(f"/v1/classifiers/{id}/predict", files=pictures(1)).status_code == 200  # the failure is not kept
    with lab.core.transaction() as session:
        session.delete(session.get_one(Classifier, id))
    assert anna.post(f"/v1/classifiers/{id}/predict", files=pictures(1)).status_code == 404  # warm as it may be


# -- downloads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["base", "projection", "own"])
def test_a_download_stands_alone(lab: Lab, anna: TestClient, dataset_id: str, weights: str, tmp_path: Path) -> None:
    id = lab.add_classifier(dataset_id, weights=weights)
    answer = anna.get(f"/v1/classifiers/{id}/download")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        assert packed.testzip() is None
        packed.extractall(tmp_path / "out")
    pixels, _, _ = lab.pixels(dataset_id, "test")
    loaded = load_classifier(tmp_path / "out")
    torch.testing.assert_close(loaded.logits(pixels), lab.loaded(storage_key(lab, id)).logits(pixels))
    assert loaded.card.class_names == ["cat", "dog"]
    assert anna.get(f"/v1/classifiers/{id}/download").content == answer.content
    assert lab.client("ben", "read").get(f"/v1/classifiers/{id}/download").status_code == 404


def test_its_readme_is_what_it_takes(lab: Lab, anna: TestClient, dataset_id: str, tmp_path: Path) -> None:
    """The README's own lines, run in a process that knows nothing of Captune."""
    id, files = lab.add_classifier(dataset_id, weights="projection"), pictures(1)
    with zipfile.ZipFile(io.BytesIO(anna.get(f"/v1/classifiers/{id}/download").content)) as packed:
        packed.extractall(tmp_path)
    (tmp_path / "picture.jpg").write_bytes(files[0][1][1])
    code = "\n".join(
        line.removeprefix("    ")
        for line in (tmp_path / "README.md").read_text().splitlines()
        if line.startswith("    ")
    )
    code += "\nimport sys; assert not {'shared', 'captune', 'services'} & {m.split('.')[0] for m in sys.modules}"
    code += "\nprint(json.dumps(probabilities.tolist()))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    name, probabilities = done.stdout.splitlines()[-2:]
    row = expected(lab, id, files)[0]
    assert json.loads(probabilities) == pytest.approx(row.tolist(), abs=1e-4)
    assert name == ("cat", "dog")[int(row.argmax())]


# -- imports -----------------------------------------------------------------------------------------------------------


def zipped(folder: Path, under: str = "") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for path in sorted(folder.iterdir()):
            packed.write(path, f"{under}{path.name}")
    return out.getvalue()


def post_import(client: TestClient, data: bytes, dataset_id: str, name: str = "elsewhere", **headers: str) -> Any:
    return client.post(
        "/v1/classifiers/import",
        files={"file": ("c.zip", data, "application/zip")},
        data={"dataset_id": dataset_id, "name": name},
        headers=headers,
    )


def test_a_download_comes_back_as_a_classifier_that_scores_the_same(
    lab: Lab, anna: TestClient, dataset_id: str
) -> None:
    id = lab.add_classifier(dataset_id, weights="projection")
    data = anna.get(f"/v1/classifiers/{id}/download").content
    answer = post_import(anna, data, dataset_id)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert answer.headers["location"] == f"/v1/classifiers/{made['id']}"
    assert (made["job_id"], made["dataset_id"], made["suffix"], made["tags"]) == (
        None,
        dataset_id,
        "elsewhere",
        ["imported"],
    )
    assert (made["method"], made["shots"], made["shot_seed"], made["seed"], made["protocol"]) == (
        "flyp",
        2,
        5,
        4,
        "full",
    )
    assert made["data_fingerprint"] == FINGERPRINT
    assert anna.get(f"/v1/classifiers/{made['id']}").json() == made
    scores = [(lab.evaluate(dataset_id, classifier_id=each).result or {})["scores"] for each in (id, made["id"])]
    for metric in ("top1", "nll", "brier", "ece_scaled"):
        assert scores[0][metric] == pytest.approx(scores[1][metric], abs=1e-5)
    predicted = anna.post(f"/v1/classifiers/{made['id']}/predict", files=pictures(2))
    assert predicted.status_code == 200
    assert lab.client("ben", "read").get(f"/v1/classifiers/{made['id']}").status_code == 404


def test_an_import_can_be_downloaded_and_imported_again(lab: Lab, anna: TestClient, dataset_id: str) -> None:
    data = anna.get(f"/v1/classifiers/{lab.add_classifier(dataset_id, weights='own')}/download").content
    for _ in range(2):
        made = post_import(anna, data, dataset_id)
        assert made.status_code == 201, made.text
        data = anna.get(f"/v1/classifiers/{made.json()['id']}/download").content
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            assert len(packed.namelist()) == len(set(packed.namelist()))


def test_weights_that_are_not_finite_are_told_of(lab: Lab, anna: TestClient, dataset_id: str, tmp_path: Path) -> None:
    write_folder(tmp_path, lab.clip, "own")
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    weights["visual.proj"].fill_(torch.nan)
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    vouch(tmp_path, "open_clip_model.safetensors")
    id = post_import(anna, zipped(tmp_path), dataset_id).json()["id"]
    answer = anna.post(f"/v1/classifiers/{id}/predict", files=pictures(1))
    assert (answer.status_code, answer.json()["code"]) == (422, "logits_not_finite")


def test_an_imported_classifier_is_not_taken_for_the_bare_model(
    lab: Lab, anna: TestClient, dataset_id: str, tmp_path: Path
) -> None:
    card = write_folder(tmp_path, lab.clip).model_copy(update={"method": "zero_shot", "hyperparameters": {}})
    (tmp_path / "captune.json").write_text(card.model_dump_json())
    imported = post_import(anna, zipped(tmp_path), dataset_id).json()["id"]
    scored = lab.evaluate(dataset_id, model="tiny")
    assert (scored.result or {})["classifier_id"] != imported


def test_a_head_on_a_model_that_is_here(lab: Lab, anna: TestClient, dataset_id: str, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write_folder(tmp_path / "c", lab.clip)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as packed:
        packed.add(tmp_path / "c", "classifier")
    answer = post_import(anna, out.getvalue(), dataset_id)
    assert answer.status_code == 201, answer.text
    assert lab.evaluate(dataset_id, classifier_id=answer.json()["id"]).status == "succeeded"


def test_a_repeated_import_makes_one(lab: Lab, anna: TestClient, dataset_id: str, tmp_path: Path) -> None:
    write_folder(tmp_path, lab.clip)
    key = {"Idempotency-Key": "k1"}
    first, again = (post_import(anna, zipped(tmp_path), dataset_id, **key).json() for _ in range(2))
    assert first["id"] == again["id"]
    assert post_import(anna, zipped(tmp_path), dataset_id, "another", **key).json()["code"] == "idempotency_key_reused"


def pickled(folder: Path) -> None:
    torch.save({"visual.proj": torch.zeros(2)}, folder / "open_clip_model.safetensors")
    vouch(folder, "open_clip_model.safetensors")


def vouch(folder: Path, name: str) -> None:
    card = json.loads((folder / "captune.json").read_text())
    card["sha256"][name] = sha256_file(folder / name)
    (folder / "captune.json").write_text(json.dumps(card))


def config_with(part: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"][part] |= changes
        (folder / "open_clip_config.json").write_text(json.dumps(config))

    return spoil


def truncated(folder: Path) -> None:
    path = folder / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (pickled, "bad_classifier", "pickles are never loaded"),
        (truncated, "bad_classifier", "truncated or was altered"),
        (lambda f: (f / "model.bin").write_bytes(b"x"), "bad_classifier", "'model.bin', which is no file"),
        (lambda f: (f / "evil.py").write_text("1"), "bad_classifier", "'evil.py'"),
        (lambda f: (f / "captune.json").unlink(), "bad_classifier", "is this a classifier's folder"),
        (lambda f: (f / "head.safetensors").unlink(), "bad_classifier", "is missing"),
        (lambda f: (f / "open_clip_config.json").write_text("[]"), "bad_classifier", "not a JSON object"),
        (config_with("vision_cfg", timm_model_name="hf-hub:some/model"), "bad_classifier", "to be fetched"),
        (config_with("vision_cfg", timm_model_name="x", timm_model_pretrained=True), "bad_classifier", "to be fetched"),
        (config_with("text_cfg", hf_model_name="some/model"), "bad_classifier", "config.json is not in the archive"),
        (config_with("text_cfg", hf_tokenizer_name="some/model"), "bad_classifier", "tokenizer.json is not in"),
        (lambda f: (f / "config.json").write_text('{"auto_map": {}}'), "bad_classifier", "never run"),
        (config_with("vision_cfg", layers=1), "bad_model", "can't be loaded"),
        (config_with("vision_cfg", layers=10**9), "bad_classifier", "more layers than the weights have"),
        (config_with("text_cfg", vocab_size=10**9), "bad_classifier", "numbers; the weights have"),
        (lambda f: (f / "captune.json").write_text("[" * 200_000), "bad_classifier", "is not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 200_000), "bad_classifier", "is not JSON"),
    ],
)
def test_a_spoilt_import_is_refused_with_a_reason(
    lab: Lab, anna: TestClient, dataset_id: str, tmp_path: Path, spoil: Callable[[Path], Any], code: str, message: str
) -> None:
    write_folder(tmp_path, lab.clip, "own")
    spoil(tmp_path)
    answer = post_import(anna, zipped(tmp_path), dataset_id)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert message in answer.json()["detail"]
    assert anna.get("/v1/classifiers").json()["data"] == []


def test_archives_that_are_none_or_reach_out(lab: Lab, anna: TestClient, dataset_id: str, tmp_path: Path) -> None:
    write_folder(tmp_path, lab.clip)
    escaping, scattered, bomb, long = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(escaping, "w") as packed:
        packed.writestr("../../captune.json", "{}")
    with zipfile.ZipFile(scattered, "w") as packed:
        packed.write(tmp_path / "captune.json", "a/captune.json")
        packed.write(tmp_path / "head.safetensors", "b/head.safetensors")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("head.safetensors", b"0" * (80 * 2**20))
    with zipfile.ZipFile(long, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("captune.json", b"0" * (80 * 2**20))
    cases = [
        (b"", "empty_file"),
        (b"no archive at all" * 100, "unsupported_archive"),
        (zipped(tmp_path)[:-40], "truncated_archive"),
        (escaping.getvalue(), "bad_classifier"),
        (scattered.getvalue(), "bad_classifier"),
        (bomb.getvalue(), "archive_bomb"),
        (long.getvalue(), "bad_classifier"),
    ]
    for data, code in cases:
        answer = post_import(anna, data, dataset_id)
        assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text


def test_other_classes_and_other_owners(lab: Lab, anna: TestClient, dataset_id: str, tmp_path: Path) -> None:
    write_folder(tmp_path, lab.clip, classes=["cat", "wolf"])
    answer = post_import(anna, zipped(tmp_path), dataset_id)
    assert (answer.status_code, answer.json()["code"]) == (422, "class_lists_differ")
    assert "class 2: 'wolf' and 'dog'" in answer.json()["detail"]
    bens = add_dataset(lab.core, "ben")
    assert post_import(anna, zipped(tmp_path), bens).json()["code"] == "not_found"
    reader = lab.client("anna", "read")
    assert post_import(reader, zipped(tmp_path), dataset_id).status_code == 403


# -- the client --------------------------------------------------------------------------------------------------------


@pytest.fixture
def captune(anna: TestClient) -> Client:
    connected = Client("http://testserver", "key")
    connected._http = anna  # type: ignore[assignment]  # an httpx client that talks to the app
    return connected


def test_the_client_predicts_downloads_imports_and_scores(
    lab: Lab, captune: Client, dataset_id: str, tmp_path: Path
) -> None:
    id = lab.add_classifier(dataset_id, weights="projection")
    paths = []
    for i in range(40):  # more than one request
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(png(6 * i))
    found = list(captune.predict(id, paths, top_k=1))
    assert [each.file for each in found] == [str(path) for path in paths]
    assert {len(each.classes) for each in found} == {1}

    folder = captune.download_classifier(id, tmp_path / "got" / "folder")
    assert {"captune.json", "head.safetensors", "README.md"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "classifier.zip").exists()
    with pytest.raises(FileExistsError):
        captune.download_classifier(id, folder)
    packed = captune.download_classifier(id, tmp_path / "c.zip")
    assert zipfile.is_zipfile(packed)
    for source in (folder, packed):
        made = captune.import_classifier(source, dataset_id=dataset_id, name="back")
        assert made.suffix == "back"
    job = captune.evaluate(made.id, split="val")
    lab.run(job.id)
    scored = captune.rescore(job.id)
    assert scored.scores is not None
    assert captune.save_predictions(job.id, tmp_path / "p.parquet").stat().st_size > 0
    bare = captune.evaluate(model="tiny", dataset_id=dataset_id)
    assert (bare.model, bare.classifier_id) == ("tiny", None)
