import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from services.trainer.checkpoints import write_classifier
from services.trainer.loop import TrainResult, train
from services.trainer.methods import build
from shared.classifier import CARD, PROTOTYPES, load_classifier, read_card, sha256_file
from shared.clip import encode_image, load_clip
from shared.errors import InvalidInput
from shared.local_dir import WEIGHTS
from tests.tiny_clip import write_tiny_clip

NAMES = ["Red_Ball", "Green_Ball", "Blue_Ball"]


def write(folder: Path, clip, method, result: TrainResult):
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


@pytest.fixture(scope="module")
def trained(tiny, balls, tmp_path_factory):
    method = build("mmft", {"epochs": 2, "batch_size": 5, "learning_rate": 1e-3})
    result = train(tiny, method, balls, seed=1, device="cpu")
    folder = tmp_path_factory.mktemp("classifiers") / "clf"
    return folder, result, write(folder, tiny, method, result)


@pytest.fixture
def folder(trained, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(trained[0], tmp_path / "clf"))


def recorded(folder: Path) -> None:
    """Makes the card vouch for the files as they are now."""
    card = json.loads((folder / CARD).read_text())
    card["sha256"] = {name: sha256_file(folder / name) for name in (WEIGHTS, PROTOTYPES)}
    (folder / CARD).write_text(json.dumps(card))


def test_a_classifier_read_back_scores_as_the_trained_model(trained, tiny, balls):
    folder, result, card = trained
    loaded = load_classifier(folder)
    assert loaded.card == card == read_card(folder)
    assert all(torch.equal(value, result.model_state[k]) for k, value in loaded.clip.model.state_dict().items())
    logits = loaded.logits(balls.val_images, batch=4)
    scale = result.model_state["logit_scale"].exp()
    torch.testing.assert_close(logits, scale * encode_image(loaded.clip, balls.val_images) @ result.prototypes.T)
    assert logits.shape == (9, 3)
    assert float((logits.argmax(1) == balls.val_labels).double().mean()) == result.val_top1
    normalised = (balls.val_images.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(loaded.logits(normalised), logits)
    assert loaded.logits(balls.val_images[:0]).shape == (0, 3)
    with pytest.raises(InvalidInput, match=r"takes images of shape \(3, 32, 32\)"):
        loaded.logits(balls.val_images[:, :, :16])


def test_the_card_says_what_is_needed_to_rebuild_and_compare(trained):
    card = json.loads((trained[0] / CARD).read_text())
    assert card["class_names"] == NAMES
    assert card["display_names"] == ["red ball", "green ball", "blue ball"]
    assert card["activation"] == "gelu"
    assert card["method"] == "mmft"
    assert card["hyperparameters"]["w"] == 0.1
    assert card["seeds"] == {"training": 1, "shots": 2, "split": 3}
    assert card["preprocessing"]["size"] == 32
    assert set(card["versions"]) == {"captune", "torch", "open_clip"}
    assert card["val_top1"] == trained[1].val_top1


def test_quickgelu_is_recorded_and_rebuilt(tmp_path, balls):
    model = write_tiny_clip(tmp_path / "quick", quick_gelu=True)
    clip = load_clip(str(model), tmp_path, [tmp_path])
    method = build("zero_shot", {})
    result = train(clip, method, balls, seed=0, device="cpu")
    assert write(tmp_path / "clf", clip, method, result).activation == "quick_gelu"
    torch.testing.assert_close(
        encode_image(load_classifier(tmp_path / "clf").clip, balls.images), encode_image(clip, balls.images)
    )


def test_plain_open_clip_loads_the_folder(trained):
    code = (
        "import open_clip, sys; m, _, p = open_clip.create_model_and_transforms('local-dir:' + sys.argv[1], "
        "require_pretrained=True); print(float(m.logit_scale.exp()))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(trained[0])], capture_output=True, text=True, check=True)
    assert float(out.stdout) == pytest.approx(float(trained[1].model_state["logit_scale"].exp()), rel=1e-5)


def truncate(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-50])


def truncate_and_vouch(folder: Path) -> None:
    truncate(folder)
    recorded(folder)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def pickle_under_the_name(folder: Path) -> None:
    torch.save(load((folder / WEIGHTS).read_bytes()), folder / WEIGHTS)
    recorded(folder)


def pickled_prototypes(folder: Path) -> None:
    torch.save({"prototypes": torch.eye(3)}, folder / PROTOTYPES, _use_new_zipfile_serialization=False)
    recorded(folder)


def prototypes_of_other_classes(folder: Path) -> None:
    save_file({"prototypes": torch.zeros(4, 16)}, folder / PROTOTYPES)
    recorded(folder)


def prototypes_of_another_width(folder: Path) -> None:
    save_file({"prototypes": torch.zeros(3, 8)}, folder / PROTOTYPES)
    recorded(folder)


def prototypes_under_another_key(folder: Path) -> None:
    save_file({"weights": torch.zeros(3, 16)}, folder / PROTOTYPES)
    recorded(folder)


def truncated_prototypes(folder: Path) -> None:
    (folder / PROTOTYPES).write_bytes((folder / PROTOTYPES).read_bytes()[:-8])
    recorded(folder)


def a_weight_missing(folder: Path) -> None:
    state = load((folder / WEIGHTS).read_bytes())
    del state["visual.proj"]
    save_file(state, folder / WEIGHTS)
    recorded(folder)


def a_weight_of_another_shape(folder: Path) -> None:
    state = load((folder / WEIGHTS).read_bytes())
    state["visual.proj"] = torch.zeros(5, 5)
    save_file(state, folder / WEIGHTS)
    recorded(folder)


def card_with(change):
    def spoil(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        change(card)
        (folder / CARD).write_text(json.dumps(card))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "truncated or was altered"),
        (truncate_and_vouch, "can't be loaded"),
        (flip_a_bit, "truncated or was altered"),
        (pickle_under_the_name, "pickles are never loaded"),
        (pickled_prototypes, "pickles are never loaded"),
        (prototypes_of_other_classes, r"holds \(4, 16\)"),
        (prototypes_of_another_width, r"holds \(3, 8\)"),
        (prototypes_under_another_key, "one tensor, `prototypes`"),
        (truncated_prototypes, "not a whole safetensors file"),
        (a_weight_missing, "visual.proj"),
        (a_weight_of_another_shape, "visual.proj"),
        (lambda f: (f / CARD).unlink(), "is this a classifier's folder"),
        (lambda f: (f / CARD).write_text("{"), "is not JSON"),
        (lambda f: (f / PROTOTYPES).unlink(), "is missing"),
        (card_with(lambda card: card.pop("class_names")), "class_names: field required"),
        (card_with(lambda card: card.update(format=2)), "format"),
        (card_with(lambda card: card["display_names"].pop()), "differ in length"),
    ],
)
def test_a_spoilt_folder_is_refused_with_a_reason(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InvalidInput, match=message):
        load_classifier(folder)
