"""Fine-tuning jobs as a worker does them, on a tiny CLIP: what each leaves in the ledger and in the store."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.trainer import methods, tasks
from services.trainer.methods.base import Batch
from services.trainer.methods.flyp import FLYP
from services.trainer.routes.submission import create_run, normalised
from shared.classifier.card import read_card
from shared.classifier.folder import load_classifier
from shared.clip import warm
from shared.clip.loading import encode_image, load_clip
from shared.clip.pixels import load_pixels
from shared.core import Core
from shared.datasets.lookup import draw_shots, split_images
from shared.db.models import Caption, Checkpoint, Classifier, Dataset, Image, Job
from shared.jobs.worker import Runner
from shared.row_cache import open_cache
from shared.schemas.fine_tuning import FineTuningRequest
from tests.integration.factories import (
    add_caption,
    add_checkpoint,
    add_dataset,
    add_group,
    add_job,
    caption_request,
    change_job,
    events_of,
    read_job,
    types_of,
)
from tests.integration.support import wait_for
from tests.tiny_clip import write_tiny_clip

QUICK = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def core(core: Core, model: Path, tmp_path: Path) -> Core:
    """With the tiny model allowed, and a cache of its own."""
    settings = core.settings.model_copy(update={"model_roots": [model.parent], "model_cache": tmp_path / "cache"})
    return Core(settings, core.db, core.queue, core.store)


@pytest.fixture
def dataset_id(core: Core) -> str:
    return add_dataset(core, images=4, val=3)


Submit = Callable[..., str]


@pytest.fixture
def submit(core: Core, model: Path, dataset_id: str) -> Submit:
    """Queues a run as the API does; returns the job's id."""

    def call(type: str, hyperparameters: dict[str, Any] | None = None, group_id: str | None = None, **body: Any) -> str:
        spec = {"type": type, "hyperparameters": hyperparameters or {}}
        values = {"model": str(model), "dataset_id": dataset_id, "method": spec, **body}
        request = FineTuningRequest.model_validate(values)
        with core.transaction() as session:
            dataset = session.get_one(Dataset, dataset_id)
            request = normalised(request, methods.build(type, hyperparameters or {}))
            return create_run(session, dataset, request, group_id).id

    return call


def run(core: Core, job_id: str) -> Job:
    Runner(core, "fine_tune", "test").run(job_id)
    return read_job(core, job_id)


def done(core: Core, job_id: str) -> Classifier:
    job = run(core, job_id)
    assert job.status == "succeeded", (job.error, [event.message for event in events_of(core, job_id)])
    assert job.result is not None
    with core.transaction() as session:
        return session.get_one(Classifier, job.result["classifier_id"])


def folder(core: Core, row: Classifier) -> Path:
    return Path(core.store.root) / row.storage_key


def checkpoints(core: Core, job_id: str) -> list[Checkpoint]:
    with core.transaction() as session:
        query = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.kind)
        return list(session.scalars(query))


def captioned(core: Core, dataset_id: str, only: str | None = None, text: str = "a soft coat") -> str:
    """A caption job with two captions of each training image, or of one class's."""
    job = add_job(
        core,
        request={**caption_request(dataset_id), "words": 9},
        dataset_id=dataset_id,
        status="succeeded",
        result={"captioner": {"revision": "r1"}, "captions": 16},
        started_at=datetime(2026, 11, 22, 8, 0, 0, tzinfo=UTC),
        finished_at=datetime(2026, 11, 22, 8, 0, 4, tzinfo=UTC),
    )
    with core.transaction() as session:
        images = session.scalars(select(Image).where(Image.dataset_id == dataset_id, Image.split == "train")).all()
    for image in images:
        if only in (None, image.class_name):
            for number in range(2):
                words = f"{text} of kind {number}"
                add_caption(core, image, job, words, f"{job}{number}")
    return job


# -- what a run leaves ---------------------------------------------------------------------------------------------


