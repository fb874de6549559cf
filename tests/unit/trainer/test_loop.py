import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_clip.transformer import PatchDropout

from services.trainer.data import TrainData
from services.trainer.loop import EpochReport, StepReport, train
from services.trainer.methods import build
from services.trainer.methods.flyp import FLYP
from services.trainer.methods.zero_shot import ZeroShot
from services.trainer.optim import build_optimizer
from services.trainer.state import FILE, read_state
from shared.clip import LoadedClip, encode_image, encode_text
from shared.errors import InvalidInput

# 10 images in batches of 4 are 3 steps an epoch
HP = {"epochs": 4, "batch_size": 4, "learning_rate": 3e-3, "horizontal_flip": True}
STEPS = 12


class Stop(Exception):
    pass


def weights_under(prefix: str, directory: Path) -> dict[str, torch.Tensor]:
    tensors, _ = read_state(directory)
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def interrupted_then_resumed(clip, method, data, directory, stops):
    """Stop after each of the given steps, with a state saved there, and start anew from it; the last call finishes."""
    resume = None
    for stop in stops:

        def on_step(report: StepReport, stop: int = stop) -> None:
            if report.step == stop:
                report.snapshot(directory)
                raise Stop

        with pytest.raises(Stop):
            train(clip, method, data, seed=7, resume=resume, on_step=on_step, device="cpu")
        resume = directory
    return train(clip, method, data, seed=7, resume=resume, device="cpu")


@pytest.mark.parametrize("stops", [[1], [5], [3], [STEPS], [2, 6, 7, 11]])
def test_an_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(tiny, balls, tmp_path, stops):
    """Also with a part that draws from torch's global generator, as dropout does."""
    clip = replace(tiny, model=copy.deepcopy(tiny.model))
    clip.model.visual.patch_dropout = PatchDropout(0.25)
    method = build("mmft", HP)
    undisturbed = train(clip, method, balls, seed=7, device="cpu")
    torch.manual_seed(99)  # whatever the process drew before must not matter
    resumed = interrupted_then_resumed(clip, method, balls, tmp_path, stops)
    assert_same_weights(undisturbed.model_state, resumed.model_state)
    assert torch.equal(undisturbed.prototypes, resumed.prototypes)
    assert undisturbed.val_history == resumed.val_history
    assert (undisturbed.best_epoch, undisturbed.steps) == (resumed.best_epoch, resumed.steps)


def test_dropout_is_on_while_training_and_off_in_what_is_measured(tiny, balls):
    clip = replace(tiny, model=copy.deepcopy(tiny.model))
    modes: list[bool] = []
    clip.model.visual.patch_dropout = PatchDropout(0.25)
    clip.model.visual.patch_dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    train(clip, build("flyp", {**HP, "epochs": 2}), balls, seed=7, device="cpu")
    assert modes == [True, True, True, False] * 2  # three steps, one validation


def test_a_convolutional_tower_resumes_exactly_too(tiny_resnet, balls, tmp_path):
    """Its weights lie channels last in memory, and so must AdamW's moments."""
    method, data = build("flyp", HP), replace(balls, val_images=balls.val_images[:0], val_labels=balls.val_labels[:0])
    undisturbed = train(tiny_resnet, method, data, seed=7, device="cpu")
    resumed = interrupted_then_resumed(tiny_resnet, method, data, tmp_path, [4, 8])
    assert_same_weights(undisturbed.model_state, resumed.model_state)


def test_a_state_older_than_the_interruption_serves_as_well(tiny, balls, tmp_path):
    method = build("mmft", HP)
    undisturbed = train(tiny, method, balls, seed=7, device="cpu")

    def killed_at_9(report: StepReport) -> None:
        if report.step == 5:
            report.snapshot(tmp_path)
        if report.step == 9:
            raise Stop

    with pytest.raises(Stop):
        train(tiny, method, balls, seed=7, on_step=killed_at_9, device="cpu")
    resumed = train(tiny, method, balls, seed=7, resume=tmp_path, device="cpu")
    assert_same_weights(undisturbed.model_state, resumed.model_state)


def test_stopping_in_the_epoch_report_resumes_after_its_validation(tiny, balls, tmp_path):
    method = build("mmft", HP)

    def stop_at_2(report: EpochReport) -> None:
        if report.epoch == 2:
            report.snapshot(tmp_path)
            raise Stop

    with pytest.raises(Stop):
        train(tiny, method, balls, seed=7, on_epoch=stop_at_2, device="cpu")
    epochs: list[int] = []
    resumed = train(
        tiny, method, balls, seed=7, resume=tmp_path, on_epoch=lambda r: epochs.append(r.epoch), device="cpu"
    )
    assert epochs == [3, 4]
    assert_same_weights(train(tiny, method, balls, seed=7, device="cpu").model_state, resumed.model_state)


