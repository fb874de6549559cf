"""How large a model a folder asks for, before any memory is given to it: a config of a few bytes may name terabytes."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError, safe_open

from shared.classifier.card import bad, check_file, read_card
from shared.clip import local_dir
from shared.errors import cause

log = logging.getLogger(__name__)

_MAX_LAYERS = 1000
_SLACK = 2**24  # numbers that no weights file holds: attention masks and the like
# What costs memory for each picture and text, and no weights: a convolution has the same ones whatever it looks at.
_MAX_IMAGE = 1024  # pixels a side; 512 at most in open_clip's own configs
_MAX_PATCHES = 4096  # of an image; 729 there
_MAX_CONTEXT = 1024  # tokens, to which every text is padded; 77 there


def check_size(directory: Path) -> None:
    """Raises InvalidInput where the config asks for more numbers than the weights file has, or for larger pictures or
    longer texts than any model takes. What else may be wrong with the folder is for `load_classifier` to say."""
    path = directory / local_dir.WEIGHTS
    if not path.is_file():
        return  # nothing is built from the config
    check_file(path, read_card(directory).sha256)
    try:
        with safe_open(path, "pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise bad(path, f"is not a whole safetensors file ({cause(error)})") from error
    config, text_cfg = local_dir.read(directory)
    vision_cfg = config["model_cfg"]["vision_cfg"]
    _check_limit(directory, "an image size", vision_cfg.get("image_size", 1), _MAX_IMAGE)
    _check_limit(directory, "a context length", text_cfg.get("context_length", 1), _MAX_CONTEXT)
    if vision_cfg.get("pos_embed_type", "learnable") != "learnable":  # computed by numpy, which has no "meta"
        raise bad(directory / local_dir.CONFIG, "asks for a pos_embed_type other than 'learnable'")
    configs = [config, _text_tower(directory)]
    if any(layers > min(len(shapes), _MAX_LAYERS) for each in configs for layers in _layers(each)):
        raise bad(directory / local_dir.CONFIG, "asks for more layers than the weights have")
    try:
        with torch.device("meta"):  # shapes without memory
            model = open_clip.create_model(
                f"local-dir:{directory}", text_cfg=text_cfg, load_weights=False, device="meta"
            )
    except Exception as error:  # whatever a config that nobody checked makes of the constructors
        log.info("the model in %s can't be built", directory, exc_info=True)
        raise bad(directory / local_dir.CONFIG, f"can't be built ({cause(error)})") from error
    visual = model.visual
    _check_limit(directory, "an image size", visual.image_size, _MAX_IMAGE)
    _check_limit(directory, "an image size", visual.preprocess_cfg["size"], _MAX_IMAGE)
    _check_limit(directory, "a number of patches", math.prod(getattr(visual, "grid_size", ())), _MAX_PATCHES)
    built = sum(tensor.numel() for each in (model.parameters(), model.buffers()) for tensor in each)
    held = sum(math.prod(shape) for shape in shapes)
    if built > held + _SLACK:
        raise bad(directory / local_dir.CONFIG, f"asks for {built:,} numbers; the weights have {held:,}")


def _check_limit(directory: Path, what: str, asked: Any, limit: int) -> None:
    """Refuses what is no whole number from 1 to `limit`, nor a list of such."""
    numbers = asked if isinstance(asked, list | tuple) else [asked]
    if not all(type(number) is int and 1 <= number <= limit for number in numbers):
        raise bad(directory / local_dir.CONFIG, f"asks for {what} that is not a whole number from 1 to {limit}")


def _text_tower(directory: Path) -> Any:
    path = directory / local_dir.TEXT_CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _layers(config: Any) -> Iterator[int]:
    """Every whole number under a key that counts layers."""
    inner = [config]
    while inner:
        value = inner.pop()
        if isinstance(value, dict):
            for key, each in value.items():
                if "layer" in str(key):
                    yield from (n for n in (each if isinstance(each, list) else [each]) if type(n) is int)
            inner.extend(value.values())