def test_a_run_on_frozen_features_leaves_a_head_over_the_base_model(
    core: Core, submit: Submit, model: Path, dataset_id: str
) -> None:
    group = add_group(core, dataset_id)
    job_id = submit("linear_probe", group_id=group, shots=2, shot_seed=1, tags=["a", "b", "a"], suffix="s")
    row = done(core, job_id)
    assert sorted(path.name for path in folder(core, row).iterdir()) == ["captune.json", "head.safetensors"]
    card = read_card(folder(core, row))
    base = load_clip(str(model), core.settings.model_cache, [model.parent])
    assert (card.weights, card.head_kind, card.changed, card.base_model) == ("base", "linear", [], str(model))
    assert card.base_revision == base.revision
    assert (row.protocol, row.tags, row.pinned, row.group_id, row.suffix) == ("full", ["a", "b"], False, group, "s")
    details = row.details
    assert (details["train_images"], details["val_images"], details["device"]) == (4, 6, "cpu")
    assert details["train_seconds"] > 0
    assert details["peak_memory_bytes"] > 1e6
    assert details["trainable_parameters"] == 2 * 17
    assert details["chosen"]
    assert details["val_top1"] == card.val_top1 is not None
    evaluation = read_job(core, read_job(core, job_id).result["evaluation_id"])  # type: ignore[index]
    assert (evaluation.kind, evaluation.status, evaluation.group_id) == ("evaluate", "queued", group)
    assert evaluation.request["classifier_id"] == row.id
    assert evaluation.request["split"] == "test"
    loaded = load_classifier(folder(core, row), load_base=lambda _: base)
    with core.transaction() as session:
        val = split_images(session, dataset_id, "val")
    pixels = load_pixels(None, core.store, val, base, lambda _: None)
    labels = torch.tensor([("cat", "dog").index(image.class_name) for image in val])
    assert isinstance(pixels, torch.Tensor)
    assert float((loaded.logits(pixels).argmax(1) == labels).double().mean()) == details["val_top1"]


def test_a_changed_projection_is_kept_beside_the_head(core: Core, submit: Submit, model: Path) -> None:
    row = done(core, submit("prolip", {"steps": 5, "learning_rate": 1e-2}))
    card = read_card(folder(core, row))
    assert card.changed == ["visual.proj"]
    assert (card.weights, card.head_kind) == ("base", "prototypes")
    changed = load_file(folder(core, row) / "changed.safetensors")["visual.proj"]
    base = load_clip(str(model), core.settings.model_cache, [model.parent])
    loaded = load_classifier(folder(core, row), load_base=lambda _: base)
    assert torch.equal(loaded.clip.model.visual.proj, changed)
    assert not torch.equal(base.model.visual.proj, changed), "the base model that others use is left alone"


def test_baselines_are_pinned_and_have_no_seed(core: Core, submit: Submit) -> None:
    for name in ("zero_shot", "zero_shot_ensemble"):
        row = done(core, submit(name, shots=4, seed=3))
        assert (row.pinned, row.protocol, row.seed, row.shots) == (True, "zero_shot", 0, None)
        assert (row.details["train_seconds"], row.details["val_top1"]) == (0.0, None)


