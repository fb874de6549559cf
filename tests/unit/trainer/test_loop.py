import copy
import math
from dataclasses import replace

import pytest
import torch
from open_clip.transformer import PatchDropout

from services.trainer.features import Features
from services.trainer.methods import build
from services.trainer.training.data import TrainData
from services.trainer.training.loop import Diverged, EpochReport, StepReport, train
from shared.clip.loading import LoadedClip, encode_image
from shared.errors import InvalidInput
from tests.unit.trainer.fine_tuning import (
    HP,
    STEPS,
    Classes,
    HeadOnly,
    Pairs,
    assert_same_weights,
    make,
    saved,
    tune,
)


def without_validation(data: TrainData) -> TrainData:
    return replace(data, val_images=data.val_images[:0], val_labels=data.val_labels[:0])


def test_dropout_is_on_while_training_and_off_in_what_is_measured(tiny, balls):
    clip = replace(tiny, model=copy.deepcopy(tiny.model))
    modes: list[bool] = []
    clip.model.visual.patch_dropout = PatchDropout(0.25)
    clip.model.visual.patch_dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    tune(clip, make(Pairs, epochs=2), balls)
    assert modes == [True, True, True, False] * 2  # three steps, one validation
    modes.clear()
    tune(clip, make(Pairs, epochs=1, trainable="text"), balls)
    assert modes == [False] * 4  # a tower that is not trained is a constant function


def test_seeds_decide_the_run_and_nothing_outside_is_touched(tiny, balls):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = tune(tiny, make(Classes), balls, seed=1)
    assert torch.equal(torch.rand(4), expected)  # the caller's generator goes on undisturbed
    other = tune(tiny, make(Classes), balls, seed=2)
    assert_same_weights(before, tiny.model.state_dict())
    assert not any(parameter.grad is not None for parameter in tiny.model.parameters())
    assert any(not torch.equal(first.model_state[k], other.model_state[k]) for k in before)


@pytest.mark.parametrize("method", [Pairs, Classes, HeadOnly])
def test_it_learns(tiny, balls, method):
    losses: list[float] = []
    options = {"trainable": "visual"} if method is HeadOnly else {}
    tuned = make(method, epochs=25, batch_size=5, **options)
    result = tune(tiny, tuned, balls, seed=0, on_step=lambda r: losses.append(r.loss))
    assert result.val_top1 == 1.0
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("method", [Pairs, Classes])
def test_the_best_epoch_is_kept_and_a_tie_keeps_the_earlier(tiny, balls, tmp_path, method):
    """The result is that epoch's weights, with the head by which its accuracy was measured."""
    result = tune(tiny, make(method, epochs=8), balls, seed=3, on_epoch=lambda r: r.snapshot(tmp_path / str(r.epoch)))
    history = result.val_history
    assert len(history) == 8
    assert len(set(history)) < 8  # ties occur
    assert result.best_epoch == history.index(max(history)) + 1
    assert result.val_top1 == max(history)
    assert result.best_epoch < 8
    then = saved("trained/", tmp_path / str(result.best_epoch))
    assert_same_weights({k: v for k, v in result.model_state.items() if k in then}, without_head(then))
    tuned = replace(tiny, model=copy.deepcopy(tiny.model))
    tuned.model.load_state_dict(result.model_state)
    assert result.head.top1(encode_image(tuned, balls.val_images), balls.val_labels) == result.val_top1
    if method is Classes:
        assert torch.equal(result.head.weight, then["head.weight"])


def without_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def test_without_validation_the_last_epoch_is_kept(tiny, balls, tmp_path):
    result = tune(tiny, make(Pairs), without_validation(balls), on_epoch=lambda r: r.snapshot(tmp_path / str(r.epoch)))
    assert (result.best_epoch, result.val_top1, result.val_history) == (4, None, [])
    last = saved("trained/", tmp_path / "4")
    assert_same_weights({k: v for k, v in result.model_state.items() if k in last}, last)


