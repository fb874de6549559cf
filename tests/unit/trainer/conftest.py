"""A tiny CLIP and a tiny labelled data set whose classes differ in colour."""

from pathlib import Path

import pytest
import torch

from services.trainer.training.data import TrainData
from shared.clip.loading import LoadedClip, load_clip
from tests.tiny_clip import IMAGE_SIZE, write_tiny_clip

CLASSES = ["red ball", "green ball", "blue ball"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedClip:
    """Shared by the session: training copies it."""
    return load_clip(str(tiny_folder), tiny_folder.parent, [tiny_folder.parent])


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> LoadedClip:
    """With convolutions and BatchNorm in the image tower."""
    folder = write_tiny_clip(tmp_path_factory.mktemp("models") / "resnet", resnet=True)
    return load_clip(str(folder), folder.parent, [folder.parent])


@pytest.fixture(scope="session")
def balls() -> TrainData:
    """10 training images with 1 to 3 captions each (one has none), 9 for validation."""
    rng = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % len(CLASSES)
        images = torch.randint(0, 100, (n, 3, IMAGE_SIZE, IMAGE_SIZE), generator=rng, dtype=torch.uint8)
        images[torch.arange(n), labels] += 100
        return images, labels

    images, labels = draw(10)
    captions = [
        [f"It is {CLASSES[label]} number {k}." for k in range(i % 4)] for i, label in enumerate(labels.tolist())
    ]
    captions[4].append("It is round.")
    val_images, val_labels = draw(9)
    return TrainData(images, labels, captions, CLASSES, val_images, val_labels)