def test_a_warm_worker_neither_loads_nor_embeds_again(
    core: Core, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(core, submit("linear_probe", seed=0))
    loads = warm.loaded().misses

    def encoded(*_: object) -> None:
        raise AssertionError("embedded once more")

    monkeypatch.setattr("shared.clip.embedder.encode_image", encoded)
    monkeypatch.setattr("shared.clip.embedder.encode_tokens", encoded)
    for name in ("linear_probe", "gda", "zero_shot"):
        done(core, submit(name, shots=3))
    assert warm.loaded().misses == loads


def test_seeds_share_a_setting_and_the_rest_does_not(core: Core, submit: Submit) -> None:
    settings = [
        done(core, submit("linear_probe", **body)).setting
        for body in (
            {"shots": 2, "shot_seed": 0},
            {"shots": 2, "shot_seed": 1, "tags": ["x"]},
            {"shots": 3},
            {"shots": 2, "suffix": "other"},
            {"shots": 2, "validation": "few_shot"},
            {"shots": 2, "hyperparameters": {"inverse_regularisation": 1.0}},
        )
    ]
    assert settings[0] == settings[1]
    assert len(set(settings)) == 5


def test_the_best_and_the_last_weights_are_kept_where_asked(core: Core, submit: Submit) -> None:
    job_id = submit("flyp", QUICK, checkpoints="best_and_last")
    row = done(core, job_id)
    best, last = checkpoints(core, job_id)
    assert (best.kind, last.kind, last.epoch) == ("best", "last", 2)
    assert best.storage_key == row.storage_key != last.storage_key
    card = read_card(Path(core.store.root) / last.storage_key)
    assert (card.best_epoch, card.val_top1) == (2, last.metrics["val_top1"])
    assert load_classifier(Path(core.store.root) / last.storage_key).head.weight.shape == (2, 16)
    only_best = submit("flyp", QUICK)
    done(core, only_best)
    assert [each.kind for each in checkpoints(core, only_best)] == ["best"]


def test_epochs_are_told_in_figures(core: Core, submit: Submit) -> None:
    job_id = submit("flyp", QUICK)
    done(core, job_id)
    first, second = (event.data for event in events_of(core, job_id) if event.type == "training.epoch")
    assert first is not None
    assert second is not None
    assert (first["epoch"], first["epochs"], first["step"]) == (1, 2, 2)
    assert set(first["parts"]) == {"clip"}
    for name in ("loss", "learning_rate", "logit_scale", "grad_norm", "images_per_second", "eta_seconds"):
        assert isinstance(first[name], float), name
    assert first["grad_norm"] > 0
    assert first["val_top1"] is not None
    assert second["eta_seconds"] == 0


def test_a_run_that_diverges_keeps_what_it_had_reached(
    core: Core, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def overflowing(self: FLYP, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        nonlocal steps
        steps += 1
        loss, parts = true_loss(self, batch)
        return (loss if steps <= 3 else loss * torch.inf), parts  # the second epoch's second step

    true_loss = FLYP.loss
    monkeypatch.setattr(FLYP, "loss", overflowing)
    job_id = submit("flyp", QUICK)
    job = run(core, job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("loss_not_finite", "method.hyperparameters.learning_rate")
    (kept,) = checkpoints(core, job_id)
    assert (kept.kind, kept.epoch) == ("best", 1)
    card = read_card(Path(core.store.root) / kept.storage_key)
    assert (card.best_epoch, card.val_top1) == (1, kept.metrics["val_top1"])
    state = load_classifier(Path(core.store.root) / kept.storage_key).clip.model.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    with core.transaction() as session:
        assert session.scalars(select(Classifier)).all() == [], "a failed run is not ranked"


# -- captions ------------------------------------------------------------------------------------------------------


def test_captions_make_prototypes_and_their_cost_is_told(core: Core, submit: Submit, dataset_id: str) -> None:
    captions = captioned(core, dataset_id)
    row = done(core, submit("caption_prototypes", caption_job_id=captions, shots=2))
    assert (row.captioner, row.caption_job_id, row.shots, row.protocol) == ("r1", captions, 2, "zero_shot")
    assert row.details["captions_used"] == 8
    assert row.details["caption_seconds"] == 2.0, "8 of the 16 captions of a job of 4 s"
    assert row.details["captions"]["words"] == 9
    one = done(core, submit("caption_prototypes", {"captions_per_image": 1}, caption_job_id=captions, shots=2))
    assert (one.details["captions_used"], one.details["caption_seconds"]) == (4, 1.0)
    assert one.setting != row.setting


def test_a_class_without_captions_falls_back_to_its_name_and_says_so(
    core: Core, submit: Submit, dataset_id: str
) -> None:
    job_id = submit("caption_prototypes", caption_job_id=captioned(core, dataset_id, only="cat"))
    row = done(core, job_id)
    told = {event.type: event for event in events_of(core, job_id)}
    assert told["warning.classes_without_caption"].data == {"classes": ["dog"]}
    assert "4 of 8" in told["warning.images_without_caption"].message
    plain = done(core, submit("zero_shot"))
    heads = [load_file(folder(core, each) / "head.safetensors")["weight"] for each in (row, plain)]
    torch.testing.assert_close(heads[0][1], heads[1][1])
    assert not torch.allclose(heads[0][0], heads[1][0])


def test_a_caption_job_that_leaves_nothing_to_read_fails_with_the_reason(
    core: Core, submit: Submit, dataset_id: str
) -> None:
    empty = add_job(
        core, request=caption_request(dataset_id), dataset_id=dataset_id, status="succeeded",
        result={"captioner": {"revision": "r"}},
    )  # fmt: skip
    for name in ("mmft", "caption_prototypes"):
        job = run(core, submit(name, caption_job_id=empty))
        assert job.status == "failed"
        assert job.error is not None
        assert (job.error["code"], job.error["param"]) == ("captions_missing", "caption_job_id")


def test_texts_beyond_the_context_are_counted(core: Core, submit: Submit, dataset_id: str) -> None:
    captions = captioned(core, dataset_id, only="dog", text="word " * 90)
    job_id = submit("caption_prototypes", caption_job_id=captions)
    done(core, job_id)
    (event,) = [event for event in events_of(core, job_id) if event.type == "warning.truncated_texts"]
    assert event.data == {"texts": 8, "of": 9, "tokens": 77}
    assert event.level == "warning"


def test_fewer_images_than_shots_are_told(core: Core, submit: Submit) -> None:
    job_id = submit("linear_probe", shots=9)
    assert done(core, job_id).details["fewer_shots"] == {"cat": 4, "dog": 4}
    assert "warning.fewer_shots" in types_of(core, job_id)


def test_fewer_val_images_than_shots_are_told_where_val_is_few_shot(core: Core, submit: Submit) -> None:
    job_id = submit("linear_probe", shots=4, validation="few_shot")
    done(core, job_id)
    (warning,) = (event for event in events_of(core, job_id) if event.type == "warning.fewer_shots")
    assert warning.data == {"split": "val", "classes": {"cat": 3, "dog": 3}}


# -- bad input that only the worker can see ------------------------------------------------------------------------


def test_a_data_set_without_val_images_fails_a_job_that_chooses_on_them(core: Core, model: Path) -> None:
    bare = add_dataset(core, images=2)
    request = {"model": str(model), "dataset_id": bare, "method": {"type": "linear_probe", "hyperparameters": {}}}
    with core.transaction() as session:
        body = FineTuningRequest.model_validate(request)
        job = create_run(session, session.get_one(Dataset, bare), body)
    failed = run(core, job.id)
    assert failed.error is not None
    assert (failed.status, failed.error["code"]) == ("failed", "no_val_split")


def test_a_model_outside_the_roots_fails_the_job(core: Core, submit: Submit, tmp_path: Path) -> None:
    write_tiny_clip(tmp_path / "elsewhere")
    job = run(core, submit("zero_shot", model=str(tmp_path / "elsewhere")))
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "model_not_allowed")


def test_a_failed_member_does_not_stop_the_others(core: Core, submit: Submit, dataset_id: str) -> None:
    group = add_group(core, dataset_id)
    bad = submit("zero_shot", group_id=group, model="/etc")
    good = submit("zero_shot", group_id=group)
    assert run(core, bad).status == "failed"
    assert done(core, good).group_id == group


def test_a_cancelled_run_leaves_no_classifier(core: Core, submit: Submit) -> None:
    job_id = submit("flyp", {**QUICK, "epochs": 1000})
    thread = threading.Thread(target=run, args=(core, job_id))
    thread.start()
    wait_for(lambda: (read_job(core, job_id).progress or {}).get("stage") == "training")
    change_job(core, job_id, cancel_requested=True)
    thread.join(30)
    assert read_job(core, job_id).status == "cancelled"
    with core.transaction() as session:
        assert session.scalars(select(Classifier)).all() == []
    assert checkpoints(core, job_id) == []


def test_a_paused_run_keeps_its_state_and_goes_on(core: Core, submit: Submit) -> None:
    job_id = submit("flyp", {**QUICK, "epochs": 40})
    thread = threading.Thread(target=run, args=(core, job_id))
    thread.start()
    wait_for(lambda: (read_job(core, job_id).progress or {}).get("stage") == "training")
    change_job(core, job_id, pause_requested=True)
    thread.join(30)
    paused = read_job(core, job_id)
    if paused.status == "succeeded":
        pytest.fail("the run was over before it could be paused")
    assert paused.status == "paused"
    (state,) = checkpoints(core, job_id)
    assert state.kind == "resume"
    change_job(core, job_id, status="queued")
    row = done(core, job_id)
    assert "training.resumed" in types_of(core, job_id)
    assert [each.kind for each in checkpoints(core, job_id)] == ["best"], "what it went on from is gone"
    whole = done(core, submit("flyp", {**QUICK, "epochs": 40}))
    left, right = (load_file(folder(core, each) / "open_clip_model.safetensors") for each in (row, whole))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_a_run_whose_saved_state_is_gone_begins_anew(core: Core, submit: Submit) -> None:
    job_id = submit("flyp", QUICK)
    add_checkpoint(core, job_id, 1, "resume", f"training/{job_id}-1-1")  # a database restored without its store
    done(core, job_id)
    assert "warning.begun_anew" in types_of(core, job_id)
    assert "training.resumed" not in types_of(core, job_id)


def test_a_run_whose_captions_were_edited_while_it_was_paused_begins_anew(
    core: Core, submit: Submit, dataset_id: str
) -> None:
    job_id = submit("mmft", {**QUICK, "epochs": 40}, caption_job_id=captioned(core, dataset_id))
    thread = threading.Thread(target=run, args=(core, job_id))
    thread.start()
    wait_for(lambda: (read_job(core, job_id).progress or {}).get("stage") == "training")
    change_job(core, job_id, pause_requested=True)
    thread.join(30)
    assert read_job(core, job_id).status == "paused"
    with core.transaction() as session:
        session.scalars(select(Caption)).first().text = "edited by hand"  # type: ignore[union-attr]
    change_job(core, job_id, status="queued")
    row = done(core, job_id)
    assert row.details["steps"] == 80
    (warning,) = (event for event in events_of(core, job_id) if event.type == "warning.begun_anew")
    assert warning.level == "warning"
    whole = done(core, submit("mmft", {**QUICK, "epochs": 40}, caption_job_id=row.caption_job_id))
    left, right = (load_file(folder(core, each) / "open_clip_model.safetensors") for each in (row, whole))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_a_step_without_finite_gradients_is_told_as_json_can(
    core: Core, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float16's first steps often are, which the optimiser skips."""
    monkeypatch.setattr("services.trainer.training.reports.StepReport.grad_norm", float("inf"))
    job_id = submit("flyp", QUICK)
    done(core, job_id)
    (first, *_) = (event.data for event in events_of(core, job_id) if event.type == "training.epoch")
    assert first is not None
    assert first["grad_norm"] is None
    assert first["loss"] > 0


def test_a_local_model_that_was_replaced_is_loaded_anew(
    core: Core, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.settings, "model_roots", [tmp_path])
    local = write_tiny_clip(tmp_path / "local")
    first = done(core, submit("zero_shot", model=str(local)))
    assert done(core, submit("zero_shot", model=str(local), seed=1)).id != first.id
    file = local / "open_clip_model.safetensors"
    weights = load_file(file)
    save_file({name: value + 0.01 if "bias" in name else value for name, value in weights.items()}, file)
    second = done(core, submit("zero_shot", model=str(local)))
    before, after = (read_card(folder(core, row)).base_revision for row in (first, second))
    assert before != after == load_clip(str(local), tmp_path, [tmp_path]).revision


# -- soup ----------------------------------------------------------------------------------------------------------


def test_a_soup_averages_what_does_not_lower_val(core: Core, submit: Submit, dataset_id: str, model: Path) -> None:
    group = add_group(core, dataset_id)
    members = [
        done(core, submit("flyp", {**QUICK, "learning_rate": rate, "precision": "fp32"}, group_id=group, seed=seed))
        for seed, rate in enumerate((1e-3, 3e-3, 1e-2))
    ]
    order = sorted(members, key=lambda row: (-row.details["val_top1"], row.id))
    chosen = {"group_id": group, "method": None, "classifier_ids": [row.id for row in order]}
    body = FineTuningRequest.model_validate(
        {"model": str(model), "dataset_id": dataset_id, "method": {"type": "soup", "hyperparameters": chosen}}
    )
    with core.transaction() as session:
        job_id = create_run(session, session.get_one(Dataset, dataset_id), body, group).id
    row = done(core, job_id)
    assert (row.method, row.group_id, row.protocol) == ("soup", group, "full")
    assert row.hyperparameters == {"group_id": group, "method": None}
    tried = row.details["chosen"]["val_top1_with_each"]
    assert tried[0] == order[0].details["val_top1"], "the first is the best run itself"
    assert row.details["members"][0] == order[0].id
    assert row.details["val_top1"] == max(tried) >= order[0].details["val_top1"]
    states = {
        each.id: load_file(folder(core, each) / "open_clip_model.safetensors")
        for each in members
        if each.id in row.details["members"]
    }
    soup = load_classifier(folder(core, row))
    for name, value in soup.clip.model.state_dict().items():
        mean = torch.stack([state[name].double() for state in states.values()]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)
    assert row.details["train_seconds"] >= sum(each.details["train_seconds"] for each in members)
    with core.transaction() as session:
        val = split_images(session, dataset_id, "val")
    pixels = load_pixels(None, core.store, val, soup.clip, lambda _: None)
    labels = torch.tensor([("cat", "dog").index(image.class_name) for image in val])
    assert isinstance(pixels, torch.Tensor)
    assert soup.head.top1(encode_image(soup.clip, pixels), labels) == row.details["val_top1"]


def test_a_soup_whose_member_was_deleted_fails_with_its_name(
    core: Core, submit: Submit, dataset_id: str, model: Path
) -> None:
    chosen = {"group_id": "grp_x", "method": None, "classifier_ids": ["clf_gone"]}
    body = FineTuningRequest.model_validate(
        {"model": str(model), "dataset_id": dataset_id, "method": {"type": "soup", "hyperparameters": chosen}}
    )
    with core.transaction() as session:
        job_id = create_run(session, session.get_one(Dataset, dataset_id), body).id
    job = run(core, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "not_found")
    assert "clf_gone" in job.error["message"]


# -- one cache, two writers ----------------------------------------------------------------------------------------


@pytest.mark.timeout(180)
def test_two_groups_may_fill_one_cache_at_once(
    core: Core, submit: Submit, model: Path, dataset_id: str, spawn: Callable[..., Popen[bytes]]
) -> None:
    """Two worker processes, the same images and captions, a cache that is empty when both begin."""
    captions = captioned(core, dataset_id)
    groups = [add_group(core, dataset_id, name=name) for name in ("one", "two")]
    plan: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("linear_probe", {}, {"shots": shots}) for shots in (1, 2, 3)
    ]
    plan += [("caption_prototypes", {}, {"caption_job_id": captions}), ("mmft", QUICK, {"caption_job_id": captions})]
    # One after the other from both groups, so that both workers are at the same things at the same time.
    jobs = [submit(name, values, group_id=group, **body) for name, values, body in plan for group in groups]
    environment = {
        "CAPTUNE_MODEL_ROOTS": str(model.parent),
        "CAPTUNE_MODEL_CACHE": str(core.settings.model_cache),
    }
    for _ in range(2):
        spawn("shared.jobs.worker", "fine_tune", **environment)
    wait_for(lambda: all(read_job(core, id).status in ("succeeded", "failed") for id in jobs), 150)
    rows = []
    for id in jobs:
        job = read_job(core, id)
        assert job.status == "succeeded", job.error
        assert job.attempt == 1
        with core.transaction() as session:
            rows.append(session.scalars(select(Classifier).where(Classifier.job_id == id)).one())
    assert len({read_job(core, id).worker for id in jobs}) == 2, "both took part"
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first.setting == second.setting
        heads = [load_file(folder(core, each) / "head.safetensors") for each in (first, second)]
        assert torch.equal(heads[0]["weight"], heads[1]["weight"])
    cache = open_cache(core.settings.model_cache / "rows", core.settings.cache_bytes)
    clip = load_clip(str(model), core.settings.model_cache, [model.parent])
    with core.transaction() as session:
        images, _ = draw_shots(split_images(session, dataset_id, "train"), None, 0)
    assert torch.equal(
        load_pixels(cache, core.store, images, clip, lambda _: None),  # type: ignore[arg-type]
        load_pixels(None, core.store, images, clip, lambda _: None),  # type: ignore[arg-type]
    )


def test_what_is_trained_on_is_of_one_moment(core: Core, submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits of captions tell settings apart, and are read after the texts."""
    gather, levels = tasks.gather, []

    def look(session: Session, *arguments: Any) -> Any:
        levels.append(session.connection().get_isolation_level())
        return gather(session, *arguments)

    monkeypatch.setattr(tasks, "gather", look)
    done(core, submit("linear_probe"))
    assert levels == ["REPEATABLE READ"]
