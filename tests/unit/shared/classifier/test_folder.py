"""The folder of a classifier: read back, refused where it is spoilt, written out whole for plain open_clip."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from shared.classifier.card import CARD, CHANGED, HEAD, ClassifierCard, Preprocessing, read_card, sha256_file
from shared.classifier.folder import load_classifier, write_standalone
from shared.clip.loading import LoadedClip, encode_image, load_clip, save_clip
from shared.clip.local_dir import WEIGHTS
from shared.errors import InvalidInput
from tests.tiny_clip import IMAGE_SIZE, write_tiny_clip

NAMES = ["Red_Ball", "Green_Ball", "Blue_Ball"]
TENSOR_FILES = (WEIGHTS, HEAD, CHANGED)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedClip:
    folder = write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")
    return load_clip(str(folder), folder.parent, [folder.parent])


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, IMAGE_SIZE, IMAGE_SIZE), generator=rng, dtype=torch.uint8)


@pytest.fixture(scope="module")
def head() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {"weight": torch.randn(3, 16, generator=rng), "bias": torch.randn(3, generator=rng)}


def write(folder: Path, clip: LoadedClip, head: dict[str, torch.Tensor], **changes: Any) -> ClassifierCard:
    folder.mkdir(exist_ok=True)
    save_file(head, folder / HEAD)
    values: dict[str, Any] = {
        "base_model": "tiny",
        "base_revision": clip.revision,
        "architecture": clip.name,
        "activation": "gelu",
        "head_kind": "linear",
        "weights": "own",
        "class_names": NAMES,
        "display_names": ["red ball", "green ball", "blue ball"],
        "preprocessing": Preprocessing(
            size=IMAGE_SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", resize_mode="shortest"
        ),
        "method": "lp_ft",
        "hyperparameters": {"epochs": 2},
        "data_fingerprint": "abc",
        "seeds": {"training": 1},
        "shots": 4,
        "validation": "full",
        "val_top1": 0.5,
        "best_epoch": 1,
        "versions": {"captune": "0"},
        "sha256": {},
    }
    card = ClassifierCard(**values | changes)
    (folder / CARD).write_text(card.model_dump_json())
    return recorded(folder)


def recorded(folder: Path) -> ClassifierCard:
    """Makes the card vouch for the files as they are now."""
    card = json.loads((folder / CARD).read_text())
    card["sha256"] = {name: sha256_file(folder / name) for name in TENSOR_FILES if (folder / name).is_file()}
    (folder / CARD).write_text(json.dumps(card))
    return ClassifierCard.model_validate(card)


@pytest.fixture
def own(tiny: LoadedClip, head: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A classifier with weights of its own."""
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in tiny.model.state_dict().items()}
    save_clip(tiny, state, tmp_path / "own")
    write(tmp_path / "own", tiny, head)
    return tmp_path / "own"


@pytest.fixture
def on_base(tiny: LoadedClip, head: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A classifier on the base model's weights, but for one tensor."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"visual.proj": tiny.model.visual.proj.detach().roll(1, 0)}, folder / CHANGED)
    write(folder, tiny, head, weights="base", changed=["visual.proj"], method="prolip")
    return folder


def test_own_weights_and_head_are_read_back(own, tiny, head, pixels):
    loaded = load_classifier(own)
    assert loaded.card == read_card(own)
    assert torch.equal(loaded.head.weight, head["weight"])
    expected = encode_image(loaded.clip, pixels) @ head["weight"].T + head["bias"]
    torch.testing.assert_close(loaded.logits(pixels, batch=2), expected)
    assert not torch.allclose(encode_image(loaded.clip, pixels), encode_image(tiny, pixels))
    torch.testing.assert_close(loaded.logits((pixels.float() / 255 - 0.5) / 0.5), expected)
    assert loaded.logits(pixels[:0]).shape == (0, 3)
    with pytest.raises(InvalidInput, match=r"takes images of shape \(3, 32, 32\)"):
        loaded.logits(pixels[:, :, :16])


def test_base_weights_are_taken_from_the_base_and_left_alone(on_base, tiny, head, pixels):
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    asked = []

    def base(name: str) -> LoadedClip:
        asked.append(name)
        return tiny

    loaded = load_classifier(on_base, load_base=base)
    assert asked == ["tiny"]
    assert not torch.allclose(encode_image(loaded.clip, pixels), encode_image(tiny, pixels))
    assert torch.equal(loaded.clip.model.visual.proj, tiny.model.visual.proj.roll(1, 0))
    torch.testing.assert_close(
        loaded.logits(pixels), encode_image(loaded.clip, pixels) @ head["weight"].T + head["bias"]
    )
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())


