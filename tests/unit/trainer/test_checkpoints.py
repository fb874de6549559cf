"""The writer of a classifier's folder. How folders are read and refused: tests/unit/shared/test_classifier.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.trainer import frozen
from services.trainer.features import Features
from services.trainer.methods import Method, build
from services.trainer.runs.checkpoints import write_classifier
from services.trainer.training.data import TrainData
from services.trainer.training.loop import train
from services.trainer.training.reports import TrainResult
from shared.classifier.card import CARD, CHANGED, HEAD, ClassifierCard, read_card
from shared.classifier.folder import load_classifier
from shared.clip.loading import LoadedClip, encode_image, encode_text, load_clip
from shared.clip.local_dir import WEIGHTS
from shared.clip.projection import last_projection
from tests.tiny_clip import write_tiny_clip
from tests.unit.trainer.fine_tuning import features_of

NAMES = ["Red_Ball", "Green_Ball", "Blue_Ball"]
QUICK = {"epochs": 2, "batch_size": 5, "learning_rate": 1e-3, "precision": "fp32"}
Trained = tuple[Path, TrainResult, ClassifierCard]


def write(folder: Path, clip: LoadedClip, method: Method, result: TrainResult) -> ClassifierCard:
    return write_classifier(
        folder,
        clip,
        method,
        result,
        base_model="tiny",
        class_names=NAMES,
        display_names=["red ball", "green ball", "blue ball"],
        data_fingerprint="abc",
        seeds={"training": 1, "shots": 2, "split": 3},
        shots=4,
        validation="full",
        provenance={"job_id": "ft_1"},
    )


def fine_tuned(clip: LoadedClip, data: TrainData, folder: Path, name: str = "mmft") -> Trained:
    method = build(name, QUICK)
    result = train(clip, method, data, features=features_of(clip, method, data), seed=1, device="cpu")  # type: ignore[arg-type]
    return folder, result, write(folder, clip, method, result)


def fitted(clip: LoadedClip, data: TrainData, folder: Path, name: str, **hyperparameters: Any) -> Trained:
    method = build(name, hyperparameters)
    with torch.no_grad():
        raw = [
            last_projection(clip).unprojected(clip.model, (images.float() / 255 - 0.5) / 0.5)  # type: ignore[union-attr]
            for images in (data.images, data.val_images)
        ]
    features = Features(
        data.class_names,
        encode_text(clip, [f"a photo of a {name}." for name in data.class_names]),
        float(clip.model.logit_scale.detach().exp()),
        train=encode_image(clip, data.images),  # type: ignore[arg-type]
        train_labels=data.labels,
        val=encode_image(clip, data.val_images),  # type: ignore[arg-type]
        val_labels=data.val_labels,
        train_unprojected=raw[0],
        val_unprojected=raw[1],
    )
    result = frozen.fit(clip, method, features, 0)
    return folder, result, write(folder, clip, method, result)


@pytest.fixture(scope="module")
def trained(tiny: LoadedClip, balls: TrainData, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return fine_tuned(tiny, balls, tmp_path_factory.mktemp("classifiers") / "clf")


def test_a_fine_tune_read_back_scores_as_the_trained_model(
    trained: Trained, tiny: LoadedClip, balls: TrainData
) -> None:
    folder, result, card = trained
    loaded = load_classifier(folder)
    assert loaded.card == card == read_card(folder)
    assert (card.weights, card.head_kind, card.changed) == ("own", "prototypes", [])
    assert card.base_revision == tiny.revision
    assert all(torch.equal(value, result.model_state[k]) for k, value in loaded.clip.model.state_dict().items())
    assert torch.equal(loaded.head.weight, result.head.weight)
    logits = loaded.logits(balls.val_images)  # type: ignore[arg-type]
    assert float((logits.argmax(1) == balls.val_labels).double().mean()) == result.val_top1


@pytest.mark.parametrize(("name", "kind"), [("flyp", "prototypes"), ("cross_entropy", "linear")])
def test_the_head_says_what_it_is(name: str, kind: str, tiny: LoadedClip, balls: TrainData, tmp_path: Path) -> None:
    assert fine_tuned(tiny, balls, tmp_path / "clf", name)[2].head_kind == kind


@pytest.mark.parametrize(
    ("name", "kind", "files"),
    [
        ("zero_shot", "prototypes", [CARD, HEAD]),
        ("linear_probe", "linear", [CARD, HEAD]),
        ("gda", "linear", [CARD, HEAD]),
        ("prolip", "prototypes", [CARD, CHANGED, HEAD]),
    ],
)
def test_what_does_not_train_the_model_copies_no_weights(
    name: str, kind: str, files: list[str], tiny: LoadedClip, balls: TrainData, tmp_path: Path
) -> None:
    folder, result, card = fitted(tiny, balls, tmp_path / "clf", name)
    assert sorted(path.name for path in folder.iterdir()) == files
    assert sorted(card.sha256) == [each for each in files if each != CARD]
    assert (card.weights, card.head_kind, card.base_model) == ("base", kind, "tiny")
    loaded = load_classifier(folder, load_base=lambda _: tiny)
    top1 = float((loaded.logits(balls.val_images).argmax(1) == balls.val_labels).double().mean())  # type: ignore[arg-type]
    assert top1 == result.val_top1 == card.val_top1
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000


def test_of_a_changed_model_the_changed_tensors_are_kept(tiny: LoadedClip, balls: TrainData, tmp_path: Path) -> None:
    folder, result, card = fitted(tiny, balls, tmp_path / "clf", "prolip", steps=3, learning_rate=0.1)
    assert card.changed == ["visual.proj"]
    assert torch.equal(load_file(folder / CHANGED)["visual.proj"], result.model_state["visual.proj"])
    assert not torch.equal(result.model_state["visual.proj"], tiny.model.visual.proj)


def test_the_card_says_what_is_needed_to_rebuild_and_compare(trained: Trained) -> None:
    card = json.loads((trained[0] / CARD).read_text())
    assert card["format"] == 2
    assert card["class_names"] == NAMES
    assert card["display_names"] == ["red ball", "green ball", "blue ball"]
    assert card["activation"] == "gelu"
    assert card["method"] == "mmft"
    assert card["hyperparameters"]["epochs"] == 2
    assert "w" in card["hyperparameters"], "also what was left at its default"
    assert card["seeds"] == {"training": 1, "shots": 2, "split": 3}
    assert card["preprocessing"]["size"] == 32
    assert set(card["versions"]) == {"captune", "torch", "open_clip"}
    assert set(card["sha256"]) == {WEIGHTS, HEAD}
    assert card["val_top1"] == trained[1].val_top1


def test_quickgelu_is_recorded_and_rebuilt(tmp_path: Path, balls: TrainData) -> None:
    model = write_tiny_clip(tmp_path / "quick", quick_gelu=True)
    clip = load_clip(str(model), tmp_path, [tmp_path])
    folder, result, card = fine_tuned(clip, balls, tmp_path / "clf")
    assert card.activation == "quick_gelu"
    loaded = load_classifier(folder).clip
    clip.model.load_state_dict(result.model_state)
    torch.testing.assert_close(encode_image(loaded, balls.images), encode_image(clip, balls.images))  # type: ignore[arg-type]


def test_plain_open_clip_loads_the_folder(trained: Trained) -> None:
    code = (
        "import open_clip, sys; m, _, p = open_clip.create_model_and_transforms('local-dir:' + sys.argv[1], "
        "require_pretrained=True); print(float(m.logit_scale.exp()))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(trained[0])], capture_output=True, text=True, check=True)
    assert float(out.stdout) == pytest.approx(float(trained[1].model_state["logit_scale"].exp()), rel=1e-5)
