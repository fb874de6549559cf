import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from services.trainer.features import Features
from services.trainer.methods import METHODS, PRESETS, build, describe
from services.trainer.methods.base import Batch, FineTune
from shared.errors import InvalidInput

FINE_TUNES = [name for name, method in METHODS.items() if method.kind == "fine_tune"]


def test_importing_the_methods_costs_no_torch():
    code = (
        "import sys, services.trainer.methods as m; m.describe(); [m.build(name, {}) for name in m.METHODS]; "
        "sys.exit('torch' in sys.modules or 'open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_are_those_of_the_table():
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
    assert len({method.summary for method in METHODS.values()}) == len(METHODS)


def test_each_method_cites_its_paper():
    for name, method in METHODS.items():
        identifier = method.source.rpartition("arXiv ")[2]
        assert len(identifier) == 10, name
        assert identifier in (sys.modules[method.__module__].__doc__ or ""), name


def test_presets_of_mmft_are_the_papers_and_ours():
    paper, ours = (build("mmft", {}, preset).hyperparameters.model_dump() for preset in ("paper", "default"))
    expected = {
        "w": 0.1,
        "variant": "exclude_self",
        "decay": "all",
        "learning_rate": 1e-5,
        "weight_decay": 1e-4,
        "batch_size": 64,
        "epochs": 50,
        "trainable": "full",
        "captions_per_image": None,
        "caption_sentences": False,
    }
    assert {name: paper[name] for name in expected} == expected
    assert {name for name in ours if ours[name] != paper[name]} == {"w", "variant", "decay"}
    assert (ours["w"], ours["variant"], ours["decay"]) == (0.6, "include_self", "matrices")


def test_defaults_that_the_papers_state():
    lora, tes, prolip = (build(name, {}).hyperparameters.model_dump() for name in ("lora", "tes", "prolip"))
    assert (lora["lora_rank"], lora["learning_rate"], lora["weight_decay"], lora["batch_size"]) == (2, 2e-4, 1e-2, 32)
    assert (tes["lambda_v"], tes["lambda_t"], tes["tau"], tes["trainable"]) == (0.1, 0.3, 0.03, "visual")
    assert (prolip["steps"], prolip["learning_rate"], prolip["penalty"]) == (300, 1e-5, None)


def test_what_is_given_goes_before_the_preset():
    assert build("mmft", {"w": 0.3}, "paper").hyperparameters.model_dump()["w"] == 0.3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", METHODS)
def test_hyperparameters_as_they_are_recorded_build_the_same_method(name, preset):
    built = build(name, {}, preset).hyperparameters
    recorded = json.loads(json.dumps(built.model_dump(mode="json")))
    for other in PRESETS:
        assert build(name, recorded, other).hyperparameters == built


def test_every_hyperparameter_says_what_it_is_its_unit_and_its_default():
    for method in describe():
        for name, schema in method["hyperparameters"].get("properties", {}).items():
            assert {"description", "unit", "default"} <= set(schema), (method["name"], name)
        assert set(method["presets"]) == set(PRESETS)
        for values in method["presets"].values():
            assert set(values) <= set(method["hyperparameters"]["properties"])


def test_what_describes_a_method():
    found = {m["name"]: (m["kind"], m["needs_captions"], m["trains"]) for m in describe()}
    assert found == {
        "mmft": ("fine_tune", True, True),
        "flyp": ("fine_tune", False, True),
        "flyp_ensemble": ("fine_tune", False, True),
        "cross_entropy": ("fine_tune", False, True),
        "lp_ft": ("fine_tune", False, True),
        "lora": ("fine_tune", False, True),
        "tes": ("fine_tune", False, True),
        "linear_probe": ("frozen", False, True),
        "gda": ("frozen", False, True),
        "prolip": ("frozen", False, True),
        "caption_prototypes": ("zero_shot", True, False),
        "zero_shot": ("zero_shot", False, False),
        "zero_shot_ensemble": ("zero_shot", False, False),
    }


BAD = [
    ("mmft", {"w": 1.1}, "w"),
    ("mmft", {"w": -0.1}, "w"),
    ("mmft", {"w": "much"}, "w"),
    ("mmft", {"w": "0.5"}, "w"),
    ("mmft", {"w": True}, "w"),
    ("mmft", {"w": None}, "w"),
    ("mmft", {"w": float("nan")}, "w"),
    ("mmft", {"w": [0.5]}, "w"),
    ("mmft", {"variant": "other"}, "variant"),
    ("mmft", {"captions_per_image": 0}, "captions_per_image"),
    ("mmft", {"captions_per_image": 1.0}, "captions_per_image"),
    ("mmft", {"caption_sentences": 1}, "caption_sentences"),
    ("mmft", {"epochs": 0}, "epochs"),
    ("mmft", {"epochs": 2.5}, "epochs"),
    ("mmft", {"epochs": True}, "epochs"),
    ("mmft", {"epochs": 10**9}, "epochs"),
    ("mmft", {"batch_size": 1}, "batch_size"),
    ("mmft", {"micro_batch": 0}, "micro_batch"),
    ("mmft", {"learning_rate": 0}, "learning_rate"),
    ("mmft", {"learning_rate": math.inf}, "learning_rate"),
    ("mmft", {"warmup": 1}, "warmup"),
    ("mmft", {"weight_decay": -1}, "weight_decay"),
    ("mmft", {"decay": "some"}, "decay"),
    ("mmft", {"layer_decay": 0}, "layer_decay"),
    ("mmft", {"max_grad_norm": 0}, "max_grad_norm"),
    ("mmft", {"trainable": "nothing"}, "trainable"),
    ("mmft", {"lora_rank": 8}, "lora_rank"),  # would be ignored: trainable is full
    ("mmft", {"trainable": "visual", "lora_towers": "text"}, "lora_towers"),
    ("mmft", {"ema": 1.0}, "ema"),
    ("mmft", {"wise_ft": 1.5}, "wise_ft"),
    ("mmft", {"wise_ft": 2}, "wise_ft"),
    ("mmft", {"wise_ft": "test"}, "wise_ft"),
    ("mmft", {"horizontal_flip": "yes"}, "horizontal_flip"),
    ("mmft", {"precision": "fp8"}, "precision"),
    ("flyp", {"w": 0.1}, "w"),
    ("flyp_ensemble", {"templates": 7}, "templates"),
    ("cross_entropy", {"label_smoothing": 1.0}, "label_smoothing"),
    ("cross_entropy", {"trainable": "text"}, "trainable"),
    ("cross_entropy", {"trainable": "lora", "lora_towers": "both"}, "lora_towers"),
    ("cross_entropy", {"lora_rank": 8}, "lora_rank"),
    ("lp_ft", {"inverse_regularisation": 0}, "inverse_regularisation"),
    ("lora", {"trainable": "full"}, "trainable"),
    ("lora", {"lora_rank": 0}, "lora_rank"),
    ("lora", {"lora_towers": "neither"}, "lora_towers"),
    ("tes", {"lambda_v": 1.1}, "lambda_v"),
    ("tes", {"lambda_t": -0.1}, "lambda_t"),
    ("tes", {"tau": 0}, "tau"),
    ("linear_probe", {"inverse_regularisation": -1.0}, "inverse_regularisation"),
    ("linear_probe", {"epochs": 3}, "epochs"),
    ("gda", {"alpha": -1}, "alpha"),
    ("gda", {"alpha": float("nan")}, "alpha"),
    ("prolip", {"steps": 0}, "steps"),
    ("prolip", {"penalty": "1/N"}, "penalty"),
    ("caption_prototypes", {"captions_per_image": -1}, "captions_per_image"),
    ("zero_shot", {"epochs": 3}, "epochs"),
    ("zero_shot_ensemble", {"": 3}, ""),
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("method", "values", "param"), BAD)
def test_bad_hyperparameters_are_named(method, values, param, preset):
    with pytest.raises(InvalidInput, match=f"`{param}` of method `{method}`") as caught:
        build(method, values, preset)
    assert caught.value.param == f"method.hyperparameters.{param}"
    assert caught.value.code == "invalid_hyperparameter"


def test_a_value_of_either_of_two_types_is_told_of_both():
    with pytest.raises(InvalidInput, match=r"valid number or .*'val'"):
        build("mmft", {"wise_ft": "test"})


def test_a_huge_value_is_not_repeated_in_full():
    with pytest.raises(InvalidInput) as caught:
        build("mmft", {"w": "x" * 10**6})
    assert len(caught.value.message) < 2000


def test_lora_options_count_where_adapters_are_trained():
    hp = build("mmft", {"trainable": "lora", "lora_rank": 8, "lora_towers": "visual"}).hyperparameters.model_dump()
    assert (hp["lora_rank"], hp["lora_towers"]) == (8, "visual")
    assert build("mmft", {"lora_rank": 4, "lora_towers": "both"}).hyperparameters.model_dump()["trainable"] == "full"
    assert build("tes", {"trainable": "lora", "lora_rank": 8}).hyperparameters.model_dump()["lora_towers"] == "visual"


def test_an_unknown_method_or_preset_lists_the_known_ones():
    with pytest.raises(InvalidInput, match="mmft, flyp, flyp_ensemble") as caught:
        build("sft", {})
    assert (caught.value.code, caught.value.param) == ("unknown_method", "method.type")
    with pytest.raises(InvalidInput, match="default, paper") as caught:
        build("mmft", {}, "ours")
    assert (caught.value.code, caught.value.param) == ("unknown_preset", "method.preset")


# -- texts -------------------------------------------------------------------------------------------------------------


def test_texts_of_mmft_are_prefixed_captions_or_the_template():
    mmft = build("mmft", {})
    assert mmft.prototype_texts("tabby cat", ["It has stripes."]) == ["a photo of a tabby cat. It has stripes."]
    assert mmft.prototype_texts("tabby cat", []) == ["a photo of a tabby cat."]
    assert mmft.image_texts("tabby cat", ["A.", "B."]) == ["a photo of a tabby cat. A.", "a photo of a tabby cat. B."]
    assert mmft.image_texts("tabby cat", []) == ["a photo of a tabby cat."]


@pytest.mark.parametrize("name", ["mmft", "caption_prototypes"])
def test_captions_per_image_takes_the_same_ones_every_time(name):
    captions = ["One.", "Two.", "Three."]
    method = build(name, {"captions_per_image": 2})
    used = method.captions_of(captions)
    assert len(used) == 2
    assert used == method.captions_of(captions[::-1]) == method.captions_of(used)
    assert build(name, {}).captions_of(captions) == captions
    if isinstance(method, FineTune):
        assert method.image_texts("cat", captions) == [f"a photo of a cat. {text}" for text in used]


def test_sentences_are_paired_with_the_image_but_are_no_prototypes():
    mmft = build("mmft", {"caption_sentences": True})
    caption = "It has stripes. It sleeps."
    prefix = "a photo of a cat. "
    assert mmft.image_texts("cat", [caption, "It runs."]) == [
        prefix + caption,
        prefix + "It has stripes.",
        prefix + "It sleeps.",
        prefix + "It runs.",
    ]
    assert mmft.prototype_texts("cat", [caption]) == [prefix + caption]


def test_the_prototypes_of_captions_are_those_of_mmft():
    captions = ["It has stripes.", "It sleeps."]
    ours, theirs = build("caption_prototypes", {}), build("mmft", {})
    for texts in (captions, []):
        assert ours.prototype_texts("cat", texts) == theirs.prototype_texts("cat", texts)


def test_texts_of_the_baselines_ignore_captions():
    for name, method in METHODS.items():
        if method.needs_captions:
            continue
        texts = build(name, {}).prototype_texts("cat", ["It has stripes."])
        if name.endswith("_ensemble"):
            assert len(set(texts)) == 80
            assert all("cat" in text for text in texts)
        else:
            assert texts == ["a photo of a cat."]
    assert build("flyp_ensemble", {}).image_texts("cat", []) == build("zero_shot_ensemble", {}).prototype_texts(
        "cat", []
    )
    assert build("lora", {}).class_text("cat") == "a photo of a cat."


# -- heads and losses --------------------------------------------------------------------------------------------------


def features(seed: int = 0, dim: int = 8) -> Features:
    """Three clusters, 6 training and 4 validation images each."""
    rng = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(3, dim, generator=rng), dim=-1)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(3 * n) % 3
        return F.normalize(centres[labels] + 0.3 * torch.randn(3 * n, dim, generator=rng), dim=-1), labels

    train, val = draw(6), draw(4)
    prototypes = F.normalize(centres + 0.3 * torch.randn(3, dim, generator=rng), dim=-1)
    return Features(["a", "b", "c"], prototypes, 20.0, 6, *train, *val)