def test_without_changes_the_base_model_itself_serves(tiny, head, pixels, tmp_path):
    write(tmp_path / "clf", tiny, head, weights="base")
    loaded = load_classifier(tmp_path / "clf", load_base=lambda _: tiny)
    assert loaded.clip is tiny
    torch.testing.assert_close(loaded.logits(pixels), encode_image(tiny, pixels) @ head["weight"].T + head["bias"])


def test_a_base_is_needed_and_must_be_the_same(on_base, tmp_path):
    with pytest.raises(InvalidInput, match="needs the model 'tiny'") as caught:
        load_classifier(on_base)
    assert caught.value.code == "base_needed"
    other = load_clip(str(write_tiny_clip(tmp_path / "other", seed=5)), tmp_path, [tmp_path])
    with pytest.raises(InvalidInput, match="not what it was") as caught:
        load_classifier(on_base, load_base=lambda _: other)
    assert caught.value.code == "base_changed"


@pytest.mark.parametrize("kind", ["own", "on_base"])
def test_standalone_is_the_same_classifier_without_the_base(kind, request, tiny, pixels, tmp_path):
    loaded = load_classifier(request.getfixturevalue(kind), load_base=lambda _: tiny)
    card = write_standalone(loaded, tmp_path / "out")
    assert (card.weights, card.changed) == ("own", [])
    assert (card.class_names, card.base_revision) == (NAMES, tiny.revision)
    again = load_classifier(tmp_path / "out")
    assert again.card == card
    torch.testing.assert_close(again.logits(pixels), loaded.logits(pixels))


SCORE_WITHOUT_CAPTUNE = """
import json, sys
assert not any(name.split(".")[0] in ("shared", "captune", "services") for name in sys.modules)
import open_clip, torch
from PIL import Image
from safetensors.torch import load_file

folder, picture = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
head, card = load_file(folder + "/head.safetensors"), json.load(open(folder + "/captune.json"))
with torch.no_grad():
    embedding = model.eval().encode_image(preprocess(Image.open(picture)).unsqueeze(0), normalize=True)
print(json.dumps([card["class_names"], (embedding @ head["weight"].T + head["bias"])[0].tolist()]))
assert not any(name.split(".")[0] in ("shared", "captune", "services") for name in sys.modules)
"""


