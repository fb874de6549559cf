"""A classifier as a zip of a folder that stands alone: plain open_clip loads it, without Captune and its base model."""

import zipfile
from pathlib import Path
from typing import BinaryIO

from services.evaluator.prediction import serving
from services.evaluator.settings import EvaluatorSettings
from shared.classifier.card import read_card
from shared.core import Core

README = """\
# A classifier made by Captune

The folder holds a CLIP model in open_clip's layout, `head.safetensors` (`weight` (C, D), `bias` (C,)) and the card
`captune.json`; row c of the head is the card's `class_names[c]`. With open_clip alone:

    import json, open_clip, torch
    from PIL import Image
    from safetensors.torch import load_file

    folder = "."
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    head, card = load_file(f"{folder}/head.safetensors"), json.load(open(f"{folder}/captune.json"))
    with torch.no_grad():
        image = preprocess(Image.open("picture.jpg").convert("RGB")).unsqueeze(0)
        embedding = model.eval().encode_image(image, normalize=True)
        probabilities = (embedding @ head["weight"].T + head["bias"]).softmax(1)[0]
    print(card["class_names"][probabilities.argmax()])
"""


def write_zip(core: Core, settings: EvaluatorSettings, storage_key: str, scratch: Path, out: BinaryIO) -> None:
    """Writes the zip; `scratch` is an empty folder. Raises what `load_classifier` does where the weights must be
    brought together first."""
    with core.store.local_folder(storage_key) as folder:
        if read_card(folder).weights == "base":
            serving.write_standalone(core, settings, folder, scratch)
            _pack(scratch, out)
        else:
            _pack(folder, out)


def _pack(folder: Path, out: BinaryIO) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:  # weights hardly shrink
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(path.name)  # a fixed date: the same classifier gives the same bytes
            with path.open("rb") as source, target.open(entry, "w", force_zip64=True) as packed:
                while part := source.read(1 << 20):
                    packed.write(part)
        target.writestr(zipfile.ZipInfo("README.md"), README)
