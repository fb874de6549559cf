"""The card of a classifier's folder (layout: shared/classifier/folder.py), and how its files are checked. No torch."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from shared.errors import InvalidInput

log = logging.getLogger(__name__)

CARD = "captune.json"
HEAD = "head.safetensors"
CHANGED = "changed.safetensors"


class Preprocessing(BaseModel):
    """Resize to `size` pixels by `resize_mode` and `interpolation`, scale to 0..1, subtract mean, divide by std."""

    model_config = ConfigDict(extra="forbid")

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str


class ClassifierCard(BaseModel):
    """Everything to rebuild, serve and compare a classifier by. Row c of the head is class_names[c]."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[2] = 2
    base_model: str  # what the job named: "starter", "arch/pretrained" or a directory
    base_revision: str  # LoadedClip.revision of the base model as it was then
    architecture: str  # what was built from it
    activation: Literal["gelu", "quick_gelu"]
    head_kind: Literal["prototypes", "linear"]  # prototypes: exp(logit_scale) * L2-normalised rows, and no bias
    weights: Literal["own", "base"]  # of the model: in this folder, or the base model's
    changed: list[str] = []  # names of the tensors in changed.safetensors, where the weights are the base model's
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


def read_card(directory: Path) -> ClassifierCard:
    """The card alone, checked. Raises InvalidInput."""
    try:
        card = ClassifierCard.model_validate(json.loads((directory / CARD).read_text(encoding="utf-8")))
    except OSError as error:
        raise bad(directory / CARD, f"can't be read ({error.strerror}); is this a classifier's folder?") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise bad(directory / CARD, f"{where}: {first['msg'].lower()}") from error
    except (ValueError, RecursionError) as error:
        raise bad(directory / CARD, f"is not JSON ({error})") from error
    if len(card.display_names) != len(card.class_names):
        raise bad(directory / CARD, "class_names and display_names differ in length")
    if card.changed and card.weights == "own":
        raise bad(directory / CARD, "names changed tensors beside weights of its own")
    return card


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, digests: Mapping[str, str]) -> None:
    """Raises InvalidInput where the file is missing, a pickle, or not the one that the card vouches for."""
    if not path.is_file():
        raise bad(path, "is missing")
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file begins with its header's length in 8 bytes, and that may look like a pickle's first two.
    if head[8:] != b"{" and (head[:1] == b"\x80" or head[:2] == b"PK"):
        raise bad(path, "is a pickle or a zip of pickles, not safetensors; pickles are never loaded")
    if digests.get(path.name) != sha256_file(path):
        raise bad(path, f"is truncated or was altered: its SHA-256 is not the one in {CARD}")


def bad(path: Path, reason: str) -> InvalidInput:
    """The error for a file of a classifier's folder. Where that lies only the log says."""
    log.info("classifier file %s %s", path, reason)
    return InvalidInput(
        f"The classifier file {path.name} {reason}. Download or train the classifier again.",
        code="bad_classifier",
    )