def batch_for(method: FineTune, given: Features, clip) -> Batch:
    text = {"image": given.prototypes[given.train_labels], "class": given.prototypes, "none": None}[method.step_texts]
    head = method.head(given, clip, 0)
    image, scale = given.train.clone().requires_grad_(), torch.tensor(given.logit_scale)
    return Batch(image, text, given.train_labels, scale, given.prototypes, head)


@pytest.mark.parametrize("name", FINE_TUNES)
def test_every_loss_is_finite_flows_to_the_images_and_has_detached_parts(name, tiny):
    method = build(name, {})
    assert isinstance(method, FineTune)
    batch = batch_for(method, features(), tiny)
    loss, parts = method.loss(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert batch.image_emb.grad is not None
    assert batch.image_emb.grad.abs().sum() > 0
    assert parts
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("name", ["cross_entropy", "tes"])
def test_a_head_starts_as_the_zero_shot_classifier(name, tiny):
    given = features()
    head = build(name, {}).head(given, tiny, 0)
    assert all(parameter.requires_grad for parameter in head.parameters())
    torch.testing.assert_close(head(given.val), 20.0 * given.val @ given.prototypes.T)


def test_lp_ft_starts_as_the_linear_probe(tiny):
    given = features()
    probe = build("linear_probe", {}).fit(given, tiny, 0).head
    head = build("lp_ft", {}).head(given, tiny, 0)
    torch.testing.assert_close(head(given.val), probe.logits(given.val))
    c = {"inverse_regularisation": 0.5}
    probe, head = build("linear_probe", c).fit(given, tiny, 0).head, build("lp_ft", c).head(given, tiny, 0)
    torch.testing.assert_close(head(given.val), probe.logits(given.val))


def test_lp_ft_without_images_of_a_class_says_which(tiny):
    given = features()
    kept = given.train_labels != 1
    with pytest.raises(InvalidInput, match=r"`lp_ft` needs .* none of b") as caught:
        build("lp_ft", {}).head(replace(given, train=given.train[kept], train_labels=given.train_labels[kept]), tiny, 0)
    assert caught.value.code == "class_without_images"


def test_contrastive_methods_without_a_head_have_none(tiny):
    for name in ("mmft", "flyp", "flyp_ensemble", "lora"):
        assert build(name, {}).head(features(), tiny, 0) is None


def test_lora_contrasts_images_with_classes_not_with_one_another(tiny):
    given, method = features(), build("lora", {})
    loss, _ = method.loss(batch_for(method, given, tiny))
    torch.testing.assert_close(loss, F.cross_entropy(20.0 * given.train @ given.prototypes.T, given.train_labels))


def test_label_smoothing_reaches_the_loss(tiny):
    given = features()
    smooth, plain = (build("cross_entropy", {"label_smoothing": s}) for s in (0.2, 0.0))
    log_p = F.log_softmax(20.0 * given.train @ given.prototypes.T, dim=1)
    own, even = -log_p[torch.arange(18), given.train_labels].mean(), -log_p.mean()
    torch.testing.assert_close(plain.loss(batch_for(plain, given, tiny))[0], own)
    torch.testing.assert_close(smooth.loss(batch_for(smooth, given, tiny))[0], 0.8 * own + 0.2 * even)


def test_tes_divides_cosines_by_its_temperature(tiny):
    given, method = features(), build("tes", {"tau": 0.05, "lambda_t": 1.0})
    _, parts = method.loss(batch_for(method, given, tiny))
    torch.testing.assert_close(
        parts["text"], F.cross_entropy(given.train @ given.prototypes.T / 0.05, given.train_labels)
    )