def test_seeds_decide_the_run_and_nothing_outside_is_touched(tiny, balls):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    method = build("mmft", HP)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = train(tiny, method, balls, seed=1, device="cpu")
    assert torch.equal(torch.rand(4), expected)  # the caller's generator goes on undisturbed
    other = train(tiny, method, balls, seed=2, device="cpu")
    assert_same_weights(before, tiny.model.state_dict())
    assert any(not torch.equal(first.model_state[k], other.model_state[k]) for k in before)


def test_it_learns(tiny, balls):
    losses: list[float] = []
    hp = {"epochs": 25, "batch_size": 5, "learning_rate": 3e-3}
    result = train(
        tiny, build("mmft", hp), balls, seed=0, on_step=lambda r: losses.append(r.parts["clip"]), device="cpu"
    )
    assert result.val_top1 == 1.0
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_best_epoch_is_kept_and_a_tie_keeps_the_earlier(tiny, balls, tmp_path):
    result = train(
        tiny,
        build("mmft", {**HP, "epochs": 8}),
        balls,
        seed=3,
        on_epoch=lambda r: r.snapshot(tmp_path / str(r.epoch)),
        device="cpu",
    )
    history = result.val_history
    assert len(history) == 8
    assert len(set(history)) < 8  # ties occur
    assert result.best_epoch == history.index(max(history)) + 1
    assert result.val_top1 == max(history)
    assert result.best_epoch < 8
    assert_same_weights(result.model_state, weights_under("model/", tmp_path / str(result.best_epoch)))
    tiny_trained = replace(tiny, model=copy.deepcopy(tiny.model))
    tiny_trained.model.load_state_dict(result.model_state)
    right = (encode_image(tiny_trained, balls.val_images) @ result.prototypes.T).argmax(1) == balls.val_labels
    assert float(right.double().mean()) == result.val_top1


def test_without_validation_the_last_epoch_is_kept(tiny, balls, tmp_path):
    data = replace(balls, val_images=balls.val_images[:0], val_labels=balls.val_labels[:0])
    result = train(
        tiny,
        build("mmft", HP),
        data,
        seed=3,
        on_epoch=lambda r: r.snapshot(tmp_path / str(r.epoch)),
        device="cpu",
    )
    assert (result.best_epoch, result.val_top1, result.val_history) == (4, None, [])
    assert_same_weights(result.model_state, weights_under("model/", tmp_path / "4"))


def test_reports_of_a_run(tiny, balls):
    steps: list[StepReport] = []
    epochs: list[EpochReport] = []
    train(tiny, build("mmft", HP), balls, seed=0, on_step=steps.append, on_epoch=epochs.append, device="cpu")
    assert [(s.step, s.epoch) for s in steps] == [(i + 1, i // 3 + 1) for i in range(STEPS)]
    assert {s.total_steps for s in steps} == {STEPS}
    assert [s.lr for s in steps] == pytest.approx(
        [3e-3 * 0.5 * (1 + math.cos(math.pi * i / STEPS)) for i in range(STEPS)]
    )
    for s in steps:
        assert s.loss == pytest.approx(0.1 * s.parts["sup"] + 0.9 * s.parts["clip"], rel=1e-5)
        assert s.images_per_s > 0
    assert [(e.epoch, e.step) for e in epochs] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert epochs[-1].best_val_top1 == max(e.val_top1 or 0 for e in epochs)


def test_an_epoch_visits_every_image_once_in_batches_of_even_size(tiny, balls):
    seen: list[torch.Tensor] = []

    class Recording(FLYP):
        def loss(self, image_emb, text_emb, logit_scale, labels):
            seen.append(labels)
            return super().loss(image_emb, text_emb, logit_scale, labels)

    train(tiny, Recording(FLYP.parse(HP)), balls, seed=0, device="cpu")
    assert [len(labels) for labels in seen] == [4, 3, 3] * 4
    for epoch in range(4):
        visited = torch.cat(seen[3 * epoch : 3 * epoch + 3])
        assert torch.equal(visited.sort().values, balls.labels.sort().values)
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:6]))  # shuffled anew