def test_the_last_epoch_is_kept_beside_the_best_where_asked(tiny, balls, tmp_path):
    options = {"seed": 3, "on_epoch": lambda r: r.snapshot(tmp_path / str(r.epoch))}
    result = tune(tiny, make(Classes, epochs=8), balls, keep_last=True, **options)
    assert result.best_epoch < 8
    assert result.last_state is not None
    assert result.last_head is not None
    last = saved("trained/", tmp_path / "8")
    assert_same_weights({k: v for k, v in result.last_state.items() if k in last}, without_head(last))
    assert torch.equal(result.last_head.weight, last["head.weight"])
    assert result.last_state.keys() == tiny.model.state_dict().keys()
    assert tune(tiny, make(Pairs, epochs=1), balls).last_state is None


def test_reports_of_a_run(tiny, balls):
    steps: list[StepReport] = []
    norms: list[float] = []
    epochs: list[EpochReport] = []

    def on_step(report: StepReport) -> None:
        steps.append(report)
        norms.append(report.grad_norm)

    result = tune(tiny, build("mmft", {**HP, "w": 0.1}), balls, on_step=on_step, on_epoch=epochs.append)
    assert [(s.step, s.epoch) for s in steps] == [(i + 1, i // 3 + 1) for i in range(STEPS)]
    assert {s.total_steps for s in steps} == {STEPS}
    assert [s.lr for s in steps] == pytest.approx(
        [3e-3 * 0.5 * (1 + math.cos(math.pi * i / STEPS)) for i in range(STEPS)]
    )
    for s in steps:
        assert s.loss == pytest.approx(0.1 * s.parts["sup"] + 0.9 * s.parts["clip"], rel=1e-5)
        assert s.images_per_s > 0
    assert all(norm > 0 for norm in norms)
    assert {s.step for s in steps if s.due} >= {1, 3, 6, 9, 12}  # the first, and each epoch's last
    assert len([s for s in steps if s.due]) < STEPS
    assert [(e.epoch, e.step) for e in epochs] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert epochs[-1].best_val_top1 == max(e.val_top1 or 0 for e in epochs)
    assert (result.peak_memory_bytes or 0) > 50 * 2**20  # torch alone is that much
    assert result.trainable_parameters == sum(p.numel() for p in tiny.model.parameters())


def test_a_gradient_norm_read_too_late_says_so(tiny, balls):
    steps: list[StepReport] = []
    tune(tiny, make(Pairs, epochs=1), balls, on_step=steps.append)
    with pytest.raises(RuntimeError, match="read grad_norm in the callback"):
        _ = steps[0].grad_norm


def test_an_epoch_visits_every_image_once_in_batches_of_even_size(tiny, balls):
    seen: list[torch.Tensor] = []

    class Recording(Pairs):
        def loss(self, batch):
            seen.append(batch.labels)
            return super().loss(batch)

    tune(tiny, make(Recording), balls, seed=0)
    assert [len(labels) for labels in seen] == [4, 3, 3] * 4
    for epoch in range(4):
        visited = torch.cat(seen[3 * epoch : 3 * epoch + 3])
        assert torch.equal(visited.sort().values, balls.labels.sort().values)
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:6]))  # shuffled anew


def test_images_read_row_by_row_give_the_same_run(tiny, balls):
    """Data larger than memory: another thread reads the next step's pixels meanwhile."""

    class OnDisk:
        def __init__(self, images: torch.Tensor) -> None:
            self._images, self.shape, self.reads = images, images.shape, 0

        def __len__(self) -> int:
            return len(self._images)

        def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
            self.reads += len(rows)
            return self._images[rows]

    lazy = replace(balls, images=OnDisk(balls.images), val_images=OnDisk(balls.val_images))
    assert_same_weights(tune(tiny, make(Pairs), lazy).model_state, tune(tiny, make(Pairs), balls).model_state)
    assert lazy.images.reads == 40  # 4 epochs of 10 images, each read once
    assert lazy.val_images.reads == 36


