"""How large a model a folder asks for, before any memory is given to it: a config of a few bytes may name terabytes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError, safe_open

from shared.classifier.card import bad
from shared.clip import local_dir

_MAX_LAYERS = 1000
_SLACK = 2**24  # numbers that no weights file holds: attention masks and the like


def check_size(directory: Path) -> None:
    """Raises InvalidInput where the config asks for more numbers than the weights file has. What else may be wrong with
    the folder is for `load_classifier` to say."""
    try:
        with safe_open(directory / local_dir.WEIGHTS, "pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return
    config, text_cfg = local_dir.read(directory)
    configs = [config, _text_tower(directory)]
    if any(layers > min(len(shapes), _MAX_LAYERS) for each in configs for layers in _layers(each)):
        raise bad(directory / local_dir.CONFIG, "asks for more layers than the weights have")
    try:
        with torch.device("meta"):  # shapes without memory
            model = open_clip.create_model(
                f"local-dir:{directory}", text_cfg=text_cfg, load_weights=False, device="meta"
            )
    except Exception as error:  # whatever a config that nobody checked makes of the constructors
        raise bad(directory / local_dir.CONFIG, f"can't be built ({error})") from error
    built = sum(tensor.numel() for each in (model.parameters(), model.buffers()) for tensor in each)
    held = sum(math.prod(shape) for shape in shapes)
    if built > held + _SLACK:
        raise bad(directory / local_dir.CONFIG, f"asks for {built:,} numbers; the weights have {held:,}")


def _text_tower(directory: Path) -> Any:
    path = directory / local_dir.TEXT_CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _layers(config: Any) -> Iterator[int]:
    """Every whole number under a key that counts layers."""
    if isinstance(config, dict):
        for key, value in config.items():
            if "layer" in str(key):
                yield from (n for n in (value if isinstance(value, list) else [value]) if type(n) is int)
            yield from _layers(value)
