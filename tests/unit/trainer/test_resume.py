"""A run that is stopped, or killed, and resumed ends with the very bits of an undisturbed one (on the CPU)."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from open_clip.transformer import PatchDropout

from services.trainer.methods import build
from services.trainer.training.loop import EpochReport, StepReport, train
from services.trainer.training.state import FILE, read_state
from shared.errors import InvalidInput
from tests.unit.trainer.fine_tuning import (
    HP,
    STEPS,
    Classes,
    HeadOnly,
    Pairs,
    Stop,
    assert_same_result,
    features_of,
    interrupted_then_resumed,
    make,
    tune,
)

EVERYTHING = {"ema": 0.8, "warmup": 0.25, "layer_decay": 0.8, "max_grad_norm": 1.0, "micro_batch": 3, "decay": "all"}
CASES = {
    "mmft": lambda: build("mmft", HP),
    "image texts": lambda: make(Pairs),
    "image texts, every option": lambda: make(Pairs, **EVERYTHING, wise_ft="val"),
    "class texts and a head": lambda: make(Classes, wise_ft=0.6),
    "class texts and a head, EMA": lambda: make(Classes, **EVERYTHING),
    "no texts": lambda: make(HeadOnly, trainable="visual"),
    "adapters": lambda: make(Classes, trainable="lora", wise_ft="val"),
    "adapters, EMA": lambda: make(Pairs, trainable="lora", lora_rank=2, ema=0.5),
    "text tower": lambda: make(Pairs, trainable="text"),
    "projections": lambda: make(Classes, trainable="projections"),
    "bf16": lambda: make(Pairs, precision="bf16"),
    "fp16": lambda: make(Pairs, precision="fp16", max_grad_norm=1.0, ema=0.5),
}


@pytest.fixture
def forgetful(tiny):
    """With a part that draws from torch's global generator, as dropout does."""
    clip = replace(tiny, model=copy.deepcopy(tiny.model))
    clip.model.visual.patch_dropout = PatchDropout(0.25)
    return clip


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_as_an_undisturbed_one(forgetful, balls, tmp_path, case):
    method = CASES[case]()
    undisturbed = tune(forgetful, method, balls, keep_last=True)
    stops = sorted(random.Random(case).sample(range(1, STEPS + 1), 3))
    torch.manual_seed(99)  # whatever the process drew before must not matter
    resumed = interrupted_then_resumed(forgetful, method, balls, tmp_path, stops, keep_last=True)
    assert_same_result(undisturbed, resumed)


def test_at_every_step(forgetful, balls, tmp_path):
    method = make(Classes, ema=0.8)
    undisturbed = tune(forgetful, method, balls)
    assert_same_result(undisturbed, interrupted_then_resumed(forgetful, method, balls, tmp_path, range(1, STEPS + 1)))


def test_a_convolutional_tower_resumes_exactly_too(tiny_resnet, balls, tmp_path):
    """Its weights lie channels last in memory, and so must AdamW's moments; without validation, too."""
    data = replace(balls, val_images=balls.val_images[:0], val_labels=balls.val_labels[:0])
    for method in (make(Pairs), make(Classes, trainable="lora")):
        undisturbed = tune(tiny_resnet, method, data)
        assert_same_result(undisturbed, interrupted_then_resumed(tiny_resnet, method, data, tmp_path, [4, 8]))


def test_a_state_older_than_the_interruption_serves_as_well(tiny, balls, tmp_path):
    method = make(Pairs)

    def killed_at_9(report: StepReport) -> None:
        if report.step == 5:
            report.snapshot(tmp_path)
        if report.step == 9:
            raise Stop

    with pytest.raises(Stop):
        tune(tiny, method, balls, on_step=killed_at_9)
    assert_same_result(tune(tiny, method, balls), tune(tiny, method, balls, resume=tmp_path))


def test_stopping_in_the_epoch_report_resumes_after_its_validation(tiny, balls, tmp_path):
    method = make(Pairs)

    def stop_at_2(report: EpochReport) -> None:
        if report.epoch == 2:
            report.snapshot(tmp_path)
            raise Stop

    with pytest.raises(Stop):
        tune(tiny, method, balls, on_epoch=stop_at_2)
    epochs: list[int] = []
    resumed = tune(tiny, method, balls, resume=tmp_path, on_epoch=lambda r: epochs.append(r.epoch))
    assert epochs == [3, 4]
    assert_same_result(tune(tiny, method, balls), resumed)


def test_a_state_of_another_run_is_refused(tiny, balls, tmp_path):
    method = make(Pairs)
    tune(tiny, method, balls, seed=1, on_epoch=lambda r: r.snapshot(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]  # nothing temporary is left
    other_weights = replace(tiny, model=copy.deepcopy(tiny.model))
    with torch.no_grad():
        other_weights.model.ln_final.bias[0] += 0.5
    for clip, other, data, seed in (
        (tiny, method, balls, 2),
        (tiny, make(Pairs, weight_decay=0.5), balls, 1),
        (tiny, method, replace(balls, captions=[["other"]] * 10), 1),
        (other_weights, method, balls, 1),
    ):
        with pytest.raises(InvalidInput, match="another model, method, seed or data"):
            tune(clip, other, data, seed=seed, resume=tmp_path)


def test_a_truncated_missing_or_older_state_is_refused(tiny, balls, tmp_path):
    method = make(Pairs, epochs=1)
    arguments = {"features": features_of(tiny, method, balls), "seed": 1, "resume": tmp_path, "device": "cpu"}
    with pytest.raises(InvalidInput, match="cannot be read"):
        train(tiny, method, balls, **arguments)
    tune(tiny, method, balls, seed=1, on_epoch=lambda r: r.snapshot(tmp_path))
    file = tmp_path / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        train(tiny, method, balls, **arguments)
    assert caught.value.code == "state_unreadable"
    file.write_bytes(whole.replace(b'\\"format\\": 2', b'\\"format\\": 1'))
    with pytest.raises(InvalidInput, match="has format 1, this version reads 2"):
        read_state(tmp_path)