def test_plain_open_clip_gives_the_same_logits_in_a_process_without_captune(on_base, tiny, pixels, tmp_path):
    from PIL import Image

    loaded = load_classifier(on_base, load_base=lambda _: tiny)
    write_standalone(loaded, tmp_path / "out")
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "picture.png")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", SCORE_WITHOUT_CAPTUNE, str(tmp_path / "out"), str(tmp_path / "picture.png")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    names, logits = json.loads(out.stdout.splitlines()[-1])
    assert names == NAMES
    assert logits == pytest.approx(loaded.logits(pixels[:1])[0].tolist(), abs=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


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


def pickled_head(folder: Path) -> None:
    torch.save({"weight": torch.eye(3)}, folder / HEAD, _use_new_zipfile_serialization=False)
    recorded(folder)


def with_head(**tensors: torch.Tensor) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        save_file(tensors, folder / HEAD)
        recorded(folder)

    return spoil


def truncated_head(folder: Path) -> None:
    (folder / HEAD).write_bytes((folder / HEAD).read_bytes()[:-8])
    recorded(folder)


def weights_changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load((folder / WEIGHTS).read_bytes())
        change(state)
        save_file(state, folder / WEIGHTS)
        recorded(folder)

    return spoil


def card_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
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
        (pickled_head, "pickles are never loaded"),
        (with_head(weight=torch.zeros(4, 16), bias=torch.zeros(4)), r"weight \(4, 16\)"),
        (with_head(weight=torch.zeros(3, 8), bias=torch.zeros(3)), r"need \(3, 16\)"),
        (with_head(weight=torch.zeros(3, 16), bias=torch.zeros(1)), r"bias \(1,\)"),
        (with_head(weight=torch.zeros(3, 16).half(), bias=torch.zeros(3)), "not finite float32"),
        (with_head(weight=torch.full((3, 16), torch.nan), bias=torch.zeros(3)), "not finite float32"),
        (with_head(prototypes=torch.zeros(3, 16)), "must hold the tensors bias, weight; it holds prototypes"),
        (truncated_head, "not a whole safetensors file"),
        (weights_changed(lambda state: state.pop("visual.proj")), "visual.proj"),
        (weights_changed(lambda state: state.update({"visual.proj": torch.zeros(5, 5)})), "visual.proj"),
        (lambda f: (f / CARD).unlink(), "is this a classifier's folder"),
        (lambda f: (f / CARD).write_text("{"), "is not JSON"),
        (lambda f: (f / CARD).write_bytes(b"\xff\xfe{"), "is not JSON"),
        (lambda f: (f / HEAD).unlink(), "is missing"),
        (lambda f: (f / WEIGHTS).unlink(), "is missing"),
        (card_with(lambda card: card.pop("class_names")), "class_names: field required"),
        (card_with(lambda card: card.update(format=1)), "format"),
        (card_with(lambda card: card["display_names"].pop()), "differ in length"),
        (card_with(lambda card: card.update(changed=["visual.proj"])), "beside weights of its own"),
    ],
)
def test_a_spoilt_folder_is_refused_with_a_reason(own, spoil, message):
    spoil(own)
    with pytest.raises(InvalidInput, match=message):
        load_classifier(own)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"visual.proj": torch.zeros(5, 5)}, r"visual.proj \(5, 5\)"),
        ({"visual.proj": torch.zeros(32, 16).half()}, "float16"),
        ({"visual.other": torch.zeros(1)}, "must hold the tensors visual.proj"),
    ],
)
def test_changed_tensors_must_be_the_base_models(on_base, tiny, tensors, message):
    save_file(tensors, on_base / CHANGED)
    recorded(on_base)
    with pytest.raises(InvalidInput, match=message):
        load_classifier(on_base, load_base=lambda _: tiny)


def test_a_tensor_that_the_base_does_not_have(on_base, tiny):
    save_file({"visual.other": torch.zeros(1)}, on_base / CHANGED)
    card_with(lambda card: card.update(changed=["visual.other"]))(on_base)
    recorded(on_base)
    with pytest.raises(InvalidInput, match="no such tensor"):
        load_classifier(on_base, load_base=lambda _: tiny)


def test_a_checkpoint_of_another_architecture(own, tmp_path):
    other = write_tiny_clip(tmp_path / "resnet", resnet=True)
    shutil.copyfile(other / "open_clip_config.json", own / "open_clip_config.json")
    with pytest.raises(InvalidInput, match="can't be loaded"):
        load_classifier(own)


def test_reading_the_card_costs_no_torch(own):
    code = "import sys; from pathlib import Path; from shared.classifier.card import read_card; "
    code += "read_card(Path(sys.argv[1])); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(own)], check=True, cwd=Path(__file__).resolve().parents[4])
