"""GradCache, memory that runs out, and the precisions."""

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from open_clip.transformer import PatchDropout
from torch import Tensor, nn

from services.trainer.methods.base import FineTune
from services.trainer.training.encoding import chunks
from services.trainer.training.loop import Run
from services.trainer.training.optim import schedule
from shared.errors import InvalidInput
from tests.unit.trainer.fine_tuning import Classes, HeadOnly, Pairs, assert_same_weights, features_of, make, tune


def gradients(clip, method: FineTune, data) -> dict[str, Tensor]:
    """Of the first step."""
    with Run(clip, method, data, features_of(clip, method, data), 7, torch.device("cpu")) as run:
        run.gradients.compute(run.feed.draw(0), 0)
        return {name: p.grad.clone() for name, p in run.trained.parameters.items() if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6 * float(b[name].abs().max() + 1), msg=name)


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
@pytest.mark.parametrize("method", [Pairs, Classes, HeadOnly])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(tiny, balls, method, micro_batch):
    options: dict[str, Any] = {"batch_size": 10, "trainable": "visual" if method is HeadOnly else "full"}
    whole = gradients(tiny, make(method, **options), balls)
    assert ("head.weight" in whole) == (method is not Pairs)
    assert_close(gradients(tiny, make(method, **options, micro_batch=micro_batch), balls), whole)


def test_gradients_are_those_of_the_methods_own_loss(tiny, balls):
    """Against one backward pass written out, without the loop."""
    method = make(Pairs, batch_size=10)
    ours = gradients(tiny, method, balls)
    model = copy.deepcopy(tiny.model).train()
    with Run(tiny, method, balls, features_of(tiny, method, balls), 7, torch.device("cpu")) as run:
        draw = run.feed.draw(0)
    images = (draw.images.float() / 255 - 0.5) / 0.5
    image_emb = model.encode_image(images, normalize=True)
    text_emb = model.encode_text(run.texts.table.tokens[draw.texts], normalize=True)
    logits = model.logit_scale.exp() * image_emb @ text_emb.T
    own = torch.arange(10)
    loss = (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2
    loss.backward()
    assert_close(ours, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_dropout_is_drawn_once_for_a_part(tiny, balls):
    """The second encoding must see the first one's masks: compared with keeping every part's graph."""
    clip = replace(tiny, model=copy.deepcopy(tiny.model))
    clip.model.visual.patch_dropout = PatchDropout(0.5)
    method = make(Pairs, batch_size=10, micro_batch=4)
    cached = gradients(clip, method, balls)
    with Run(clip, method, balls, features_of(clip, method, balls), 7, torch.device("cpu")) as run:
        draw, g = run.feed.draw(0), run.gradients
        parts = chunks(0, 10, 4)
        assert parts == [(0, 4), (4, 8), (8, 10)]
        images = torch.cat([g._images(draw, 0, a, b) for a, b in parts])
        texts = torch.cat([g._texts(draw, 0, a, b) for a, b in parts])
        g._loss(draw, 0, [images, texts]).backward()
        kept = {name: p.grad for name, p in run.trained.parameters.items() if p.grad is not None}
    assert_close(cached, kept)
    without = gradients(tiny, method, balls)
    assert not torch.allclose(cached["visual.conv1.weight"], without["visual.conv1.weight"])  # there was dropout


class Small(nn.Module):
    """A tower whose memory holds `most` images with their activations, or four times as many without."""

    def __init__(self, tower: nn.Module, most: int) -> None:
        super().__init__()
        self.tower, self.most = tower, most

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most * (1 if torch.is_grad_enabled() else 4):
            raise torch.OutOfMemoryError("simulated")
        return self.tower(images)


def small(clip, most: int):
    clip = replace(clip, model=copy.deepcopy(clip.model))
    clip.model.visual = Small(clip.model.visual, most)
    return clip


def test_out_of_memory_halves_what_is_encoded_at_a_time_and_nothing_else(tiny, balls, caplog):
    method = make(Pairs, batch_size=10)
    seen: list[int | None] = []
    batches: list[int] = []

    class Counting(Pairs):
        def loss(self, batch):
            batches.append(len(batch.image_emb))
            return super().loss(batch)

    with caplog.at_level(logging.WARNING):
        result = tune(
            small(tiny, 3), make(Counting, batch_size=10), balls, on_step=lambda r: seen.append(r.micro_batch)
        )
    assert seen == [2, 2, 2, 2]  # 10, then 5, then 2
    assert [r.message for r in caplog.records if "out of memory" in r.message] == [
        "out of memory at step 1: encoding 5 rows at a time from here on instead of 10, for the same batch",
        "out of memory at step 1: encoding 2 rows at a time from here on instead of 5, for the same batch",
    ]
    assert set(batches) == {10}
    assert result.chosen == {"micro_batch": 2}
    plain = tune(small(tiny, 100), make(Pairs, batch_size=10, micro_batch=2), balls)
    assert_same_weights(result.model_state, plain.model_state)  # the draws of the step are the same
    assert_close(gradients(small(tiny, 3), method, balls), gradients(small(tiny, 100), method, balls))


def test_a_smaller_part_stays_after_a_resume(tiny, balls, tmp_path):
    clip, method = small(tiny, 3), make(Pairs, batch_size=10)
    whole = tune(clip, method, balls, on_step=lambda r: r.snapshot(tmp_path) if r.step == 2 else None)
    seen: list[int | None] = []
    again = tune(clip, method, balls, resume=tmp_path, on_step=lambda r: seen.append(r.micro_batch))
    assert seen == [2, 2]
    assert_same_weights(whole.model_state, again.model_state)


def test_one_image_that_does_not_fit_is_an_error(tiny, balls):
    with pytest.raises(InvalidInput, match="does not suffice for a single image") as caught:
        tune(small(tiny, 0), make(Pairs), balls)
    assert caught.value.code == "out_of_memory"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_learns_the_same(tiny, balls, precision):
    losses: dict[str, list[float]] = {"fp32": [], precision: []}
    for name, seen in losses.items():
        tune(tiny, make(Pairs, precision=name), balls, on_step=lambda r, seen=seen: seen.append(r.loss))
    assert losses[precision] != losses["fp32"]
    assert losses[precision][0] == pytest.approx(losses["fp32"][0], abs=0.05)


def test_with_fp16_the_schedule_waits_where_the_optimiser_had_to_skip(tiny, balls):
    """The scaler starts at 65536, where these gradients overflow."""
    rates: list[float] = []
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    states: list[dict[str, Tensor]] = []
    method = make(Pairs, precision="fp16", epochs=8)
    with Run(tiny, method, balls, features_of(tiny, method, balls), 7, torch.device("cpu")) as run:

        def on_step(report) -> None:
            rates.append(report.lr)
            states.append(run.trained.copy())

        run.run(on_step, lambda report: None)
        taken = int(run.optimizer.adamw.state[run.trained.parameters["visual.proj"]]["step"])
        scale = run.optimizer.scaler.get_scale()
    skipped = 24 - taken
    assert 0 < skipped < 12
    assert scale == 65536 / 2**skipped
    # A rate is used again after a skipped step, and then goes on without a gap.
    assert sorted(set(rates), reverse=True) == pytest.approx([3e-3 * schedule(i, 24) for i in range(len(set(rates)))])
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) in (taken, taken + 1)
    assert torch.equal(states[0]["visual.proj"], before["visual.proj"])  # the first was skipped
    assert not torch.equal(states[-1]["visual.proj"], before["visual.proj"])
