"""What fine-tuning makes: a folder with a classification head over a CLIP's image embeddings.

    head.safetensors   "weight" (C, D), "bias" (C,) float32: logits = L2-normalised image embedding @ weight.T + bias
    captune.json       the card: class names, preprocessing, provenance, SHA-256 of every file with tensors
    open_clip_config.json, open_clip_model.safetensors, ...   the model, where it was trained: any open_clip loads the
                       folder as "local-dir:" (shared/clip/local_dir.py)
    changed.safetensors   or, where the model is the base model, the few tensors of it that were changed, if any

Written by shared/classifier/writing.py, read by whoever scores or serves. Importing this costs no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.classifier.card import (
    CARD,
    CHANGED,
    HEAD,
    ClassifierCard,
    bad,
    check_file,
    read_card,
    sha256_file,
)
from shared.clip.local_dir import WEIGHTS
from shared.errors import InvalidInput, cause

if TYPE_CHECKING:
    from torch import Tensor

    from shared.classifier.head import Head
    from shared.clip.loading import LoadedClip


@dataclass(frozen=True)
class Classifier:
    """A loaded classifier: the model in eval mode, float32; the head on the CPU."""

    clip: "LoadedClip"
    head: "Head"
    card: ClassifierCard

    def logits(self, images: "Tensor", batch: int = 64) -> "Tensor":
        """(N, C) float32 on the CPU. images (N, 3, S, S): uint8 as `preprocess_uint8` gives them, or float already
        normalised."""
        import torch

        from shared.clip.loading import normalise

        size = (3, self.clip.image_size, self.clip.image_size)
        if tuple(images.shape[1:]) != size:
            raise InvalidInput(f"This classifier takes images of shape {size}; got {tuple(images.shape[1:])}.")
        device = next(self.clip.model.parameters()).device
        parts = [torch.empty(0, len(self.head.bias))]
        with torch.no_grad():
            for part in torch.split(images, batch) if len(images) else ():
                part = part.to(device)
                pixels = part if part.is_floating_point() else normalise(part, self.clip)
                parts.append(self.head.logits(self.clip.model.encode_image(pixels, normalize=True).float().cpu()))
        return torch.cat(parts)


LoadBase = Callable[[str], "LoadedClip"]


def load_classifier(directory: Path, device: str = "cpu", load_base: LoadBase | None = None) -> Classifier:
    """Read and check a folder. `load_base` gives a base model by name; it is needed where the folder holds no weights
    of its own, and what it gives is moved to `device` but never changed otherwise.

    Raises InvalidInput (code `bad_classifier` or `bad_model`) on a missing file, a pickle, a truncated or altered file,
    and shapes or keys that don't fit together; nothing is ever unpickled. Where a base model is needed: code
    `base_needed` without `load_base`, `base_changed` where it is not the one the classifier was made from, and whatever
    `load_base` raises."""
    card = read_card(directory)
    clip = _own_clip(directory, card) if card.weights == "own" else _base_clip(directory, card, load_base)
    head = read_head(directory, card, clip)
    clip.model.to(device)
    return Classifier(clip, head, card)


def read_head(directory: Path, card: ClassifierCard, clip: "LoadedClip") -> "Head":
    """The head, weight (C, D) and bias (C,), checked against the card and against the model's width. Raises
    InvalidInput."""
    import torch

    from shared.classifier.head import Head

    tensors = _read_tensors(directory / HEAD, card, {"weight", "bias"})
    weight, bias = tensors["weight"], tensors["bias"]
    classes, width = len(card.class_names), int(clip.config["model_cfg"]["embed_dim"])
    if (tuple(weight.shape), tuple(bias.shape)) != ((classes, width), (classes,)):
        raise bad(
            directory / HEAD,
            f"holds a weight {tuple(weight.shape)} and a bias {tuple(bias.shape)}; {classes} classes of this model need"
            f" ({classes}, {width}) and ({classes},)",
        )
    if {weight.dtype, bias.dtype} != {torch.float32} or not (weight.isfinite().all() and bias.isfinite().all()):
        raise bad(directory / HEAD, "holds numbers that are not finite float32")
    return Head(weight, bias)


def read_changed(directory: Path, card: ClassifierCard, base: "LoadedClip") -> dict[str, "Tensor"]:
    """The tensors that differ from the base model's, by name, checked against it. Raises InvalidInput."""
    if not card.changed:
        return {}
    changed, state = _read_tensors(directory / CHANGED, card, set(card.changed)), base.model.state_dict()
    for name, value in changed.items():
        if name not in state or state[name].shape != value.shape or state[name].dtype != value.dtype:
            has = f"{tuple(state[name].shape)} {state[name].dtype}" if name in state else "no such tensor"
            raise bad(
                directory / CHANGED,
                f"holds {name} {tuple(value.shape)} {value.dtype}, but '{card.base_model}' has {has}",
            )
    return changed


def check_base(card: ClassifierCard, base: "LoadedClip") -> None:
    """Raises InvalidInput where `base` is not the model that the classifier was made from."""
    if base.revision != card.base_revision:
        raise InvalidInput(
            f"The model '{card.base_model}' is not what it was when the classifier was made: its weights are"
            f" {base.revision[:12]}, not {card.base_revision[:12]}. Bring the old weights back, or train again.",
            code="base_changed",
        )


def write_standalone(classifier: Classifier, directory: Path) -> ClassifierCard:
    """Write the whole classifier, weights included, so that plain open_clip loads it as "local-dir:" without the base
    model; head.safetensors and the card stand beside. Returns the new card. Not atomic."""
    from safetensors.torch import save_file

    from shared.clip.loading import save_clip

    save_clip(classifier.clip, classifier.clip.model.state_dict(), directory)
    head = {"weight": classifier.head.weight.contiguous(), "bias": classifier.head.bias.contiguous()}
    save_file(head, directory / HEAD)
    digests = {name: sha256_file(directory / name) for name in (WEIGHTS, HEAD)}
    card = classifier.card.model_copy(update={"weights": "own", "changed": [], "sha256": digests})
    (directory / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return card


def _own_clip(directory: Path, card: ClassifierCard) -> "LoadedClip":
    from shared.clip.loading import load_clip

    check_file(directory / WEIGHTS, card.sha256)
    return load_clip(str(directory.resolve()), directory, [directory])


def _base_clip(directory: Path, card: ClassifierCard, load_base: LoadBase | None) -> "LoadedClip":
    from copy import deepcopy
    from dataclasses import replace

    if load_base is None:
        raise InvalidInput(
            f"The classifier holds no weights of its own: it needs the model '{card.base_model}'."
            " Download it through the API, which adds them.",
            code="base_needed",
        )
    base = load_base(card.base_model)
    check_base(card, base)
    changed = read_changed(directory, card, base)
    if not changed:
        return base
    model = deepcopy(base.model)  # others use the base model
    model.load_state_dict(changed, strict=False)
    return replace(base, model=model)


def _read_tensors(path: Path, card: ClassifierCard, expected: set[str]) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_file(path, card.sha256)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise bad(path, f"is not a whole safetensors file ({cause(error)})") from error
    if set(tensors) != expected:
        raise bad(path, f"must hold the tensors {_names(expected)}; it holds {_names(tensors)}")
    return {name: value.clone() for name, value in tensors.items()}  # the file is mapped, and may be a temporary one


def _names(names: "set[str] | dict[str, Tensor]") -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
