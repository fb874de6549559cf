import subprocess
import sys

import pytest

from services.trainer.methods import METHODS, build, describe
from shared.errors import InvalidInput


def test_importing_the_methods_costs_no_torch():
    code = (
        "import sys, services.trainer.methods as m; m.describe(); m.build('mmft', {}); "
        "sys.exit('torch' in sys.modules or 'open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_are_those_of_the_table():
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}


def test_defaults_are_the_papers():
    assert build("mmft", {}).hyperparameters.model_dump() == {
        "epochs": 50,
        "batch_size": 64,
        "learning_rate": 1e-5,
        "weight_decay": 1e-4,
        "horizontal_flip": False,
        "w": 0.1,
        "variant": "exclude_self",
    }


def test_every_hyperparameter_says_what_it_is_its_unit_and_its_default():
    for method in describe():
        for name, schema in method["hyperparameters"].get("properties", {}).items():
            assert {"description", "unit", "default"} <= set(schema), (method["name"], name)


@pytest.mark.parametrize(
    ("method", "values", "param"),
    [
        ("mmft", {"w": 1.1}, "w"),
        ("mmft", {"w": "much"}, "w"),
        ("mmft", {"w": float("nan")}, "w"),
        ("mmft", {"variant": "other"}, "variant"),
        ("mmft", {"epochs": 0}, "epochs"),
        ("mmft", {"epochs": 2.5}, "epochs"),
        ("mmft", {"batch_size": 1}, "batch_size"),
        ("mmft", {"learning_rate": 0}, "learning_rate"),
        ("mmft", {"weight_decay": -1}, "weight_decay"),
        ("flyp", {"w": 0.1}, "w"),
        ("zero_shot", {"epochs": 3}, "epochs"),
    ],
)
def test_bad_hyperparameters_are_named(method, values, param):
    with pytest.raises(InvalidInput, match=f"`{param}` of method `{method}`") as caught:
        build(method, values)
    assert caught.value.param == f"method.hyperparameters.{param}"


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(InvalidInput, match="mmft, flyp, zero_shot, zero_shot_ensemble") as caught:
        build("sft", {})
    assert caught.value.code == "unknown_method"


def test_texts_of_mmft_are_prefixed_captions_or_the_template():
    mmft = build("mmft", {})
    assert mmft.prototype_texts("tabby cat", ["It has stripes."]) == ["a photo of a tabby cat. It has stripes."]
    assert mmft.prototype_texts("tabby cat", []) == ["a photo of a tabby cat."]
    assert mmft.image_texts("tabby cat", ["A.", "B."]) == [
        "a photo of a tabby cat. A.",
        "a photo of a tabby cat. B.",
    ]
    assert mmft.image_texts("tabby cat", []) == ["a photo of a tabby cat."]


def test_texts_of_the_baselines_ignore_captions():
    for name in ("flyp", "zero_shot"):
        assert build(name, {}).prototype_texts("cat", ["It has stripes."]) == ["a photo of a cat."]
    ensemble = build("zero_shot_ensemble", {}).prototype_texts("cat", ["It has stripes."])
    assert len(set(ensemble)) == 80
    assert all("cat" in text for text in ensemble)


def test_only_mmft_needs_captions_and_only_fine_tunes_train():
    assert {m["name"]: (m["needs_captions"], m["trains"]) for m in describe()} == {
        "mmft": (True, True),
        "flyp": (False, True),
        "zero_shot": (False, False),
        "zero_shot_ensemble": (False, False),
    }
