"""What the passes yield, against values worked out by hand or naively."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from services.evaluator.metrics import METRICS
from services.evaluator.passes import cost, retrieval
from services.evaluator.passes.base import sample
from services.evaluator.passes.caption_statistics import distinct_2
from services.evaluator.passes.corruptions import Corruptions
from services.evaluator.passes.cost import Cost
from services.evaluator.passes.forgetting import Forgetting
from services.evaluator.passes.retrieval import Retrieval


class Steps(list):
    def __call__(self, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.append((done, total))


def test_a_sample_is_fixed_and_spread():
    assert sample(3, 5) == [0, 1, 2]
    drawn = sample(10_000, 100)
    assert drawn == sample(10_000, 100) == sorted(set(drawn))
    assert len(drawn) == 100
    assert 4000 < np.mean(drawn) < 6000


def brightness_logits(batch):
    """A classifier of dark (0) and bright (1) images."""
    mean = batch.float().mean((1, 2, 3)) / 255
    return torch.stack([0.5 - mean, mean - 0.5], 1)


def greys(shades):
    return torch.stack([torch.full((3, 32, 32), shade, dtype=torch.uint8) for shade in shades])


def test_corruptions_are_scored_one_by_one():
    steps = Steps()
    shades = [30, 60, 200, 230]
    each = Corruptions(greys(shades), [0, 0, 1, 1], ["a", "b", "c", "d"], brightness_logits)
    found = dict(each.run(steps))
    assert found.keys() <= METRICS.keys()
    table = each.detail["top1"]
    assert table["contrast"] == table["jpeg_compression"] == table["pixelate"] == [1.0] * 5
    assert table["brightness"] == [1.0, 1.0, 0.75, 0.5, 0.5]  # 60 / 255 + 0.3 and 30 / 255 + 0.4 are over a half
    assert found["corruption_top1"] == pytest.approx(np.mean(list(table.values())))
    assert found["corruption_robustness"] == found["corruption_top1"]  # clean accuracy is 1
    assert each.detail["images"] == 4
    assert steps[-1] == (45, 45)
    again = Corruptions(greys(shades), [0, 0, 1, 1], ["a", "b", "c", "d"], brightness_logits)
    assert dict(again.run(steps)) == found


def test_robustness_is_relative_and_left_out_where_nothing_is_right():
    shades, names = [30, 60, 200, 230], ["a", "b", "c", "d"]
    half = Corruptions(greys(shades), [0, 1, 0, 1], names, brightness_logits)
    found = dict(half.run(Steps()))
    assert half.detail["clean_top1"] == 0.5
    assert found["corruption_robustness"] == pytest.approx(2 * found["corruption_top1"])
    none = dict(Corruptions(greys(shades), [1, 1, 0, 0], names, brightness_logits).run(Steps()))
    assert "corruption_robustness" not in none


def test_each_image_meets_its_own_corruption_whatever_stands_beside_it():
    seen = []

    def keep(batch):
        seen.append(batch)
        return brightness_logits(batch)

    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    list(Corruptions(images, [0, 0, 0], ["a", "b", "c"], keep).run(Steps()))
    first = seen[1]
    seen.clear()
    list(Corruptions(images.flip(0), [0, 0, 0], ["c", "b", "a"], keep).run(Steps()))
    assert torch.equal(first, seen[1].flip(0))
    assert not torch.equal(first, images)


def test_forgetting_is_what_the_base_model_knew():
    eye = torch.eye(3)

    def texts(names):
        assert names == ["a photo of a cat.", "a photo of a dog.", "a photo of a newt."]
        return eye

    before = (lambda: eye[[0, 1, 2, 1]], texts)
    after = (lambda: eye[[0, 2, 2, 2]], texts)
    found = dict(Forgetting(before, after, [0, 1, 2, 1], ["cat", "dog", "newt"]).run(Steps()))
    assert found == {"forgetting_before": 1.0, "forgetting_after": 0.5, "forgetting": 0.5}
    assert found.keys() <= METRICS.keys()


def naive_recalls(images, texts, own, k):
    similar = images @ texts.T
    to_text = 0
    for i in range(len(images)):
        best = max(float(similar[i, t]) for t in range(len(texts)) if own[t] == i)
        to_text += sum(float(similar[i, t]) >= best for t in range(len(texts)) if own[t] != i) < k
    to_image = sum(
        sum(float(similar[j, t]) >= float(similar[own[t], t]) for j in range(len(images)) if j != own[t]) < k
        for t in range(len(texts))
    )
    return to_text / len(images), to_image / len(texts)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_recalls_against_loops(monkeypatch, block):
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    rng = torch.Generator().manual_seed(0)
    own = torch.arange(40).repeat_interleave(2)[torch.randperm(80, generator=rng)]
    images = F.normalize(torch.randn(40, 8, generator=rng), dim=-1)
    texts = F.normalize(images[own] + 0.6 * torch.randn(80, 8, generator=rng), dim=-1)
    each = Retrieval(images, texts, own)
    found = dict(each.run(Steps()))
    assert found.keys() <= METRICS.keys()
    for k in (1, 5, 10):
        expected = naive_recalls(images, texts, own.tolist(), k)
        assert (found[f"image_to_text_r{k}"], found[f"text_to_image_r{k}"]) == pytest.approx(expected)
    assert 0 < found["image_to_text_r1"] < found["image_to_text_r10"]
    assert each.detail == {"images": 40, "captions": 80}


def test_a_model_that_tells_nothing_apart_finds_nothing():
    same = F.normalize(torch.ones(30, 4), dim=-1)
    found = dict(Retrieval(same, same, torch.arange(30)).run(Steps()))
    assert set(found.values()) == {0.0}


def test_distinct_2_by_hand():
    assert distinct_2(["a soft coat", "A soft, coat", "a long coat"]) == pytest.approx(4 / 6)
    assert distinct_2(["word", ""]) == 0.0


def test_latency_is_measured_once_for_an_architecture(tiny, monkeypatch):
    monkeypatch.setattr(cost, "_measured", {})
    calls = []

    def logits(batch):
        calls.append(tuple(batch.shape))
        return torch.zeros(len(batch), 3)

    each = Cost(tiny, 3, logits)
    found = dict(each.run(Steps()))
    assert found["latency_ms"] > 0
    assert {shape[0] for shape in calls} == {1, 32}
    assert set(each.detail["latency_ms"]) == {"1", "32"}
    before = len(calls)
    assert dict(Cost(tiny, 3, logits).run(Steps())) == found
    assert len(calls) == before