def test_batch_norm_statistics_stay_and_its_weights_train(tiny_resnet, balls):
    before = {name: value.clone() for name, value in tiny_resnet.model.state_dict().items()}
    after = tune(tiny_resnet, make(Pairs), balls).model_state
    statistics = [name for name in before if "running_" in name or "num_batches" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(before["visual.bn1.weight"], after["visual.bn1.weight"])


def test_the_logit_scale_trains_and_never_exceeds_100(tiny, balls):
    clip = replace(tiny, model=copy.deepcopy(tiny.model))
    clip.model.logit_scale.data.fill_(math.log(99.99))
    scales: list[float] = []

    class Eager(Pairs):
        def loss(self, batch):
            loss, parts = super().loss(batch)
            return loss - batch.logit_scale, parts

    result = tune(clip, make(Eager), balls, on_step=lambda r: scales.append(r.logit_scale))
    assert max(scales) == pytest.approx(100, rel=1e-5)
    assert scales[0] < scales[1]
    assert float(result.model_state["logit_scale"]) <= math.log(100) + 1e-6


def breaking(at: int) -> type[Pairs]:
    calls: list[int] = []

    class Breaks(Pairs):
        def loss(self, batch):
            calls.append(1)
            loss, parts = super().loss(batch)
            return (loss * float("nan") if len(calls) == at else loss), parts

    return Breaks


def test_a_loss_that_is_not_finite_stops_with_the_last_good_epoch(tiny, balls):
    with pytest.raises(Diverged, match=r"nan at step 8 of 12.*Lower learning_rate") as caught:
        tune(tiny, make(breaking(at=8)), balls)
    assert caught.value.code == "loss_not_finite"
    two_epochs = caught.value.last_good
    assert two_epochs is not None
    whole = tune(tiny, make(Pairs), balls)
    assert two_epochs.val_history == whole.val_history[:2]
    assert two_epochs.steps == 7
    assert all(torch.isfinite(value).all() for value in two_epochs.model_state.values())
    tuned = replace(tiny, model=copy.deepcopy(tiny.model))
    tuned.model.load_state_dict(two_epochs.model_state)
    right = two_epochs.head.top1(encode_image(tuned, balls.val_images), balls.val_labels)
    assert right == two_epochs.val_top1 == max(two_epochs.val_history)


def test_without_validation_the_last_good_epoch_is_the_last_one(tiny, balls):
    data = without_validation(balls)
    with pytest.raises(Diverged) as caught:
        tune(tiny, make(breaking(at=8)), data)
    assert caught.value.last_good is not None
    assert caught.value.last_good.best_epoch == 2


def test_before_the_first_epochs_end_there_is_no_good_one(tiny, balls):
    with pytest.raises(Diverged) as caught:
        tune(tiny, make(breaking(at=2)), balls)
    assert caught.value.last_good is None


def test_weights_that_are_not_finite_never_become_the_best(tiny, balls):
    """The loss of a step is finite although its gradients are not."""

    class BadGradients(Pairs):
        def loss(self, batch):
            loss, parts = super().loss(batch)
            return loss + (batch.image_emb.sum() * 0).sqrt() * 0, parts  # the root's slope at 0

    with pytest.raises(Diverged, match="Weights are not finite after step 1 of 2"):
        tune(tiny, make(BadGradients, batch_size=10, epochs=2), balls)


def test_frozen_text_is_encoded_once_and_frozen_images_are_validated_once(tiny, balls):
    clip = replace(tiny, model=copy.deepcopy(tiny.model))
    texts, images = [0], [0]
    clip.model.transformer.register_forward_hook(lambda *_: texts.__setitem__(0, texts[0] + 1))
    clip.model.visual.register_forward_hook(lambda *_: images.__setitem__(0, images[0] + 1))
    method = make(Pairs, trainable="visual")
    tune(clip, method, balls)
    of_features = 1
    assert texts[0] == of_features + 2  # every text of the run, and the prototypes
    assert images[0] == 4 * (3 + 1)
    images[0] = 0
    tune(clip, make(Pairs, trainable="text"), balls)
    assert images[0] == 4 * 3 + 1  # crops differ from step to step, the validation images don't


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
def test_unusable_data_is_refused_before_training(tiny: LoadedClip, balls, change, code):
    features = Features(balls.class_names, torch.eye(3, 16), 10.0)
    with pytest.raises(InvalidInput) as caught:
        train(tiny, build("mmft", HP), change(balls), features=features, seed=0, device="cpu")
    assert caught.value.code == code


def test_a_choice_on_validation_images_needs_some(tiny, balls):
    with pytest.raises(InvalidInput) as caught:
        tune(tiny, make(Pairs, wise_ft="val"), without_validation(balls))
    assert (caught.value.code, caught.value.param) == ("no_validation", "method.hyperparameters.wise_ft")