def test_batch_norm_statistics_stay_and_its_weights_train(tiny_resnet, balls):
    before = {name: value.clone() for name, value in tiny_resnet.model.state_dict().items()}
    after = train(tiny_resnet, build("flyp", HP), balls, seed=0, device="cpu").model_state
    statistics = [name for name in before if "running_" in name or "num_batches" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(before["visual.bn1.weight"], after["visual.bn1.weight"])


def test_the_logit_scale_trains_and_never_exceeds_100(tiny, balls):
    clip = replace(tiny, model=copy.deepcopy(tiny.model))
    clip.model.logit_scale.data.fill_(math.log(99.99))

    class WantsMore(FLYP):
        def loss(self, image_emb, text_emb, logit_scale, labels):
            return -logit_scale + 0 * image_emb.sum() + 0 * text_emb.sum(), {}

    scales: list[float] = []
    result = train(
        clip,
        WantsMore(FLYP.parse({**HP, "learning_rate": 0.1})),
        balls,
        seed=0,
        on_step=lambda r: scales.append(r.logit_scale),
        device="cpu",
    )
    assert max(scales) == pytest.approx(100, rel=1e-5)
    assert scales[0] < scales[1]
    assert float(result.model_state["logit_scale"]) <= math.log(100) + 1e-6


def test_weight_decay_spares_norms_biases_and_the_scale(tiny):
    decayed, spared = build_optimizer(tiny.model, 1e-3, 0.5).param_groups
    names = {parameter: name for name, parameter in tiny.model.named_parameters()}
    spared_names = {names[p] for p in spared["params"]}
    assert decayed["weight_decay"] == 0.5
    assert spared["weight_decay"] == 0
    assert {"logit_scale", "ln_final.weight", "ln_final.bias", "visual.ln_pre.weight"} <= spared_names
    assert {"text_projection", "visual.conv1.weight"} <= {names[p] for p in decayed["params"]}
    assert len(names) == len(decayed["params"]) + len(spared["params"])


def test_a_loss_that_is_not_finite_stops_with_a_clear_error(tiny, balls):
    calls = []

    class Breaks(FLYP):
        def loss(self, image_emb, text_emb, logit_scale, labels):
            calls.append(1)
            loss, parts = super().loss(image_emb, text_emb, logit_scale, labels)
            return (loss * float("nan") if len(calls) == 5 else loss), parts

    with pytest.raises(InvalidInput, match=r"nan at step 5 of 12.*Lower learning_rate") as caught:
        train(tiny, Breaks(FLYP.parse(HP)), balls, seed=0, device="cpu")
    assert caught.value.code == "loss_not_finite"


def test_a_state_of_another_run_is_refused(tiny, balls, tmp_path):
    method = build("mmft", HP)
    train(tiny, method, balls, seed=1, on_epoch=lambda r: r.snapshot(tmp_path), device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]  # nothing temporary is left
    for other in (
        {"seed": 2, "method": method, "data": balls},
        {"seed": 1, "method": build("mmft", {**HP, "w": 0.2}), "data": balls},
        {"seed": 1, "method": method, "data": replace(balls, captions=[["other"]] * 10)},
    ):
        with pytest.raises(InvalidInput, match="another model, method, seed or data"):
            train(tiny, other["method"], other["data"], seed=other["seed"], resume=tmp_path, device="cpu")


def test_a_truncated_or_missing_state_is_refused(tiny, balls, tmp_path):
    method = build("flyp", {**HP, "epochs": 1})
    with pytest.raises(InvalidInput, match="cannot be read"):
        train(tiny, method, balls, seed=1, resume=tmp_path, device="cpu")
    train(tiny, method, balls, seed=1, on_epoch=lambda r: r.snapshot(tmp_path), device="cpu")
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        train(tiny, method, balls, seed=1, resume=tmp_path, device="cpu")
    assert caught.value.code == "state_unreadable"


def test_zero_shot_trains_nothing_and_needs_no_images(tiny: LoadedClip):
    names = ["cat", "dog"]
    nothing = TrainData(torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), [], names)
    result = train(tiny, build("zero_shot", {}), nothing, seed=0, device="cpu")
    assert_same_weights(result.model_state, tiny.model.state_dict())
    torch.testing.assert_close(result.prototypes, encode_text(tiny, ["a photo of a cat.", "a photo of a dog."]))
    assert (result.steps, result.best_epoch, result.trainable_parameters) == (0, 0, 0)
    ensemble = train(tiny, build("zero_shot_ensemble", {}), nothing, seed=0, device="cpu").prototypes
    assert not torch.allclose(ensemble, result.prototypes)
    torch.testing.assert_close(ensemble.norm(dim=1), torch.ones(2))


def test_zero_shot_reports_its_validation(tiny, balls):
    result = train(tiny, ZeroShot(ZeroShot.parse({})), balls, seed=0, device="cpu")
    assert result.val_top1 is not None
    assert result.val_history == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: replace(d, class_names=d.class_names[:1]), "too_little_data"),
        (lambda d: replace(d, images=d.images[:, :, :16]), "image_shape"),
        (lambda d: replace(d, images=d.images[:5]), "image_shape"),
        (lambda d: replace(d, val_labels=d.val_labels[:5]), "image_shape"),
        (lambda d: replace(d, labels=d.labels + 1), "label_out_of_range"),
        (lambda d: replace(d, captions=d.captions[:5]), "caption_count"),
        (lambda d: replace(d, captions=[[] for _ in d.captions]), "captions_missing"),
    ],
)
def test_unusable_data_is_refused_before_training(tiny, balls, change, code):
    with pytest.raises(InvalidInput) as caught:
        train(tiny, build("mmft", HP), change(balls), seed=0, device="cpu")
    assert caught.value.code == code
