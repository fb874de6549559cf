"""What the ways of training are compared on: JPEG files of a folder, captions, and models."""

import io
import random
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from PIL import Image

from shared.clip import local_dir
from shared.clip.loading import LoadedClip, load_clip
from shared.clip.templates import display_name
from shared.datasets.images import decode

NORMALISE = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
TEXT = """soft round bright striped pointed woven grey amber small heavy narrow glossy folded spotted curved long thin
pale dark rough smooth broad short fine thick sharp deep warm cool light dense loose neat plain rich clear ears tail fur
eyes legs nose back side neck head paws wings beak feathers coat chest grass stone water wood sand snow leaves sky wall
with and near under over beside between"""
WORDS = TEXT.split()


@dataclass(frozen=True)
class Split:
    """n images: JPEG files, labels into the class names, and captions without prefix."""

    files: list[Path]
    labels: list[int]
    captions: list[list[str]]


@dataclass(frozen=True)
class Material:
    class_names: list[str]
    train: Split
    val: Split
    test: Split


def gather(folder: Path, into: Path, shots: int, captions: int, words: int) -> Material:
    """`folder` holds class folders, or `train` and `test` folders of them, which are taken together. Of each class
    `shots` images train, up to as many validate, at least one and up to 50 test. What is no JPEG is written as one,
    since that is what people's pictures are. Captions are of random words, `words` of them give or take a third."""
    roots = [root for name in ("train", "test") if (root := folder / name).is_dir()] or [folder]
    by_class: dict[str, list[Path]] = {}
    for root in roots:
        for directory in sorted(each for each in root.iterdir() if each.is_dir()):
            by_class.setdefault(directory.name, []).extend(sorted(directory.iterdir()))
    rng = random.Random(0)
    splits = {name: Split([], [], []) for name in ("train", "val", "test")}
    for label, (name, files) in enumerate(by_class.items()):
        rng.shuffle(files)
        if len(files) < shots + 2:
            raise SystemExit(f"class {name} of {folder} has {len(files)} images: too few for --shots {shots}")
        validating = min(shots, len(files) - shots - 1)
        cuts = {"train": files[:shots], "val": files[shots:][:validating], "test": files[shots + validating :][:50]}
        for split, chosen in cuts.items():
            for file in chosen:
                splits[split].files.append(_jpeg(file, into / f"{name}-{len(splits[split].files)}-{split}.jpg"))
                splits[split].labels.append(label)
                splits[split].captions.append([_caption(rng, words) for _ in range(captions)])
    return Material([display_name(name) for name in by_class], **splits)


def _jpeg(file: Path, target: Path) -> Path:
    if file.suffix.lower() in (".jpg", ".jpeg"):
        return file
    out = io.BytesIO()
    decode(file.read_bytes()).save(out, "JPEG", quality=90)
    target.write_bytes(out.getvalue())
    return target


def _caption(rng: random.Random, words: int) -> str:
    count = max(3, round(rng.gauss(words, words / 6)))
    return " ".join(rng.choice(WORDS) for _ in range(count)).capitalize() + "."


def model(name: str, cache: Path) -> LoadedClip:
    """ "starter", or an open_clip architecture with random weights."""
    if name == "starter":
        return load_clip(name, cache)
    directory = cache / name
    if not directory.is_dir():
        torch.manual_seed(0)
        cfg = open_clip.get_model_config(name)
        preprocess = NORMALISE | {"interpolation": "bicubic", "resize_mode": "shortest"}
        state = open_clip.create_model(name).state_dict()
        local_dir.write(directory, {"model_cfg": cfg, "preprocess_cfg": preprocess}, state, None)
    return load_clip(str(directory), cache, [cache])


def opened(file: Path) -> Image.Image:
    """The plain way to read a picture."""
    with Image.open(file) as image:
        return image.convert("RGB")
