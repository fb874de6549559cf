"""The main job: labelled pictures go in over HTTP; captions, checkpoints and a leaderboard come out."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from captune import Client
from services.embedded.stack import Stack
from shared.schemas.captions import CaptionJob
from shared.schemas.datasets import Dataset
from shared.schemas.evaluations import Evaluation
from shared.schemas.fine_tuning import FineTuningJob
from tests.e2e import pictures
from tests.e2e.waiting import succeeded

pytestmark = pytest.mark.timeout(120)
SEEDS = (0, 1)
SEED = 41  # of the captions: other tests caption pictures with the same bytes, and answers are shared
HYPERPARAMETERS = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def shapes(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set of these tests alone: they count what is made from it."""
    folder = pictures.write_folder(tmp_path_factory.mktemp("own"), pictures.by_split(8, 2, 4))
    return succeeded(client, client.push(folder, name="own", domain="simple shapes"))


@pytest.fixture(scope="module")
def captions(client: Client, shapes: Dataset) -> CaptionJob:
    return succeeded(client, client.caption(dataset_id=shapes.id, words=12, seed=SEED))


def with_metadata(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same pictures without folders, their labels and splits in a metadata.csv."""
    flat = {path.replace("/", "-"): (path.split("/"), data) for path, data in files.items()}
    rows = [f"{name},{parts[-2]},{parts[0]}" for name, (parts, _) in flat.items()]
    table = "\n".join(["file_name,label,split", *rows]).encode()
    return {"metadata.csv": table} | {name: data for name, (_, data) in flat.items()}


PACKED: dict[str, Callable[[Path, Mapping[str, bytes]], Path]] = {
    "folder": lambda at, files: pictures.write_folder(at / "data", files),
    "zip": lambda at, files: pictures.write_zip(at / "data.zip", files),
    "tar": lambda at, files: pictures.write_tar(at / "data.tar", files, "w"),
    "tar.gz": lambda at, files: pictures.write_tar(at / "data.tar.gz", files),
    "tar.bz2": lambda at, files: pictures.write_tar(at / "data.tar.bz2", files, "w:bz2"),
    "tar.xz": lambda at, files: pictures.write_tar(at / "data.tar.xz", files, "w:xz"),
    "metadata.csv": lambda at, files: pictures.write_zip(at / "data.zip", with_metadata(files)),
}


@pytest.mark.parametrize("form", PACKED)
def test_every_form_of_upload_gives_the_same_images(form: str, client: Client, tmp_path: Path) -> None:
    source = PACKED[form](tmp_path, pictures.by_split(3, 1, 2))
    dataset = succeeded(client, client.push(source, name=form, domain="simple shapes"))
    assert dataset.counts == {split: dict.fromkeys(sorted(pictures.CLASSES), n) for split, n in SPLIT_SIZES.items()}
    assert [c.display_name for c in dataset.classes or ()] == ["blue bar", "green box", "red disc"]
    images = list(client.images(dataset.id))
    assert len(images) == 18
    assert {(i.width, i.height, i.media_type) for i in images} == {(32, 32, "image/png")}


SPLIT_SIZES = {"train": 3, "val": 1, "test": 2}


def test_missing_splits_are_drawn_from_the_recorded_seed(client: Client, tmp_path: Path) -> None:
    archive = pictures.write_zip(tmp_path / "data.zip", pictures.by_class(10))
    fields: dict[str, Any] = {"name": "drawn", "domain": "simple shapes", "val_fraction": 0.1, "test_fraction": 0.3}
    drawn = {}
    for label, seed in (("first", 1), ("again", 1), ("other", 2)):
        dataset = succeeded(client, client.push(archive, **fields, split_seed=seed))
        assert dataset.split_seed == seed
        assert dataset.counts == {
            split: dict.fromkeys(sorted(pictures.CLASSES), n) for split, n in (("train", 6), ("val", 1), ("test", 3))
        }
        drawn[label] = {image.path: image.split for image in client.images(dataset.id)}
    assert drawn["first"] == drawn["again"] != drawn["other"]


def test_stored_pictures_come_back_byte_for_byte(client: Client, http: httpx.Client, shapes: Dataset) -> None:
    first = next(client.images(shapes.id, split="train", class_name="red_disc"))
    answer = http.get(f"/v1/images/{first.id}/content")
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == pictures.png("red_disc", int(Path(first.path).stem))


def test_captions_say_how_they_were_made(client: Client, shapes: Dataset, captions: CaptionJob) -> None:
    found = list(client.captions(shapes.id, caption_job_id=captions.id))
    train = {image.id: image for image in client.images(shapes.id, split="train")}
    asked = {(image_id, c) for image_id in train for c in ("visual", "shape", "texture")}
    assert {(caption.image_id, caption.characteristic) for caption in found} == asked
    assert len(found) == len(asked) == 72
    assert captions.result is not None
    assert (captions.result["captions"], captions.result["written"], captions.result["reused"]) == (72, 72, 0)
    for caption in found:
        assert caption.class_name == train[caption.image_id].class_name
        made = caption.provenance
        assert made["job_id"] == captions.id
        assert made["engine"] == "attributes"
        assert made["revision"] == captions.result["captioner"]["revision"]
        assert caption.characteristic in made["prompt"]
        assert caption.class_name.replace("_", " ") in made["prompt"]
        assert "simple shapes" in made["prompt"]
        assert caption.text
        assert made["raw"]
    colours = {word for c in found for word in ("red", "green", "blue") if word in c.provenance["raw"].lower()}
    assert colours == {"red", "green", "blue"}


def chat_calls(http: httpx.Client) -> float:
    """Chat completions the captioner has answered, from its metrics."""
    lines = http.get("/metrics").text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("captune_request_seconds_count") and 'route="/v1/chat/completions"' in line
    )


def test_a_second_identical_caption_job_asks_no_model(
    client: Client, http: httpx.Client, shapes: Dataset, captions: CaptionJob
) -> None:
    before = chat_calls(http)
    again = succeeded(client, client.caption(dataset_id=shapes.id, words=12, seed=SEED))
    assert again.id != captions.id
    assert again.result is not None
    assert (again.result["captions"], again.result["written"], again.result["reused"]) == (72, 0, 72)
    assert chat_calls(http) == before
    ids = [sorted(c.id for c in client.captions(shapes.id, caption_job_id=job.id)) for job in (captions, again)]
    assert ids[0] == ids[1]
    other = succeeded(client, client.caption(dataset_id=shapes.id, words=12, shots=1, seed=SEED + 1))
    assert other.result is not None
    assert other.result["written"] == 9
    assert chat_calls(http) == before + 9  # so the counter does count


def test_a_quantized_multimodal_llm_captions(client: Client, shapes: Dataset) -> None:
    request = {"dataset_id": shapes.id, "engine": "tiny", "characteristics": ["visual"], "words": 5, "shots": 2}
    job = succeeded(client, client.caption(**request))
    assert job.result is not None
    assert (job.result["captions"], job.result["captioner"]["precision"]) == (6, "nf4")
    for caption in client.captions(shapes.id, caption_job_id=job.id):
        assert caption.provenance["engine"] == "tiny"
        assert caption.provenance["completion_tokens"] > 0
        assert caption.provenance["prompt_tokens"] > 10


@pytest.fixture(scope="module")
def trained(client: Client, models: Path, shapes: Dataset, captions: CaptionJob) -> dict[str, list[FineTuningJob]]:
    """Runs by method, a seed each."""
    submitted = {
        method: [
            client.train(
                model=str(models / "clip"),
                dataset_id=shapes.id,
                caption_job_id=captions.id if method == "mmft" else None,
                method={"type": method, "hyperparameters": HYPERPARAMETERS},
                shots=4,
                seed=seed,
            )
            for seed in SEEDS
        ]
        for method in ("mmft", "flyp")
    }
    return {method: [succeeded(client, job) for job in jobs] for method, jobs in submitted.items()}


def test_the_leaderboard_ranks_every_method_over_its_seeds(
    client: Client, http: httpx.Client, shapes: Dataset, trained: dict[str, list[FineTuningJob]]
) -> None:
    evaluations = [succeeded(client, job) for job in client.jobs("eval", dataset_id=shapes.id)]
    assert len(evaluations) == 6, "four runs and two baselines"
    board = client.leaderboard(shapes.id)
    rows = {row.method: row for row in board.rows}
    assert sorted(rows) == ["flyp", "mmft", "zero_shot", "zero_shot_ensemble"]
    assert len(board.rows) == 4, "a run's seeds share a row"
    for method, runs in trained.items():
        row = rows[method]
        scores = [scores_of(client, run)["top1"] for run in runs]
        assert row.n == len(SEEDS)
        assert row.mean == pytest.approx(statistics.fmean(scores))
        assert row.stderr == pytest.approx(statistics.stdev(scores) / math.sqrt(len(scores)))
        assert row.few_seeds
        assert {"top1", "top5", "macro_f1", "ece", "nll", "train_seconds"} <= set(row.metrics)
        assert sorted(row.classifier_ids) == sorted(str(run.fine_tuned_model) for run in runs)
    assert rows["zero_shot"].n == 1
    assert rows["zero_shot"].stderr is None
    ranked = sorted(board.rows, key=lambda row: row.rank)
    assert [row.mean for row in ranked] == sorted((row.mean for row in board.rows), reverse=True)
    as_csv = http.get("/v1/leaderboard", params={"dataset_id": shapes.id, "format": "csv"})
    assert as_csv.headers["content-type"].startswith("text/csv")
    assert len(as_csv.text.splitlines()) == 5
    by_nll = client.leaderboard(shapes.id, metric="nll")
    assert min(by_nll.rows, key=lambda row: row.rank).mean == min(row.mean for row in by_nll.rows)


def scores_of(client: Client, run: FineTuningJob) -> dict[str, float]:
    evaluation = client.job(str(run.evaluation_id))
    assert isinstance(evaluation, Evaluation)
    assert evaluation.classifier_id == run.fine_tuned_model
    assert evaluation.scores is not None
    return evaluation.scores


def test_a_run_shows_its_epochs_and_its_checkpoint(
    client: Client, http: httpx.Client, trained: dict[str, list[FineTuningJob]]
) -> None:
    run = trained["mmft"][0]
    events = http.get(f"/v1/fine_tuning/jobs/{run.id}/events").json()["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    epochs = [event["data"]["epoch"] for event in events if event["type"] == "training.epoch"]
    assert epochs == [1, 2]
    assert [checkpoint.kind for checkpoint in client.checkpoints(run.id)] == ["best"]
    assert run.result is not None
    assert run.result["steps"] == 4, "12 images in batches of at most 8, twice"
    left_out = run.result["captions_left_out"]
    assert run.result["captions_used"] + sum(left_out.values()) == 36
    assert set(left_out) <= {"duplicate", "duplicate_other_class"}, "such plain pictures are described alike"


LOAD = """
import json, sys
import open_clip, torch
from safetensors.torch import load_file
folder = sys.argv[1]
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(sys.argv[2:])
with torch.no_grad():
    prototypes = model.eval().encode_text(tokens, normalize=True)
saved = torch.nn.functional.normalize(load_file(f"{folder}/head.safetensors")["weight"], dim=-1)
print(json.dumps({
    "difference": (prototypes - saved).abs().max().item(),
    "size": preprocess.transforms[0].size,
    "captune": sorted({name.split(".")[0] for name in sys.modules} & {"captune", "shared", "services"}),
}))
"""


def test_a_checkpoint_loads_with_open_clip_alone(
    stack: Stack, client: Client, shapes: Dataset, trained: dict[str, list[FineTuningJob]], tmp_path: Path
) -> None:
    run = trained["flyp"][0]
    classifier = next(c for c in client.classifiers(dataset_id=shapes.id) if c.id == run.fine_tuned_model)
    folder = stack.state_dir / "store" / classifier.storage_key
    texts = ["a photo of a blue bar.", "a photo of a green box.", "a photo of a red disc."]
    command = [sys.executable, "-I", "-c", LOAD, str(folder), *texts]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["captune"] == []
    assert seen["size"] == pictures.SIZE
    assert seen["difference"] < 1e-5, "the weights are those the prototypes were made with"


def test_a_classifier_can_be_scored_on_another_split(client: Client, trained: dict[str, list[FineTuningJob]]) -> None:
    evaluation = succeeded(client, client.evaluate(str(trained["mmft"][0].fine_tuned_model), split="val"))
    assert evaluation.result is not None
    assert (evaluation.result["images"], evaluation.result["classes"]) == (6, 3)
    assert evaluation.scores is not None
    assert evaluation.scores["top5"] == 1.0, "there are only three classes"


def test_a_repeated_request_with_its_key_makes_one_job(http: httpx.Client, shapes: Dataset) -> None:
    body = {"dataset_id": shapes.id, "words": 12}
    headers = {"Idempotency-Key": "the-very-same"}
    answers = [http.post("/v1/caption_jobs", json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert answers[0].headers["location"] == f"/v1/caption_jobs/{answers[0].json()['id']}"
    other = http.post("/v1/caption_jobs", json=body | {"words": 13}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
