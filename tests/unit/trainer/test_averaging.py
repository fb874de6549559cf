import copy
from dataclasses import replace

import pytest
import torch

from services.trainer.training.averaging import SHARES, choose_share
from services.trainer.training.loop import Run
from shared.classifier.head import Head
from shared.clip.loading import encode_image
from tests.unit.trainer.fine_tuning import Classes, Pairs, assert_same_weights, features_of, make, tune


def test_ema_is_the_running_average_and_is_what_is_validated_and_kept(tiny, balls):
    decay = 0.7
    method = make(Classes, ema=decay)
    with Run(tiny, method, balls, features_of(tiny, method, balls), 7, torch.device("cpu")) as run:
        expected = run.trained.copy()
        at_epoch: list[dict[str, torch.Tensor]] = []

        def on_step(report) -> None:
            for name, value in run.trained.parameters.items():
                expected[name] = decay * expected[name] + (1 - decay) * value.detach()

        def on_epoch(report) -> None:
            at_epoch.append(dict(expected))

        result = run.run(on_step, on_epoch)
        last = run.trained.copy()
    best = at_epoch[result.best_epoch - 1]
    for name, value in result.model_state.items():
        if name in best:
            torch.testing.assert_close(value, best[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.head.weight, best["head.weight"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(result.model_state["visual.proj"], last["visual.proj"], atol=1e-4)
    averaged = replace(tiny, model=copy.deepcopy(tiny.model))
    averaged.model.load_state_dict(result.model_state)
    assert result.head.top1(encode_image(averaged, balls.val_images), balls.val_labels) == result.val_top1


@pytest.mark.parametrize("method", [Pairs, Classes])
def test_wise_ft_interpolates_weights_and_head(tiny, balls, method):
    whole = tune(tiny, make(method), balls)
    half = tune(tiny, make(method, wise_ft=0.5), balls)
    base = tiny.model.state_dict()
    for name, value in half.model_state.items():
        torch.testing.assert_close(value, (base[name] + whole.model_state[name]) / 2)
    mixed = replace(tiny, model=copy.deepcopy(tiny.model))
    mixed.model.load_state_dict(half.model_state)
    if method is Classes:
        with Run(tiny, make(method), balls, features_of(tiny, make(method), balls), 7, torch.device("cpu")) as run:
            start = run.trained.copy()
        torch.testing.assert_close(half.head.weight, (start["head.weight"] + whole.head.weight) / 2)
        torch.testing.assert_close(half.head.bias, (start["head.bias"] + whole.head.bias) / 2)
    else:  # prototypes anew, by the mixed weights
        features = features_of(mixed, make(method), balls)
        expected = Head.of_prototypes(features.prototypes, features.logit_scale)
        torch.testing.assert_close(half.head.weight, expected.weight)
    top1 = half.head.top1(encode_image(mixed, balls.val_images), balls.val_labels)
    assert half.chosen["wise_ft"] == {"share": 0.5, "val_top1": top1}
    assert half.val_top1 == top1
    assert half.val_history == whole.val_history


def test_its_ends_are_the_base_model_and_the_fine_tuned_one(tiny, balls):
    base = tune(tiny, make(Pairs, wise_ft=0.0), balls)
    assert_same_weights(base.model_state, tiny.model.state_dict())
    whole = tune(tiny, make(Pairs), balls)
    assert_same_weights(tune(tiny, make(Pairs, wise_ft=1.0), balls).model_state, whole.model_state)


def test_adapters_are_interpolated_too(tiny, balls):
    whole = tune(tiny, make(Classes, trainable="lora"), balls)
    part = tune(tiny, make(Classes, trainable="lora", wise_ft=0.3), balls)
    base = tiny.model.state_dict()
    for name, value in part.model_state.items():
        torch.testing.assert_close(value, torch.lerp(base[name], whole.model_state[name], 0.3), rtol=1e-4, atol=1e-6)


def test_the_share_chosen_on_validation_images_is_the_curves_best(tiny, balls):
    result = tune(tiny, make(Pairs, wise_ft="val"), balls)
    record = result.chosen["wise_ft"]
    shares, accuracies = zip(*record["curve"], strict=True)
    assert list(shares) == SHARES == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert record["val_top1"] == result.val_top1 == max(accuracies)
    assert accuracies[-1] == max(result.val_history)
    assert record["share"] == max(s for s, a in record["curve"] if a == max(accuracies))
    fixed = tune(tiny, make(Pairs, wise_ft=record["share"]), balls)
    assert_same_weights(result.model_state, fixed.model_state)


def test_a_tie_keeps_the_larger_share():
    assert choose_share("val", lambda share: 0.5 if share < 0.75 else 0.4)[0] == 0.7
    assert choose_share("val", lambda share: 0.5)[0] == 1.0
    assert choose_share(0.4, lambda share: None) == (0.4, None, {"share": 0.4, "val_top1": None})
