"""The evaluation job, done by a worker's runner in this process."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from services.evaluator import tasks
from services.evaluator.metrics import METRICS, score
from services.evaluator.passes.caption_statistics import distinct_2
from services.evaluator.scoring import predictions, temperature
from services.evaluator.scoring.gathering import Sources, gather
from shared.classifier.card import read_card
from shared.clip.loading import encode_image, encode_text
from shared.core import Core
from shared.db.models import Classifier, Dataset, Evaluation, Image, Job, LeaderboardVersion, Score
from shared.jobs.worker import Runner
from shared.schemas.evaluations import EvaluationRequest
from shared.schemas.fine_tuning import FineTuningRequest, MethodSpec
from tests.integration.evaluations import Lab
from tests.integration.factories import (
    FINGERPRINT,
    add_caption,
    add_classifier,
    add_dataset,
    add_job,
    caption_request,
    change_job,
    read_job,
)
from tests.integration.support import wait_for

PLAIN = {name for name, metric in METRICS.items() if metric.compute is not None}


@pytest.fixture
def dataset_id(lab: Lab) -> str:
    id = add_dataset(lab.core)
    lab.add_pictures(id, "test", 9)
    lab.add_pictures(id, "val", 6, first=9)
    return id


def version(core: Core, dataset_id: str) -> int:
    with core.transaction() as session:
        row = session.get(LeaderboardVersion, dataset_id)
        return row.version if row else 0


def test_scores_predictions_and_tables_of_a_classifier(lab: Lab, dataset_id: str) -> None:
    id = lab.add_classifier(
        dataset_id, details={"train_seconds": 2.5, "caption_seconds": 7, "peak_memory_bytes": 2**21}
    )
    before = version(lab.core, dataset_id)
    job = lab.evaluate(dataset_id, classifier_id=id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.result is not None
    assert version(lab.core, dataset_id) > before

    pixels, labels, paths = lab.pixels(dataset_id, "test")
    classifier = lab.loaded(_row(lab.core, id).storage_key)
    logits = classifier.logits(pixels)
    val_pixels, val_labels, _ = lab.pixels(dataset_id, "val")
    fitted = temperature.fit(classifier.logits(val_pixels), val_labels)
    expected = score(logits, labels, fitted.value)

    (row,), scores = lab.standing(classifier_id=id, dataset_id=dataset_id, split="test", head="own")
    assert row.id == job.id
    assert scores == job.result["scores"]
    assert {name: scores[name] for name in PLAIN} == pytest.approx(expected, rel=1e-4)
    assert scores["train_seconds"] == 2.5
    assert scores["caption_seconds"] == 7
    assert scores["peak_memory_mib"] == 2.0
    assert scores["latency_ms"] > 0
    assert scores.keys() <= METRICS.keys()

    right = logits.argmax(1).numpy() == labels
    assert np.unpackbits(np.frombuffer(row.correct, np.uint8), count=row.images).tolist() == right.tolist()
    with lab.core.store.local_file(row.predictions_key) as path:
        kept = predictions.read(path)
    assert kept.paths == paths == sorted(paths)
    assert kept.labels.tolist() == labels
    assert kept.class_names == ["cat", "dog"]
    np.testing.assert_allclose(kept.logits, logits.numpy(), atol=1e-5)

    result = job.result
    assert (result["images"], result["classes"], result["classifier_id"]) == (9, 2, id)
    assert result["temperature"]["images"] == 6
    assert result["temperature"]["value"] == pytest.approx(fitted.value, rel=1e-4)
    assert sum(each["images"] for each in result["per_class"]) == 9
    assert sum(each["images"] for each in result["confusions"]) == 9 - right.sum()
    assert set(result["cost"]["latency_ms"]) == {"1", "32"}


def _row(core: Core, id: str) -> Classifier:
    with core.transaction() as session:
        return session.get_one(Classifier, id)


@pytest.mark.parametrize("weights", ["projection", "own"])
def test_every_way_to_the_embeddings_gives_the_classifiers_logits(lab: Lab, dataset_id: str, weights: str) -> None:
    id = lab.add_classifier(dataset_id, weights=weights)
    job = lab.evaluate(dataset_id, classifier_id=id)
    assert job.status == "succeeded", job.error
    (row,), _ = lab.standing(classifier_id=id)
    with lab.core.store.local_file(row.predictions_key) as path:
        kept = predictions.read(path)
    pixels, _, _ = lab.pixels(dataset_id, "test")
    expected = lab.loaded(_row(lab.core, id).storage_key).logits(pixels)
    np.testing.assert_allclose(kept.logits, expected.numpy(), atol=1e-4)
    base = encode_image(lab.clip, pixels) @ lab.loaded(_row(lab.core, id).storage_key).head.weight.T
    assert np.abs(kept.logits - base.numpy()).max() > 1e-2  # the weights do differ


def test_a_later_evaluation_takes_the_place_of_the_earlier(lab: Lab, dataset_id: str) -> None:
    id = lab.add_classifier(dataset_id)
    key = {"classifier_id": id, "dataset_id": dataset_id, "split": "test", "head": "own"}
    first = lab.evaluate(dataset_id, classifier_id=id, corruptions=True)
    (before,), scored = lab.standing(**key)
    assert first.result is not None
    assert scored["corruption_top1"] == first.result["scores"]["corruption_top1"]
    second = lab.evaluate(dataset_id, classifier_id=id)
    (row,), scores = lab.standing(**key)
    assert row.id == second.id != before.id
    assert not lab.core.store.exists(before.predictions_key)
    assert lab.core.store.exists(row.predictions_key)
    assert scores["corruption_top1"] == scored["corruption_top1"]  # the data and the classifier are the same
    with lab.core.transaction() as session:
        of = select(Score.metric, Score.evaluation_id).where(Score.classifier_id == id)
        from_ = {metric: evaluation for metric, evaluation in session.execute(of)}
    assert from_["top1"] == second.id
    assert from_["corruption_top1"] == first.id
    assert (read_job(lab.core, first.id).result or {})["scores"] == first.result["scores"]


def test_other_data_leave_nothing_of_the_earlier_scores(lab: Lab, dataset_id: str) -> None:
    id = lab.add_classifier(dataset_id)
    lab.evaluate(dataset_id, classifier_id=id, corruptions=True)
    with lab.core.transaction() as session:
        session.get_one(Dataset, dataset_id).fingerprint = "9" * 64
    job = lab.evaluate(dataset_id, classifier_id=id)
    (row,), scores = lab.standing(classifier_id=id)
    assert row.data_fingerprint == "9" * 64
    assert job.result is not None
    assert scores == job.result["scores"]
    assert "corruption_top1" not in scores


def rename_while_scored(lab: Lab, dataset_id: str, monkeypatch: pytest.MonkeyPatch, **request: Any) -> list[Job]:
    """The data set changes after the first job has read it, and a second one is done before the first ends."""
    done: list[Job] = []
    changed = False

    def slow(session: Session, asked: EvaluationRequest) -> Sources:
        nonlocal changed
        found = gather(session, asked)
        if not changed:
            changed = True
            with lab.core.transaction() as other:
                other.get_one(Dataset, dataset_id).fingerprint = "9" * 64
            done.append(lab.evaluate(dataset_id, **request))
        return found

    monkeypatch.setattr(tasks, "gather", slow)
    return [lab.evaluate(dataset_id, **request), *done]


def test_scores_of_what_the_data_were_do_not_replace_those_of_what_they_are(
    lab: Lab, dataset_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = lab.add_classifier(dataset_id)
    old, new = rename_while_scored(lab, dataset_id, monkeypatch, classifier_id=id)
    assert (old.status, (old.error or {})["code"], new.status) == ("failed", "dataset_changed", "succeeded")
    (row,), scores = lab.standing(classifier_id=id)
    assert (row.id, row.data_fingerprint) == (new.id, "9" * 64)
    assert scores == (new.result or {})["scores"]


def test_a_bare_model_is_kept_with_the_data_it_was_scored_on(
    lab: Lab, dataset_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = rename_while_scored(lab, dataset_id, monkeypatch, model="tiny")
    fingerprints = {}
    for job in (old, new):
        assert job.status == "succeeded", job.error
        row = _row(lab.core, (job.result or {})["classifier_id"])
        fingerprints[job.id] = row.data_fingerprint
        with lab.core.store.local_folder(row.storage_key) as folder:
            assert read_card(folder).data_fingerprint == row.data_fingerprint
    assert fingerprints == {old.id: FINGERPRINT, new.id: "9" * 64}


def test_evaluations_at_once_leave_one(lab: Lab, dataset_id: str) -> None:
    id = lab.add_classifier(dataset_id)
    jobs = [
        add_job(lab.core, "evaluate", request={"classifier_id": id, "split": "test"}, dataset_id=dataset_id)
        for _ in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lab.run, jobs))
    assert [job.status for job in done] == ["succeeded"] * 4
    (row,), scores = lab.standing(classifier_id=id)
    assert row.id in jobs
    assert scores["top1"] == (read_job(lab.core, row.id).result or {})["scores"]["top1"]
    kept = [lab.core.store.exists(f"predictions/{job}-1.parquet") for job in jobs]
    assert kept == [job == row.id for job in jobs]


def test_splits_and_heads_stand_beside_one_another(lab: Lab, dataset_id: str) -> None:
    id = lab.add_classifier(dataset_id)
    for request in ({}, {"split": "val"}, {"head": "zero_shot"}):
        assert lab.evaluate(dataset_id, classifier_id=id, **request).status == "succeeded"
    rows, _ = _all(lab.core, id)
    assert sorted((row.split, row.head) for row in rows) == [("test", "own"), ("test", "zero_shot"), ("val", "own")]
    _, scores = lab.standing(classifier_id=id, split="val", head="own")
    assert "nll" in scores
    assert "nll_scaled" not in scores  # it would be fitted on what it is scored on


def _all(core: Core, classifier_id: str) -> tuple[list[Evaluation], int]:
    with core.transaction() as session:
        rows = session.scalars(select(Evaluation).where(Evaluation.classifier_id == classifier_id)).all()
        return list(rows), session.scalar(select(func.count()).select_from(Score)) or 0


def zero_shot_top1(lab: Lab, dataset_id: str, names: tuple[str, ...] = ("cat", "dog")) -> float:
    pixels, labels, _ = lab.pixels(dataset_id, "test")
    texts = encode_text(lab.clip, [f"a photo of a {name}." for name in names])
    found = (encode_image(lab.clip, pixels) @ texts.T).argmax(1)
    return float((found == torch.tensor(labels)).double().mean())


def test_a_bare_model_becomes_a_zero_shot_classifier_once(lab: Lab, dataset_id: str) -> None:
    first = lab.evaluate(dataset_id, model="tiny")
    assert first.status == "succeeded", first.error
    second = lab.evaluate(dataset_id, model="tiny", split="val")
    with lab.core.transaction() as session:
        (row,) = session.scalars(select(Classifier)).all()
    assert (row.method, row.protocol, row.model, row.pinned) == ("zero_shot", "zero_shot", "tiny", True)
    assert (row.dataset_id, row.job_id, row.owner) == (dataset_id, first.id, "anna")
    for job in (first, second):
        assert (job.result or {})["classifier_id"] == row.id
    _, scores = lab.standing(classifier_id=row.id, split="test", head="own")
    assert scores["top1"] == zero_shot_top1(lab, dataset_id)
    assert (scores["train_seconds"], scores["trainable_parameters"]) == (0, 0)
    pixels, labels, _ = lab.pixels(dataset_id, "test")
    logits = lab.loaded(row.storage_key).logits(pixels)
    assert float((logits.argmax(1) == torch.tensor(labels)).double().mean()) == scores["top1"]
    again = lab.evaluate(dataset_id, classifier_id=row.id)
    assert (again.result or {})["scores"]["nll"] == pytest.approx(scores["nll"])


def test_two_bare_models_at_once_become_one_classifier(lab: Lab, dataset_id: str) -> None:
    jobs = [
        add_job(lab.core, "evaluate", request={"model": "tiny", "dataset_id": dataset_id}, dataset_id=dataset_id)
        for _ in range(3)
    ]
    with ThreadPoolExecutor(3) as pool:
        assert [job.status for job in pool.map(lab.run, jobs)] == ["succeeded"] * 3
    with lab.core.transaction() as session:
        (row,) = session.scalars(select(Classifier)).all()
    folders = [lab.core.store.exists(f"classifiers/{job}/1") for job in jobs]
    assert folders == [f"classifiers/{job}/1" == row.storage_key for job in jobs]


def test_a_model_that_does_not_exist(lab: Lab, dataset_id: str) -> None:
    job = lab.evaluate(dataset_id, model="nonesuch")
    assert (job.status, (job.error or {})["code"]) == ("failed", "unknown_model")


def test_another_data_set_by_its_own_class_names(lab: Lab, dataset_id: str) -> None:
    other = add_dataset(lab.core, classes=[{"name": n, "display_name": f"a {n}"} for n in ("cat", "dog", "newt")])
    lab.add_pictures(other, "test", 6)
    id = lab.add_classifier(dataset_id)
    refused = lab.evaluate(other, classifier_id=id)
    assert (refused.status, (refused.error or {})["code"]) == ("failed", "class_lists_differ")
    assert "2 classes and the data set 3" in (refused.error or {})["message"]
    assert "class 3: missing and 'newt'" in (refused.error or {})["message"]
    job = lab.evaluate(other, classifier_id=id, head="zero_shot")
    assert job.status == "succeeded", job.error
    (row,), scores = lab.standing(classifier_id=id, dataset_id=other, split="test", head="zero_shot")
    assert scores["top1"] == zero_shot_top1(lab, other, ("a cat", "a dog", "a newt"))
    assert "nll_scaled" not in scores  # no val split
    assert (job.result or {})["temperature"] is None
    assert row.images == 6
    assert version(lab.core, other) == 1


@pytest.mark.parametrize("names", [("dog", "cat"), ("cat", "wolf")])
def test_the_same_number_of_other_classes_is_refused(lab: Lab, dataset_id: str, names: tuple[str, str]) -> None:
    id = lab.add_classifier(dataset_id)
    other = add_dataset(lab.core, classes=[{"name": name, "display_name": name} for name in names])
    lab.add_pictures(other, "test", 2)
    with lab.core.transaction() as session:
        for image in session.scalars(select(Image).where(Image.dataset_id == other)):
            image.class_name = names[0]
    error = lab.evaluate(other, classifier_id=id).error or {}
    assert error["code"] == "class_lists_differ"
    place = 1 if names[0] == "dog" else 2
    assert f"class {place}: " in error["message"]


def test_the_same_classes_in_another_data_set_are_scored_by_the_own_head(lab: Lab, dataset_id: str) -> None:
    other = add_dataset(lab.core)
    lab.add_pictures(other, "test", 4, first=40)
    id = lab.add_classifier(dataset_id)
    assert lab.evaluate(other, classifier_id=id).status == "succeeded"
    (row,), _ = lab.standing(classifier_id=id, dataset_id=other, head="own")
    assert row.images == 4


def test_what_was_deleted_or_is_empty_fails_with_a_plain_reason(lab: Lab, dataset_id: str) -> None:
    id = lab.add_classifier(dataset_id)
    queued = add_job(lab.core, "evaluate", request={"classifier_id": id, "split": "test"}, dataset_id=dataset_id)
    error = lab.evaluate(dataset_id, classifier_id=id, split="train").error or {}
    assert (error["code"], error["param"]) == ("empty_split", "split")
    error = lab.evaluate("ds_gone", classifier_id=id).error or {}
    assert error["code"] == "dataset_deleted"
    with lab.core.transaction() as session:
        session.delete(session.get_one(Classifier, id))
    job = lab.run(queued)
    assert job.status == "failed"
    assert (job.error or {})["code"] == "classifier_deleted"
    assert id in (job.error or {})["message"]


def test_a_classifier_deleted_while_it_is_scored_leaves_nothing(lab: Lab, dataset_id: str, monkeypatch: Any) -> None:
    id = lab.add_classifier(dataset_id)

    def measure(*_: Any) -> Any:
        with lab.core.transaction() as session:
            session.delete(session.get_one(Classifier, id))
        return ()

    monkeypatch.setattr(tasks, "measure", measure)
    job = lab.evaluate(dataset_id, classifier_id=id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "classifier_deleted")
    assert _all(lab.core, id) == ([], 0)


def test_a_tampered_folder_or_a_changed_base_fails_with_a_reason(lab: Lab, dataset_id: str) -> None:
    id = lab.add_classifier(dataset_id)
    key = _row(lab.core, id).storage_key
    with lab.core.store.local_folder(key) as folder:
        card = (folder / "captune.json").read_text()
        (folder / "captune.json").write_text(card.replace(lab.clip.revision, "0" * 32))
    assert (lab.evaluate(dataset_id, classifier_id=id).error or {})["code"] == "base_changed"
    with lab.core.store.local_folder(key) as folder:
        (folder / "captune.json").write_text(card)
        data = bytearray((folder / "head.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "head.safetensors").write_bytes(data)
    error = lab.evaluate(dataset_id, classifier_id=id).error or {}
    assert error["code"] == "bad_classifier"
    assert "truncated or was altered" in error["message"]


def test_an_attempt_that_lost_its_lease_writes_nothing(lab: Lab, dataset_id: str, monkeypatch: Any) -> None:
    id = lab.add_classifier(dataset_id)
    job_id = add_job(lab.core, "evaluate", request={"classifier_id": id, "split": "test"}, dataset_id=dataset_id)

    def taken_over(*_: Any) -> Any:
        change_job(lab.core, job_id, attempt=7)
        return ()

    monkeypatch.setattr(tasks, "measure", taken_over)
    Runner(lab.core, "evaluate", "test").run(job_id)
    assert read_job(lab.core, job_id).status == "running"
    assert _all(lab.core, id) == ([], 0)


def test_cancelling_stops_it(lab: Lab, dataset_id: str) -> None:
    id = lab.add_classifier(dataset_id)
    request = {"classifier_id": id, "split": "test", "corruptions": True}
    job_id = add_job(lab.core, "evaluate", request=request, dataset_id=dataset_id)
    change_job(lab.core, job_id, cancel_requested=True)
    assert lab.run(job_id).status == "cancelled"
    assert _all(lab.core, id) == ([], 0)


def test_corruptions_forgetting_retrieval_and_caption_statistics(lab: Lab, dataset_id: str) -> None:
    captions = add_job(lab.core, request=caption_request(dataset_id, "test"), dataset_id=dataset_id, status="succeeded")
    with lab.core.transaction() as session:
        query = select(Image).where(Image.dataset_id == dataset_id, Image.split == "test").order_by(Image.path)
        images = session.scalars(query).all()
    texts = [f"a picture with number {i} of a kind" for i in range(len(images))]
    for i, image in enumerate(images):
        add_caption(lab.core, image, captions, texts[i], key=f"k{i}", clip_tokens=10 + i)
    flagged = add_caption(lab.core, images[0], captions, "a refusal", key="r", flags=["refusal", "label_missing"])
    aside = add_dataset(lab.core, name="aside")
    lab.add_pictures(aside, "test", 8, first=60)
    id = lab.add_classifier(dataset_id, weights="own", caption_job_id=captions)
    job = lab.evaluate(
        dataset_id, classifier_id=id, corruptions=True, held_aside_dataset_id=aside, caption_job_id=captions
    )
    assert job.status == "succeeded", job.error
    result = job.result or {}
    scores = result["scores"]
    assert scores.keys() == METRICS.keys() - {"trainable_parameters", "peak_memory_mib", "caption_seconds"}

    assert result["corruptions"]["images"] == 9
    assert len(result["corruptions"]["top1"]) == 9
    own = lab.loaded(_row(lab.core, id).storage_key)
    assert scores["forgetting_before"] == zero_shot_top1(lab, aside)
    assert scores["forgetting"] == pytest.approx(scores["forgetting_before"] - scores["forgetting_after"])
    pixels, labels, _ = lab.pixels(aside, "test")
    prompts = encode_text(own.clip, ["a photo of a cat.", "a photo of a dog."])
    after = ((encode_image(own.clip, pixels) @ prompts.T).argmax(1) == torch.tensor(labels)).double().mean()
    assert scores["forgetting_after"] == float(after)

    assert result["retrieval"] == {"images": 9, "captions": 9}  # what training leaves out is left out
    pixels, _, _ = lab.pixels(dataset_id, "test")
    similar = encode_text(own.clip, texts) @ encode_image(own.clip, pixels).T
    hits = (similar.argsort(1, descending=True)[:, :5] == torch.arange(9)[:, None]).any(1)
    assert scores["text_to_image_r5"] == pytest.approx(float(hits.double().mean()))
    assert scores["text_to_image_r10"] == 1.0

    assert result["captions"]["captions"] == 10
    assert result["captions"]["tokens_mean"] == pytest.approx((sum(range(10, 19)) + 12) / 10)
    assert scores["captions_flagged"] == pytest.approx(0.1)
    assert scores["captions_naming_class"] == pytest.approx(0.9)
    assert scores["captions_distinct_2"] == pytest.approx(distinct_2([*texts, "a refusal"]))
    assert flagged


def test_on_the_base_models_weights_nothing_is_forgotten(lab: Lab, dataset_id: str) -> None:
    aside = add_dataset(lab.core)
    lab.add_pictures(aside, "test", 4, first=60)
    job = lab.evaluate(dataset_id, model="tiny", held_aside_dataset_id=aside)
    assert job.status == "succeeded", job.error
    scores = (job.result or {})["scores"]
    assert scores["forgetting"] == 0
    assert scores["forgetting_before"] == zero_shot_top1(lab, aside)


def test_retrieval_without_a_caption_of_the_split_is_refused(lab: Lab, dataset_id: str) -> None:
    captions = add_job(lab.core, request=caption_request(dataset_id, "test"), dataset_id=dataset_id, status="succeeded")
    id = lab.add_classifier(dataset_id)
    error = lab.evaluate(dataset_id, classifier_id=id, caption_job_id=captions).error or {}
    assert error["code"] == "no_captions_of_split"


@pytest.mark.parametrize("method", ["zero_shot", "linear_probe", "prolip", "gda", "flyp", "lp_ft"])
def test_what_the_trainer_made_scores_on_val_as_it_said(lab: Lab, dataset_id: str, method: str) -> None:
    lab.add_pictures(dataset_id, "train", 8, first=20)
    quick = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3} if method in ("flyp", "lp_ft") else {}
    request = FineTuningRequest(
        model="tiny", dataset_id=dataset_id, method=MethodSpec(type=method, hyperparameters=quick)
    ).model_dump(mode="json")
    job_id = add_job(lab.core, "fine_tune", request=request, dataset_id=dataset_id)
    Runner(lab.core, "fine_tune", "test").run(job_id)
    trained = read_job(lab.core, job_id)
    assert trained.status == "succeeded", trained.error
    result = trained.result or {}
    queued = lab.run(result["evaluation_id"])  # as the run left it
    assert queued.status == "succeeded", queued.error
    (row,), scores = lab.standing(classifier_id=result["classifier_id"])
    assert (row.split, row.head, row.images) == ("test", "own", 9)
    assert scores["trainable_parameters"] == result["trainable_parameters"]
    job = lab.evaluate(dataset_id, classifier_id=result["classifier_id"], split="val")
    if result["val_top1"] is not None:
        assert (job.result or {})["scores"]["top1"] == result["val_top1"]
    else:
        assert method == "zero_shot"


# -- the API -----------------------------------------------------------------------------------------------------------


def test_a_request_is_checked_and_kept_whole(lab: Lab, dataset_id: str) -> None:
    anna = lab.client("anna", "read", "write")
    id = lab.add_classifier(dataset_id)
    answer = anna.post("/v1/evaluations", json={"classifier_id": id})
    assert answer.status_code == 202, answer.text
    made = answer.json()
    assert (made["dataset_id"], made["split"], made["head"], made["scores"]) == (dataset_id, "test", "own", None)
    lab.run(made["id"])
    shown = anna.get(f"/v1/evaluations/{made['id']}").json()
    assert shown["status"] == "succeeded"
    assert shown["scores"].keys() >= PLAIN
    assert set(shown["result"]) >= {"per_class", "confusions", "temperature", "cost"}
    assert "scores" not in shown["result"]
    bare = anna.post("/v1/evaluations", json={"model": "tiny", "dataset_id": dataset_id, "head": "zero_shot"}).json()
    assert (bare["classifier_id"], bare["model"], bare["head"]) == (None, "tiny", "own")
    lab.run(bare["id"])
    assert anna.get(f"/v1/evaluations/{bare['id']}").json()["classifier_id"].startswith("clf_")


def test_what_cannot_be_scored_is_refused_at_once(lab: Lab, dataset_id: str) -> None:
    anna = lab.client("anna", "read", "write")
    id = lab.add_classifier(dataset_id)
    bens = add_dataset(lab.core, "ben")
    running = add_dataset(lab.core, status="running")
    of_train = add_job(lab.core, request=caption_request(dataset_id), dataset_id=dataset_id, status="succeeded")
    unfinished = add_job(lab.core, request=caption_request(dataset_id, "test"), dataset_id=dataset_id)
    of_other = add_job(lab.core, request=caption_request("ds_1", "test"), dataset_id="ds_1", status="succeeded")
    own = {"classifier_id": id}
    cases: list[tuple[dict[str, Any], int, str, str]] = [
        ({"classifier_id": "clf_no"}, 404, "not_found", "classifier_id"),
        ({"classifier_id": add_classifier(lab.core, bens, owner="ben")}, 404, "not_found", "classifier_id"),
        ({}, 422, "invalid_request", ""),
        (own | {"model": "tiny"}, 422, "invalid_request", ""),
        ({"model": "tiny"}, 422, "invalid_request", ""),
        (own | {"dataset_id": bens}, 404, "not_found", "dataset_id"),
        (own | {"dataset_id": running}, 409, "dataset_not_ready", "dataset_id"),
        (own | {"held_aside_dataset_id": dataset_id}, 422, "not_held_aside", "held_aside_dataset_id"),
        (own | {"held_aside_dataset_id": bens}, 404, "not_found", "held_aside_dataset_id"),
        (own | {"held_aside_dataset_id": running}, 409, "dataset_not_ready", "held_aside_dataset_id"),
        (own | {"caption_job_id": "cap_of_nobody"}, 404, "not_found", "caption_job_id"),
        (own | {"caption_job_id": of_train}, 422, "captions_of_another_split", "caption_job_id"),
        (own | {"caption_job_id": of_other}, 422, "captions_of_another_dataset", "caption_job_id"),
        (own | {"caption_job_id": unfinished}, 409, "captions_not_ready", "caption_job_id"),
        (own | {"head": "linear"}, 422, "invalid_request", "head"),
        (own | {"metric": "top1"}, 422, "invalid_request", "metric"),
    ]
    for body, status, code, param in cases:
        answer = anna.post("/v1/evaluations", json=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (body, answer.text)
        assert (answer.json().get("param") or "") == param, body


def test_rescoring_needs_no_model(lab: Lab, dataset_id: str, monkeypatch: Any) -> None:
    anna, ben = lab.client("anna", "read", "write"), lab.client("ben", "read", "write")
    id = lab.add_classifier(dataset_id)
    job = lab.evaluate(dataset_id, classifier_id=id)
    _, before = lab.standing(classifier_id=id)
    lab.core.store.delete(_row(lab.core, id).storage_key)  # no model any more
    with lab.core.transaction() as session:
        session.execute(Score.__table__.delete().where(Score.metric.in_(["brier", "ece_scaled"])))
        session.execute(Score.__table__.update().where(Score.metric == "top1").values(value=0.123))
    number = version(lab.core, dataset_id)
    answer = anna.post(f"/v1/evaluations/{job.id}/rescore")
    assert answer.status_code == 200, answer.text
    _, after = lab.standing(classifier_id=id)
    assert after == pytest.approx(before)
    assert answer.json()["scores"] == pytest.approx(before)
    assert version(lab.core, dataset_id) == number + 1
    assert ben.post(f"/v1/evaluations/{job.id}/rescore").status_code == 404
    assert lab.client("anna", "read").post(f"/v1/evaluations/{job.id}/rescore").status_code == 403
    monkeypatch.setattr("services.evaluator.scoring.rescoring.MAX_LOGITS", 3)
    assert anna.post(f"/v1/evaluations/{job.id}/rescore").json()["code"] == "too_many_predictions"


def test_predictions_are_downloaded_while_they_stand(lab: Lab, dataset_id: str, tmp_path: Any) -> None:
    anna = lab.client("anna", "read")
    id = lab.add_classifier(dataset_id)
    job = lab.evaluate(dataset_id, classifier_id=id)
    answer = anna.get(f"/v1/evaluations/{job.id}/predictions")
    assert answer.headers["content-type"] == "application/vnd.apache.parquet"
    (tmp_path / "p.parquet").write_bytes(answer.content)
    assert len(predictions.read(tmp_path / "p.parquet").paths) == 9
    assert lab.client("ben", "read").get(f"/v1/evaluations/{job.id}/predictions").status_code == 404
    lab.evaluate(dataset_id, classifier_id=id)
    late = anna.get(f"/v1/evaluations/{job.id}/predictions")
    assert (late.status_code, late.json()["code"]) == (409, "no_predictions")
    queued = add_job(lab.core, "evaluate", request={"classifier_id": id, "split": "test"}, dataset_id=dataset_id)
    assert "is queued" in anna.get(f"/v1/evaluations/{queued}/predictions").json()["detail"]


def test_what_is_scored_is_of_one_moment(lab: Lab, dataset_id: str, monkeypatch: Any) -> None:
    levels = []

    def look(session: Session, request: EvaluationRequest) -> Sources:
        levels.append(session.connection().get_isolation_level())
        return gather(session, request)

    monkeypatch.setattr(tasks, "gather", look)
    assert lab.evaluate(dataset_id, classifier_id=lab.add_classifier(dataset_id)).status == "succeeded"
    assert levels == ["REPEATABLE READ"]


@pytest.mark.parametrize("when", ["before it is loaded", "while it is scored"])
def test_a_bare_model_whose_classifier_somebody_deletes_is_scored_again(
    lab: Lab, dataset_id: str, monkeypatch: Any, when: str
) -> None:
    first = lab.evaluate(dataset_id, model="tiny").result
    assert first is not None

    def delete() -> None:
        with lab.core.transaction() as session:
            row = session.get_one(Classifier, first["classifier_id"])
            session.delete(row)
            session.info["obsolete"] = [row.storage_key]

    def gathered(session: Session, request: EvaluationRequest) -> Sources:
        found = gather(session, request)
        delete()
        return found

    def measure(*_: Any) -> Any:
        delete()
        return ()

    with monkeypatch.context() as patched:
        patched.setattr(tasks, *(("gather", gathered) if when == "before it is loaded" else ("measure", measure)))
        job = lab.evaluate(dataset_id, model="tiny")
    assert (job.status, job.failures) == ("queued", 1), job.error
    change_job(lab.core, job.id, run_after=None)
    job = lab.run(job.id)
    assert job.status == "succeeded", job.error
    assert (job.result or {})["classifier_id"] != first["classifier_id"]


def _waiting_for_locks(core: Core) -> int:
    with core.db.autocommit() as connection:  # a transaction sees the activity of its first look
        return connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")) or 0


def test_a_submission_locks_as_who_writes_scores_does(lab: Lab, dataset_id: str) -> None:
    """The data set first: the other way round the two wait for each other."""
    id = lab.add_classifier(dataset_id)
    anna = lab.client("anna", "read", "write")
    with ThreadPoolExecutor(1) as pool:
        with lab.core.transaction() as session:
            session.execute(select(Dataset.id).where(Dataset.id == dataset_id).with_for_update())
            asked = pool.submit(anna.post, "/v1/evaluations", json={"classifier_id": id})
            wait_for(lambda: _waiting_for_locks(lab.core))
            session.execute(select(Classifier.id).where(Classifier.id == id).with_for_update(nowait=True))
        assert asked.result().status_code == 202
