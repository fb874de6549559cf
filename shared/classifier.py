"""What fine-tuning makes: a folder that any open_clip loads ("local-dir:"), with two files of ours beside it.

    open_clip_config.json, open_clip_model.safetensors, ...   the model (shared/local_dir.py)
    prototypes.safetensors   "prototypes" (C, D) float32: one L2-normalised embedding per class
    captune.json             the card: class names, preprocessing, provenance, SHA-256 of the weights and prototypes

Written by services/trainer/checkpoints.py, read by whoever scores or serves. Importing this costs no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from shared.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

    from shared.clip import LoadedClip

CARD = "captune.json"
PROTOTYPES = "prototypes.safetensors"


class Preprocessing(BaseModel):
    """Resize to `size` pixels by `resize_mode` and `interpolation`, scale to 0..1, subtract mean, divide by std."""

    model_config = ConfigDict(extra="forbid")

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str


class ClassifierCard(BaseModel):
    """Everything to rebuild, serve and compare a classifier by. Row c of the prototypes is class_names[c]."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    base_model: str  # what the job named: "starter", "arch/pretrained" or a directory
    architecture: str  # what was built from it
    activation: Literal["gelu", "quick_gelu"]
    class_names: list[str]
    display_names: list[str]
    preprocessing: Preprocessing
    method: str
    hyperparameters: dict[str, JsonValue]
    data_fingerprint: str
    seeds: dict[str, int]  # "training", and what else was drawn: "shots", "split"
    shots: int | None  # images per class asked for; None: all
    validation: Literal["none", "few_shot", "full"]
    val_top1: float | None  # fraction, of the epoch kept
    best_epoch: int  # from 1; 0: not trained
    provenance: dict[str, JsonValue] = {}  # job, captions and captioner, whatever else the maker records
    versions: dict[str, str]  # captune, torch, open_clip
    sha256: dict[str, str]  # file name -> hex digest


@dataclass(frozen=True)
class Classifier:
    """A loaded classifier: the model in eval mode, float32, and prototypes (C, D) on the same device."""

    clip: "LoadedClip"
    prototypes: "Tensor"
    card: ClassifierCard

    def logits(self, images: "Tensor", batch: int = 64) -> "Tensor":
        """exp(logit_scale) * cosine: (N, C) float32 on the CPU. images (N, 3, S, S): uint8 as `preprocess_uint8` gives
        them, or float already normalised."""
        import torch

        from shared.clip import normalise

        size = (3, self.clip.image_size, self.clip.image_size)
        if tuple(images.shape[1:]) != size:
            raise InvalidInput(f"This classifier takes images of shape {size}; got {tuple(images.shape[1:])}.")
        parts = [torch.empty(0, len(self.prototypes))]
        with torch.no_grad():
            scale = self.clip.model.logit_scale.exp().squeeze()
            for part in torch.split(images, batch) if len(images) else ():
                part = part.to(self.prototypes.device)
                pixels = part if part.is_floating_point() else normalise(part, self.clip)
                embeddings = self.clip.model.encode_image(pixels, normalize=True).float()
                parts.append((scale * embeddings @ self.prototypes.T).cpu())
        return torch.cat(parts)


def load_classifier(directory: Path, device: str = "cpu") -> Classifier:
    """Read and check a folder. Raises InvalidInput (code `bad_classifier` or `bad_model`) on a missing file, a pickle,
    a truncated or altered file, and shapes or keys that don't fit together; nothing is ever unpickled."""
    import torch

    from shared.clip import load_clip
    from shared.local_dir import WEIGHTS

    card = read_card(directory)
    for name in (WEIGHTS, PROTOTYPES):
        _check_file(directory / name, card.sha256)
    clip = load_clip(str(directory.resolve()), directory, [directory])
    prototypes = _read_prototypes(directory / PROTOTYPES)
    expected = (len(card.class_names), int(clip.config["model_cfg"]["embed_dim"]))
    if tuple(prototypes.shape) != expected or prototypes.dtype != torch.float32:
        raise _bad(
            directory / PROTOTYPES,
            f"holds {tuple(prototypes.shape)} {prototypes.dtype}; {len(card.class_names)} classes of this model need"
            f" {expected} float32",
        )
    if len(card.display_names) != len(card.class_names):
        raise _bad(directory / CARD, "class_names and display_names differ in length")
    clip.model.to(device)
    return Classifier(clip, prototypes.to(device), card)


def read_card(directory: Path) -> ClassifierCard:
    """The card alone, checked. Raises InvalidInput."""
    try:
        return ClassifierCard.model_validate(json.loads((directory / CARD).read_text(encoding="utf-8")))
    except OSError as error:
        raise _bad(directory / CARD, f"can't be read ({error.strerror}); is this a classifier's folder?") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _bad(directory / CARD, f"{where}: {first['msg'].lower()}") from error
    except ValueError as error:
        raise _bad(directory / CARD, f"is not JSON ({error})") from error


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path: Path, digests: Mapping[str, str]) -> None:
    if not path.is_file():
        raise _bad(path, "is missing")
    with path.open("rb") as file:
        head = file.read(2)
    if head[:1] == b"\x80" or head == b"PK":
        raise _bad(path, "is a pickle or a zip of pickles, not safetensors; pickles are never loaded")
    if digests.get(path.name) != sha256_file(path):
        raise _bad(path, f"is truncated or was altered: its SHA-256 is not the one in {CARD}")


def _read_prototypes(path: Path) -> "Tensor":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise _bad(path, f"is not a whole safetensors file ({error})") from error
    if set(tensors) != {"prototypes"}:
        raise _bad(path, f"must hold one tensor, `prototypes`; it holds {sorted(tensors)}")
    return tensors["prototypes"].clone()  # safetensors maps the file, which may be a temporary one


def _bad(path: Path, reason: str) -> InvalidInput:
    return InvalidInput(
        f"The classifier file {path.name} in {path.parent} {reason}. Download or train the classifier again.",
        code="bad_classifier",
    )
